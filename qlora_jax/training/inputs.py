"""Files that a run reads, told apart by size and time: cheap to ask for, before anything is loaded."""

from qlora_jax.files import user_path
from qlora_jax.training.config import TrainConfig

_FIELDS = ("model_name_or_path", "dataset", "eval_dataset", "adapter", "prompts")


def input_files(config: TrainConfig) -> dict[str, list[int]]:
    """Return {path: [bytes, nanoseconds of its last change]} of every local file that a configuration names.

    Of a directory those are the files in it; names on the hub have none.
    """
    found = {}
    for name in _FIELDS:
        value = getattr(config, name)
        path = None if value is None else user_path(value)
        if path is not None and path.exists():
            for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                if file.is_file():
                    stat = file.stat()
                    found[str(file)] = [stat.st_size, stat.st_mtime_ns]
    return found

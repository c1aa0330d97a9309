"""`qlora-jax generate`: answers to a file of prompts, or to one."""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_jax.choices import EarlyStopping
from qlora_jax.cli import command, flag, parse_flags, sigterm_as_ctrl_c, spellings
from qlora_jax.commands.serving_flags import SamplingFlags, load, sampling_refusals
from qlora_jax.environment import keep_compiled_programs
from qlora_jax.errors import UserError
from qlora_jax.files import check_can_make, user_path

if TYPE_CHECKING:
    from qlora_jax.generation import BeamSearch, Engine, Token
    from qlora_jax.serving.model import ServedModel

DESCRIPTION = """Answer prompts with a fine-tuned model, many at a time. A line of INPUT is a JSON object with prompt (a
question), messages (a conversation) or text (to be continued), and settings of its own if it has any; OUTPUT has the
same rows with answer, end and tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateFlags(SamplingFlags):
    """Flags of `generate`."""

    prompt: str | None = flag(None, "One question, whose answer is printed, instead of a file.")
    input: str | None = flag(None, "File of rows, JSON lines.")
    output: str | None = flag(None, "File to write them to with their answers; by default they are printed.")
    adapter: str | None = flag(None, "Adapter that answers rows which name none; by default the first.")
    slots: int = flag(8, "Rows that are answered at a time.")
    num_beams: int = flag(1, "Search with so many beams, one row at a time, instead of choosing tokens.", group="beams")
    length_penalty: float = flag(1.0, "A beam's score is divided by its length to this power.", group="beams")
    early_stopping: EarlyStopping = flag(
        "false", "End a search with as many finished beams as are kept; never: when no other can be better.",
        group="beams",
    )  # fmt: skip


def main(argv: Sequence[str], *, prog: str = "qlora-jax generate") -> int:
    """Load the model and answer."""
    flags, _ = parse_flags(GenerateFlags, argv, prog=prog, description=DESCRIPTION, check=refusals)
    with command(spellings(GenerateFlags)), sigterm_as_ctrl_c():
        generate(flags)
    return 0


def refusals(values: Any, given: Set[str]) -> list[str]:
    """List a sentence for every flag that has no effect beside the others."""
    found = sampling_refusals(values, given)
    if (values.prompt is None) == (values.input is None):
        found.append("give either one `prompt` or a file of them as `input`.")
    if values.prompt is not None:
        idle = sorted({"output", "slots"} & given)
        found += [f"`{name}` has no effect with `prompt`; leave it out." for name in idle]
    if values.num_beams == 1:
        idle = sorted({"length_penalty", "early_stopping"} & given)
        found += [f"`{name}` has no effect without `num_beams`; leave it out." for name in idle]
    else:
        idle = sorted({"do_sample", "slots", "prompt_lookup_num_tokens"} & given)
        found += [f"`{name}` has no effect with `num_beams`; leave it out." for name in idle]
    if not 1 <= values.slots <= 1024:
        found.append(f"`slots={values.slots}`: must be from 1 to 1024.")
    return found


def generate(flags: GenerateFlags) -> None:
    """Answer, with the rate on the standard error output."""
    output = None if flags.output is None else user_path(flags.output)
    if output is not None:
        if output.exists() and not output.is_file():
            raise UserError(f"`output={flags.output}`: is no regular file; choose another, or leave it out to print.")
        check_can_make(output, "choose another file")
    if flags.input is not None:
        source = user_path(flags.input)
        if not source.is_file():
            raise UserError(f"`input={flags.input}`: there is no such file; check the path.")
        if output is not None and output.exists() and output.samefile(source):
            raise UserError(f"`output={flags.output}`: is the input; choose another file.")
    names = [*flags.served.adapters, flags.served.base]
    if flags.adapter is not None and flags.adapter not in names:
        raise UserError(f"`adapter={flags.adapter}`: there is none such; choose from {', '.join(names)}.")
    keep_compiled_programs(flags.compilation_cache, all_of_them=True)
    # Imported after that, and once the flags are known to be good: loading JAX takes seconds.
    from qlora_jax.generation import BeamSearch

    search = BeamSearch(flags.num_beams, flags.length_penalty, flags.early_stopping)
    served = load(flags)
    name = flags.adapter or next(iter(served.names))
    if flags.prompt is not None:
        _answer_one(flags, flags.prompt, served, name, search)
    else:
        _answer_file(flags, output, served, name, search)


def _answer_one(flags: GenerateFlags, prompt: str, served: "ServedModel", name: str, search: "BeamSearch") -> None:
    from qlora_jax.serving.batch import searched, task_of
    from qlora_jax.serving.conversation import Conversation

    options = flags.engine_options(slots=1)
    if search.num_beams > 1:
        task = task_of({"prompt": prompt}, "prompt", served, name, flags.sampling, flags.stops)
        (row,) = searched([task], served, search, options)
        print(row["answer"])
        print(f"[{row['tokens']} tokens, score {row['score']:.4f}]", file=sys.stderr)
        return
    talk = Conversation(served, served.engine(options), name, flags.sampling, stop=flags.stops)
    for piece in talk.answer(prompt):
        print(piece, end="", flush=True)
    print(f"\n[{talk.speed}]", file=sys.stderr)
    _tell_gain(flags, talk.engine)


def _answer_file(
    flags: GenerateFlags, output: Path | None, served: "ServedModel", name: str, search: "BeamSearch"
) -> None:
    from tqdm import tqdm

    from qlora_jax.generation.engine import pieces
    from qlora_jax.serving.batch import answered, read_tasks, searched, write_rows

    assert flags.input is not None
    tasks = read_tasks(flags.input, served, name, flags.sampling, flags.stops)
    came: list[float] = []  # when each token did

    def note(token: "Token") -> None:
        came.append(time.perf_counter())

    # No more room than the rows need: a step reads all that there is. In sizes that pieces have, for few programs.
    longest = max(task.most_tokens for task in tasks)
    options = flags.engine_options(min(flags.slots, len(tasks)))
    options = dataclasses.replace(options, capacity=min(options.capacity, sum(pieces(longest))))
    engine = None if search.num_beams > 1 else served.engine(options)
    rows = searched(tasks, served, search, options) if engine is None else answered(tasks, served, engine, note)
    counted = iter(tqdm(rows, total=len(tasks), unit=" rows", desc="Answering", disable=None))
    if output is None:
        for row in counted:
            print(json.dumps(row, ensure_ascii=False), flush=True)
    else:
        write_rows(output, counted)
    if engine is not None:
        span = came[-1] - came[0]
        rate = f", {(len(came) - 1) / span:.1f} tokens/s after the first" if span else ""
        print(f"[{len(tasks)} rows, {len(came)} tokens{rate}]", file=sys.stderr)
        _tell_gain(flags, engine)


def _tell_gain(flags: GenerateFlags, engine: "Engine") -> None:
    if flags.prompt_lookup_num_tokens:
        print(f"[{engine.gain}]", file=sys.stderr)

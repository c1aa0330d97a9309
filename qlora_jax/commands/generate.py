"""`qlora-jax generate`: answers to a file of prompts, or to one."""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from qlora_jax.cli import command, flag, parse_flags, spellings
from qlora_jax.commands.serving_flags import SamplingFlags, load, sampling_refusals
from qlora_jax.environment import keep_compiled_programs
from qlora_jax.files import check_can_make, user_path

if TYPE_CHECKING:
    from qlora_jax.generation import Token

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


def main(argv: Sequence[str], *, prog: str = "qlora-jax generate") -> int:
    """Load the model and answer."""
    flags, _ = parse_flags(GenerateFlags, argv, prog=prog, description=DESCRIPTION, check=refusals)
    with command(spellings(GenerateFlags)):
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
    if not 1 <= values.slots <= 1024:
        found.append(f"`slots={values.slots}`: must be from 1 to 1024.")
    return found


def generate(flags: GenerateFlags) -> None:
    """Answer, with the rate on the standard error output."""
    output = None if flags.output is None else user_path(flags.output)
    if output is not None:
        check_can_make(output, "choose another file")
    keep_compiled_programs(flags.compilation_cache)
    # Imported after that, and once the flags are known to be good: loading JAX takes seconds.
    from tqdm import tqdm

    from qlora_jax.serving.batch import answered, read_tasks, write_rows
    from qlora_jax.serving.conversation import Conversation, check_name

    sampling = flags.sampling
    served = load(flags)
    name = check_name(served, flags.adapter or next(iter(served.names)))
    if flags.prompt is not None:
        talk = Conversation(served, served.engine(flags.engine_options(slots=1)), name, sampling, stop=flags.stops)
        for piece in talk.answer(flags.prompt):
            print(piece, end="", flush=True)
        print(f"\n[{talk.speed}]", file=sys.stderr)
        return
    assert flags.input is not None
    tasks = read_tasks(flags.input, served, name, sampling, flags.stops)
    engine = served.engine(flags.engine_options(min(flags.slots, len(tasks))))
    came: list[float] = []  # when each token did

    def note(token: "Token") -> None:
        came.append(time.perf_counter())

    with tqdm(total=len(tasks), unit=" rows", desc="Answering", disable=None) as bar:

        def counted() -> Iterator[Mapping[str, Any]]:
            for row in answered(tasks, served, engine, note):
                bar.update()
                yield row

        if output is None:
            for row in counted():
                print(json.dumps(row, ensure_ascii=False), flush=True)
        else:
            write_rows(output, counted())
    rate = f", {(len(came) - 1) / (came[-1] - came[0]):.1f} tokens/s after the first" if came[-1] > came[0] else ""
    print(f"[{len(tasks)} rows, {len(came)} tokens{rate}]", file=sys.stderr)

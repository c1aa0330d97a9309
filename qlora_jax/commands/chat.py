"""`qlora-jax chat`: talk to a fine-tuned model in the terminal."""

import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qlora_jax.cli import command, flag, parse_flags, spellings
from qlora_jax.commands.serving_flags import SamplingFlags, load, sampling_refusals
from qlora_jax.environment import keep_compiled_programs
from qlora_jax.errors import UserError
from qlora_jax.files import user_path

if TYPE_CHECKING:
    from qlora_jax.serving.conversation import Conversation

DESCRIPTION = """Talk to a fine-tuned model: to the adapter of a run beside its 4-bit base, or to several in turn."""

HELP = """  /reset [TEXT]    forget the conversation; TEXT becomes the system prompt
  /adapter NAME    let another adapter answer, or the base
  /save FILE       append the conversation to FILE, a line of JSON that can be trained on
  /help, /exit     this, and the end (or Ctrl-D); Ctrl-C ends an answer"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFlags(SamplingFlags):
    """Flags of `chat`."""

    system: str | None = flag(None, "System prompt.")


def main(argv: Sequence[str], *, prog: str = "qlora-jax chat") -> int:
    """Load the model and talk until the input ends."""
    flags, _ = parse_flags(ChatFlags, argv, prog=prog, description=DESCRIPTION, check=sampling_refusals)
    with command(spellings(ChatFlags)):
        chat(flags)
    return 0


def chat(flags: ChatFlags) -> None:
    """Talk."""
    keep_compiled_programs(flags.compilation_cache, all_of_them=True)
    # Imported after that, and once the flags are known to be good: loading JAX takes seconds.
    from qlora_jax.serving.conversation import Conversation

    sampling = flags.sampling
    served = load(flags)
    names = list(served.names)
    engine = served.engine(flags.engine_options(slots=1))
    talk = Conversation(served, engine, names[0], sampling, stop=flags.stops, system=flags.system)
    print(f"{served.description}\n{_answering(talk)} (of {', '.join(names)}). /help lists commands.")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history in `input`
    while (line := _read()) is not None:
        try:
            if line.startswith("/"):
                if not _obey(line, talk):
                    return
            elif line.strip():
                _say(talk, line)
        except UserError as error:
            print(error)


def _answering(talk: "Conversation") -> str:
    alone = "; it was trained on single questions, and sees no earlier ones" if talk.stands_alone else ""
    return f"{talk.name} answers{alone}"


def _read() -> str | None:
    """Return the next line; None at the end of the input."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit ends)")


def _say(talk: "Conversation", text: str) -> None:
    """Print the answer to a text as it comes."""
    with _interruptible() as interrupted:
        for piece in talk.answer(text, interrupted):
            print(piece, end="", flush=True)
        print("\n(interrupted)" if interrupted() else "")
    gain = f"; {talk.engine.gain}" if talk.engine.gain.guessed else ""
    print(f"[{talk.speed}{gain}]", file=sys.stderr)


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C be noted, once: a program that is stopped anywhere might lose its cache."""
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)


def _obey(line: str, talk: "Conversation") -> bool:
    """Do what a line that begins with / says; return False at the end."""
    from qlora_jax.serving.conversation import check_name, transcript

    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name in ("/exit", "/quit", "/bye"):
        return False
    if name == "/help":
        print(HELP)
    elif name == "/reset":
        talk.reset(rest or None)
    elif name == "/adapter":
        talk.name = check_name(talk.served, rest)
        print(_answering(talk))
    elif name == "/save" and rest:
        row = (json.dumps(transcript(talk), ensure_ascii=False) + "\n").encode(errors="replace")
        try:
            with user_path(rest).open("ab") as file:
                file.write(row)
        except OSError as error:
            raise UserError(f"{rest} cannot be written: {error.strerror}.") from error
        print(f"{len(talk.messages)} messages saved to {rest}")
    else:
        print(f"{line.strip()!r} is no command.\n{HELP}")
    return True

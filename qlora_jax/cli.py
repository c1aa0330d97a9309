"""Command lines from frozen dataclasses: one schema gives the types, the defaults, `--help` and the errors.

Why not tyro (tried: 1.0.17): a boolean is either a bare `--flag` or `--flag False`, not both, and `bool | None` has no
bare form; it exits by itself, with a box of text and status 2; it does not say which flags were given, and has no
place for the hints about flags of other programs. To add these around it takes a parser of the same size.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import logging
import os
import re
import signal
import sys
import threading
import time
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from qlora_jax.environment import keep_off_cuda_without_a_gpu, let_jax_fill_the_gpu, let_jax_pin_the_hosts_memory
from qlora_jax.errors import UserError
from qlora_jax.repeating import Repeated


def flag(
    default: Any,
    help: str,
    *,
    group: str = "flags",
    shapes_step: bool = False,
    resume: Literal["same", "free"] = "same",
) -> Any:
    """Declare a dataclass field that becomes a flag.

    Args:
        default: value when the flag is not given.
        help: explanation for `--help`.
        group: heading for `--help`.
        shapes_step: the flag shapes the programs of a training step, so that a plan has it too.
        resume: "free" if a resumed run may change the flag, "same" if it has to repeat it.
    """
    metadata = {"help": help, "group": group, "shapes_step": shapes_step, "resume": resume}
    return dataclasses.field(default=default, metadata=metadata)


def names_where(schema: type, **metadata: Any) -> tuple[str, ...]:
    """List the flags of `schema` declared with these values, e.g. `names_where(TrainConfig, resume="free")`."""
    return tuple(
        field.name
        for field in dataclasses.fields(schema)
        if all(field.metadata.get(key) == value for key, value in metadata.items())
    )


def argument(help: str) -> Any:
    """Declare a dataclass field that becomes a positional argument."""
    return dataclasses.field(metadata={"help": help, "group": "arguments"})


def arguments(help: str) -> Any:
    """Declare a dataclass field, a tuple of strings, that becomes any number of positional arguments."""
    return dataclasses.field(default=(), metadata={"help": help, "group": "arguments"})


def _boolean(text: str) -> bool:
    lowered = text.lower()
    if lowered in ("true", "1", "yes", "on"):
        return True
    if lowered in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")


def _option(hint: Any) -> dict[str, Any]:
    """Keywords of add_argument for one annotated type: str, int, float, bool, a Literal, or one of them | None."""
    arguments = typing.get_args(hint)
    # `Literal[...] | None` is the older kind of union.
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(argument for argument in arguments if argument is not type(None))
        arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        named = {str(argument): argument for argument in arguments}
        return {"type": lambda text: named.get(text, text), "choices": arguments, "metavar": f"{{{','.join(named)}}}"}
    if hint is bool:
        return {"type": _boolean, "nargs": "?", "const": True, "metavar": "True|False"}
    return {"type": hint, "metavar": hint.__name__.upper()}


@dataclasses.dataclass(frozen=True)
class ForeignFlag:
    """A flag of another program that is no flag here, which pasted command lines have.

    Attributes:
        here: clause that says what is always done here; fields in backticks.
        harmless: values that ask for no other result, in lower case, a bare flag as "true"; None: any value does.
        advice: what to do instead of another value; fields in backticks.
    """

    here: str
    harmless: tuple[str, ...] | None = None
    advice: str = ""

    def accepts(self, value: str) -> bool:
        """Tell if a value changes no result."""
        forms = {value.lower()}
        with contextlib.suppress(argparse.ArgumentTypeError):
            forms.add(str(_boolean(value)).lower())
        with contextlib.suppress(ValueError):
            forms.add(f"{float(value):g}")
        return self.harmless is None or not forms.isdisjoint(self.harmless)


@dataclasses.dataclass(frozen=True)
class Pasted:
    """A command line without the flags of another program.

    Attributes:
        argv: the rest.
        notes: a sentence for each flag that is ignored; fields in backticks.
        refusals: one for each flag that would change the result.
    """

    argv: tuple[str, ...]
    notes: tuple[str, ...]
    refusals: tuple[str, ...]


def without_foreign_flags(argv: Sequence[str], table: Mapping[str, ForeignFlag]) -> Pasted:
    """Take the flags of other programs, with their values, off a command line.

    Args:
        argv: the command line without the program's name, of a command without positional arguments.
        table: the flags by name, with underscores.
    """
    rest, notes, refusals = [], [], []
    for group in _flags_with_values(argv):
        name, equals, value = group[0].removeprefix("--").partition("=")
        name = name.replace("-", "_")
        negated = name not in table and name.startswith("no_")
        name = name.removeprefix("no_") if negated else name
        foreign = table.get(name) if group[0].startswith("--") else None
        if foreign is None:
            rest += group
            continue
        if equals:
            rest += group[1:]
        values = "False" if negated else " ".join([value] if equals else group[1:]) or "True"
        if foreign.harmless is None:  # without the value, which may be a token
            notes.append(f"--{name} changes nothing here: {foreign.here}.")
        elif foreign.accepts(values):
            notes.append(f"--{name} {values} changes nothing here: {foreign.here}.")
        else:
            refusals.append(f"--{name} {values} is not available: {foreign.here}; {foreign.advice}.")
    return Pasted(tuple(rest), tuple(notes), tuple(refusals))


def _flags_with_values(argv: Sequence[str]) -> Iterator[list[str]]:
    """Split a command line before every flag."""
    group: list[str] = []
    for argument in argv:
        if argument.startswith("--") and group:
            yield group
            group = []
        group.append(argument)
    if group:
        yield group


class _Parser(argparse.ArgumentParser):
    """argparse that raises UserError instead of exiting, so that a bad flag is told in one sentence."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message.removeprefix("argument ") + ".")


class _PrintVersion(argparse.Action):
    """Print the version and exit; it is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> typing.NoReturn:
        from importlib.metadata import version

        print(f"qlora-jax {version('qlora-jax')}")
        sys.exit(0)


def parse_flags[T](
    schema: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    refusals: Sequence[str] = (),
    check: Callable[[Any, frozenset[str]], Iterable[str]] = lambda values, given: (),
) -> tuple[T, frozenset[str]]:
    """Parse `argv` into `schema`.

    Args:
        schema: a frozen dataclass whose fields were made with `flag` or `argument`. Booleans may be given bare
            (`--packing`), as `--packing True`, or negated (`--no-packing`); hyphens may stand for underscores.
        argv: the command line without the program's name.
        prog: the program's name in `--help`.
        description: first lines of `--help`.
        refusals: sentences about flags that were taken off `argv`, which are told with all others.
        check: (values by field, names of the flags that were given) -> sentences about what is wrong beside what the
            schema refuses; fields in backticks.

    Returns:
        The filled schema and the names of the flags that were given.

    Raises:
        UserError: everything that is wrong, a line each if it is more than one thing: unknown flags (with the nearest
            match if one is near), missing values, those of a wrong type or choice, what the schema and `check` refuse.
    """
    parser = _Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    parser.add_argument(
        "--version", action=_PrintVersion, nargs=0, default=argparse.SUPPRESS, help="print the version and exit"
    )
    hints = typing.get_type_hints(schema)
    groups: dict[str, Any] = {}
    fields = {field.name: field for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    valued: set[str] = set()
    wrong: list[str] = []
    for name, field in fields.items():
        if field.metadata["group"] == "arguments":
            several: dict[str, Any] = (
                {} if field.default is dataclasses.MISSING else {"nargs": "*", "default": argparse.SUPPRESS}
            )
            parser.add_argument(name, metavar=name.upper(), help=field.metadata["help"], **several)
            continue
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        shown = "" if field.default is None else f" (default: {field.default})"
        text = (field.metadata["help"] + shown).replace("%", "%%")
        option = _option(hints[name])
        if "nargs" not in option:
            valued.add(name)
        option["type"] = _collecting(option["type"], option.pop("choices", None), name, wrong)
        groups[group].add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **option)
        if hints[name] is bool:
            groups[group].add_argument(
                f"--no-{name}",
                dest=name,
                action="store_const",
                const=False,
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )

    def normalised(argument: str) -> str:
        if not argument.startswith("--"):
            return argument
        name, equals, value = argument[2:].partition("=")
        negated = name.startswith(("no-", "no_")) and name.replace("-", "_") not in fields
        stem = (name[3:] if negated else name).replace("-", "_")
        return f"--{'no-' if negated else ''}{stem}{equals}{value}"

    arguments: list[str] = []
    unread: set[str] = set()
    for flag_, *following in _flags_with_values([normalised(argument) for argument in argv]):
        name = flag_.removeprefix("--")
        if flag_.startswith("--") and name in valued and not following:  # argparse would end here
            wrong.append(f"--{name}: expected one argument.")
            unread.add(name)
        else:
            arguments += [flag_, *following]
    try:
        found, rest = parser.parse_known_args(arguments)
    except UserError as error:
        raise _all_at_once([*refusals, *wrong, str(error)], prog) from error
    wrong = [*refusals, *wrong, *(_unexpected(group, fields) for group in _flags_with_values(rest))]
    given = frozenset(vars(found))
    unread |= {name for name, value in vars(found).items() if value is _UNREADABLE}
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(found).items()
        if name not in unread
    }
    complaints: list[str] = []
    try:
        filled = schema(**values)
    except UserError as error:
        complaints += error.sentences
    defaults = {name: field.default for name, field in fields.items()}
    complaints += check(types.SimpleNamespace(**{**defaults, **values}), given)
    # What could not be read has its default here, which may contradict the rest as the value that was meant does not.
    told = [text for text in dict.fromkeys(complaints) if unread.isdisjoint(name for name, _ in _FIELD.findall(text))]
    wrong += [with_dashes(text, spellings(schema)) for text in told]
    if wrong:
        raise _all_at_once(wrong, prog)
    return filled, given


_UNREADABLE = object()


def _collecting(convert: Callable[[str], Any], choices: Sequence[Any] | None, name: str, wrong: list[str]) -> Any:
    """Make a conversion for argparse that notes a bad value in `wrong`, where argparse would end at the first."""

    def read(text: str) -> Any:
        try:
            value = convert(text)
        except argparse.ArgumentTypeError as error:
            wrong.append(f"--{name}: {error}.")
        except ValueError:
            wrong.append(f"--{name}: invalid {convert.__name__} value: {text!r}.")
        else:
            if choices is None or value in choices:
                return value
            wrong.append(f"--{name}: invalid choice: {text!r} (choose from {', '.join(map(repr, choices))}).")
        return _UNREADABLE

    return read


def _unexpected(group: Sequence[str], fields: Collection[str]) -> str:
    """Return a sentence about something that is no flag here, a flag first if it is one."""
    if not group[0].startswith("--"):
        return f"{group[0]!r} is not a flag; flags begin with --."
    name = group[0].removeprefix("--").partition("=")[0]
    return f"unknown flag --{name}.{_nearest(name.removeprefix('no-'), fields, '--')}"


def _nearest(name: str, names: Collection[str], prefix: str = "") -> str:
    """Return " Did you mean ...?" if a name is a slip of the pen away, else nothing."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    return f" Did you mean {prefix}{near[0]}?" if near else ""


def _all_at_once(wrong: Sequence[str], prog: str) -> UserError:
    if len(wrong) == 1:
        return UserError(f"{wrong[0]} See {prog} --help.")
    return UserError("\n  ".join([f"{len(wrong)} things are wrong with the flags; see {prog} --help.", *wrong]))


def subcommand(argv: Sequence[str], commands: Mapping[str, str], *, prog: str, description: str) -> str | None:
    """Return the command named first; without one, or for --help, print them all and return None.

    Args:
        argv: the command line without the program's name.
        commands: names and one-line descriptions.
        prog: the program's name.
        description: first lines of the help.

    Raises:
        UserError: no such command (with the nearest match).
    """
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, commands))
        print(f"usage: {prog} COMMAND [FLAGS]\n\n{description}\n")
        for name, text in commands.items():
            print(f"  {name:{width}}  {text}")
        print(f"\n{prog} COMMAND --help lists the flags of a command.")
        return None
    if argv[0] in commands:
        return argv[0]
    hint = _nearest(argv[0], commands)
    raise UserError(f"unknown command {argv[0]!r}; choose from {', '.join(commands)}.{hint} See {prog} --help.")


_FIELD = re.compile(r"`(\w+)(?:=([^`]*))?`")


def spellings(schema: type) -> dict[str, str]:
    """Map the fields of a schema to what the command line calls them: `--field`, or FIELD for a positional argument."""
    return {
        field.name: field.name.upper() if field.default is dataclasses.MISSING else f"--{field.name}"
        for field in dataclasses.fields(schema)
    }


def with_dashes(text: str, spelling: Mapping[str, str]) -> str:
    """Write fields as flags: "`packing`" as "--packing", "`remat=full`" as "--remat full".

    Args:
        text: a message of the library.
        spelling: fields and what the command line calls them; other words in backticks stay.
    """

    def written(match: re.Match[str]) -> str:
        field, value = match.groups()
        if field not in spelling:
            return match[0]
        return spelling[field] if value is None else f"{spelling[field]} {value}"

    return _FIELD.sub(written, text)


def _bar_class() -> Any:
    """Return tqdm's class; None if it is not loaded, and so there is no bar, or another thread is loading it."""
    return getattr(sys.modules.get("tqdm"), "tqdm", None)


class _Lines(logging.Handler):
    """Print log records as plain lines, above any progress bar: warnings on stderr, the rest on stdout."""

    def __init__(self, spelling: Mapping[str, str]) -> None:
        super().__init__()
        self.spelling = spelling
        self.last = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        self.last = time.monotonic()
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        bar = _bar_class()
        try:
            text = with_dashes(record.getMessage(), self.spelling)
            bar.write(text, file=stream) if bar else print(text, file=stream)
            stream.flush()
        except Exception:  # as every handler does: logging must not end a run
            self.handleError(record)


def _signs_of_life(lines: _Lines, silence: float) -> Repeated:
    """Print a line on stdout whenever neither a line nor a progress bar has been seen for `silence` seconds."""
    begin = time.monotonic()

    def watch() -> None:
        now, bar = time.monotonic(), _bar_class()
        if bar and len(bar._instances):  # a bar is redrawn by itself
            lines.last = now
        elif now - lines.last >= silence:
            lines.last = now
            print(f"still at work, {now - begin:.0f} s so far", flush=True)

    return Repeated(watch, silence / 10, name="signs-of-life")


@contextlib.contextmanager
def command(spelling: Mapping[str, str], *, silence: float | None = None) -> Iterator[None]:
    """Run the body of a command: set up the process for JAX, print what the library logs, and put errors in flags.

    Args:
        spelling: fields and what the command line calls them, see `spellings`.
        silence: most seconds without anything printed; None where only results may be.
    """
    keep_off_cuda_without_a_gpu()
    let_jax_fill_the_gpu()
    let_jax_pin_the_hosts_memory()
    logger, handler = logging.getLogger("qlora_jax"), _Lines(spelling)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        with contextlib.nullcontext() if silence is None else _signs_of_life(handler, silence):
            yield
    except UserError as error:
        raise UserError(with_dashes(str(error), spelling)) from error
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


RESUMABLE = 75
"""Exit status of what was interrupted and goes on when the same command is given again: sysexits.h's EX_TEMPFAIL."""


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Raise KeyboardInterrupt for SIGTERM too while the block runs, unless the process ignores or handles it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run(main: Callable[[Sequence[str]], int | None]) -> typing.NoReturn:
    """Run a main function and exit with the status it returns.

    A UserError or a full disk is one line and exit status 1, KeyboardInterrupt is status 130.
    """
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # whoever reads has had enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"error: {error.filename or 'a file'} cannot be written: {error.strerror}; free space.", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)

"""Command lines from frozen dataclasses: one schema gives the types, the defaults, `--help` and the errors."""

import argparse
import dataclasses
import difflib
import errno
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from qlora_jax.environment import keep_off_cuda_without_a_gpu, let_jax_fill_the_gpu, let_jax_pin_the_hosts_memory
from qlora_jax.errors import UserError


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
        return {"type": type(arguments[0]), "choices": arguments, "metavar": "{" + ",".join(map(str, arguments)) + "}"}
    if hint is bool:
        return {"type": _boolean, "nargs": "?", "const": True, "metavar": "True|False"}
    return {"type": hint, "metavar": hint.__name__.upper()}


class _Parser(argparse.ArgumentParser):
    """argparse that raises UserError instead of exiting, so that a bad flag is told in one sentence."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message.removeprefix("argument ") + f". See {self.prog} --help.")


def parse_flags[T](
    schema: type[T], argv: Sequence[str], *, prog: str, description: str, unavailable: Mapping[str, str] | None = None
) -> tuple[T, frozenset[str]]:
    """Parse `argv` into `schema`.

    Args:
        schema: a frozen dataclass whose fields were made with `flag` or `argument`. Booleans may be given bare
            (`--packing`), as `--packing True`, or negated (`--no-packing`); hyphens may stand for underscores.
        argv: the command line without the program's name.
        prog: the program's name in `--help`.
        description: first lines of `--help`.
        unavailable: flags of other programs that are not flags here -> what to do instead.

    Returns:
        The filled schema and the names of the flags that were given.

    Raises:
        UserError: an unknown flag (with the nearest match), or a value of the wrong type or choice.
    """
    parser = _Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    hints = typing.get_type_hints(schema)
    groups: dict[str, Any] = {}
    fields = {field.name: field for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    for name, field in fields.items():
        if field.default is dataclasses.MISSING:
            parser.add_argument(name, metavar=name.upper(), help=field.metadata["help"])
            continue
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        shown = "" if field.default is None else f" (default: {field.default})"
        text = (field.metadata["help"] + shown).replace("%", "%%")
        groups[group].add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **_option(hints[name]))
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

    found, rest = parser.parse_known_args([normalised(argument) for argument in argv])
    for argument in rest:
        if not argument.startswith("--"):
            raise UserError(f"{argument!r} is not a flag; flags begin with --. See {prog} --help.")
        name = argument[2:].partition("=")[0]
        if unavailable and name in unavailable:
            raise UserError(f"--{name} is not available: {unavailable[name]}")
        near = difflib.get_close_matches(name.removeprefix("no-"), fields, n=1, cutoff=0.5)
        hint = f" Did you mean --{near[0]}?" if near else ""
        raise UserError(f"unknown flag --{name}.{hint} See {prog} --help.")
    return schema(**vars(found)), frozenset(vars(found))


def run(main: Callable[[Sequence[str]], int | None]) -> typing.NoReturn:
    """Run a script's main: a UserError or a full disk is one line and exit status 1, Ctrl-C is status 130."""
    keep_off_cuda_without_a_gpu()
    let_jax_fill_the_gpu()
    let_jax_pin_the_hosts_memory()
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"error: {error.filename or 'a file'} cannot be written: {error.strerror}; free space.", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)

"""JSON that anyone may have written: parsed with limits, and checked against a type.

Python's own parser takes a lone surrogate for text, and has errors of four types, without a position, for the rest of
what is refused here.
"""

import reprlib
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from qlora_jax.errors import UserError

MAX_BYTES = 24 * 2**20
"""Largest file that describes something; parsed, JSON takes up to 30 times its length in memory."""


def parse_json(raw: bytes) -> Any:
    """Parse UTF-8 JSON, with or without a byte order mark.

    Raises:
        ValueError: it is no JSON, is nested over 200 deep, has an integer of over 4300 digits or text that is not
            Unicode; says which, with line and column.
    """
    return from_json(raw.removeprefix(b"\xef\xbb\xbf"))


def check_type(value: Any, adapter: TypeAdapter, where: str) -> Any:
    """Return `value` if it is of the adapter's type.

    Args:
        value: what `parse_json` returned.
        adapter: of a type whose fields are as in the file.
        where: beginning of the message, "config.json: " or "FILE: ".

    Raises:
        UserError: names the first field that is wrong, says what it should be and shows what it is.
    """
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise _first_mistake(error, where) from None


def parse_typed(raw: bytes, adapter: TypeAdapter, where: str) -> Any:
    """Parse JSON into the adapter's type, dataclasses and tuples included; arguments and errors as for `check_type`."""
    try:
        return adapter.validate_json(raw, strict=True)
    except ValidationError as error:
        raise _first_mistake(error, where) from None


def _first_mistake(error: ValidationError, where: str) -> UserError:
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(map(str, first["loc"])) or "it"
    if first["type"] == "missing":
        return UserError(f"{where}{field} is missing.")
    wanted = first["msg"].replace("Input should", "should").removeprefix("Value error, ").removesuffix(".")
    if first["type"] == "too_long":  # "List should have at most 3 items after validation, not 4"
        wanted = f"should{wanted.partition('should')[2].partition(' after')[0]}"
    return UserError(f"{where}{field} {wanted}, not {reprlib.repr(first['input'])}.")

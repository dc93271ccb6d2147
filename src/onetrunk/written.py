"""The written form of a value, `lowrank(rank=8)`: for files, command lines, messages and tests.

Reads literals only: nothing in a written form is ever looked up or run.
"""

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any

from .errors import SpecError

LISTED = 20  # names at most that an error lists


def write(name: str, fields: Mapping[str, Any]) -> str:
    """`write("lowrank", {"rank": 8})` is `"lowrank(rank=8)"`; without fields, the bare name.

    >>> write("lowrank", {"rank": 8}), write("norm", {})
    ('lowrank(rank=8)', 'norm')
    """
    inner = ", ".join(f"{key}={value!r}" for key, value in fields.items())
    return f"{name}({inner})" if inner else name


def changed_fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass instance that differ from their defaults."""
    return {
        field.name: getattr(value, field.name)
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != field.default
    }


def read(text: str, what: str) -> tuple[str, dict[str, Any]]:
    """The name and the fields that `text` writes; `what` names the thing in the error.

    >>> read("lowrank(rank=8)", "adapter")
    ('lowrank', {'rank': 8})

    Raises:
        SpecError: where `text` is not `name` or `name(field=literal, ...)`.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if isinstance(call, ast.Name):
            return call.id, {}
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
            raise ValueError("not a call with named fields")
        fields = {str(key.arg): ast.literal_eval(key.value) for key in call.keywords if key.arg}
        if len(fields) != len(call.keywords):
            raise ValueError("** is not a field")
        return call.func.id, fields
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise SpecError(
            f"cannot read {what} {text[:80]!r}: write it as name or name(field=value), "
            "for example lowrank(rank=8)."
        ) from None


def unknown(what: str, name: str, known: Mapping[str, Any] | tuple[str, ...]) -> SpecError:
    """The error for a name that a table does not hold, with the closest one it does."""
    import difflib

    close = difflib.get_close_matches(name.lower(), list(known), n=1)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    table = f"known are {', '.join(sorted(known))}"
    if len(known) > LISTED:
        table = f"none of the {len(known)} known has that name"
    return SpecError(f"unknown {what} {name!r}: {table}.{guess}")


def build(cls: type[Any], fields: Mapping[str, Any], text: str, what: str) -> Any:
    """`cls(**fields)` for a dataclass, or an error that names the field and lists the real ones."""
    known = [field.name for field in dataclasses.fields(cls)]
    for key in fields:
        if key not in known:
            takes = ", ".join(known) or "no fields"
            raise SpecError(f"{what} {text!r} has no field {key!r}: it takes {takes}.")
    return cls(**fields)

"""Reads federation.toml and site.toml: tables of settings into pydantic models, all faults at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fedsplit.core import toml_file
from fedsplit.core.errors import ConfigError
from fedsplit.core.foreign import printable

FORMAT = 1
_Settings = TypeVar("_Settings", bound=BaseModel)
_MOST_FAULTS = 100


def read_settings(path: Path, model: type[_Settings], *, what: str) -> _Settings:
    """The settings in a file. Raises ConfigError: no file, another format, every fault.

    `what` names the folder that it stands in, e.g. "federation folder".
    """
    if not path.is_file():
        raise ConfigError(
            f"{printable(path.parent)} is no {what}: it holds no {path.name}; give the folder that was made for it"
        )
    tables = toml_file.parse(toml_file.read_bytes(path, what), what, where=printable(path))
    found = tables.pop("format", None)
    if found != FORMAT:
        raise ConfigError(_other_format(path, found, what))
    try:
        return model.model_validate(tables)
    except ValidationError as err:
        faults = [_fault(e) for e in err.errors()[:_MOST_FAULTS]]
        raise ConfigError(
            f"{printable(path)} has faults; correct them there:\n"
            + "\n".join(f"  - {fault}" for fault in faults)
        ) from err


def _other_format(path: Path, found: Any, what: str) -> str:
    shown = printable(found, limit=40)
    if isinstance(found, int) and found > FORMAT:
        return (
            f"{printable(path)} has format {shown}, this fedsplit knows {FORMAT}: a newer fedsplit made this {what}; "
            f"install that one here"
        )
    if isinstance(found, int):
        return (
            f"{printable(path)} has format {shown}, this fedsplit wants {FORMAT}: an older fedsplit made this {what}; "
            f"docs/how-to/operate.md says how to bring it up to date"
        )
    return (
        f"{printable(path)} has no line `format = {FORMAT}` at its top; is it a {what} of fedsplit?"
    )


def _fault(error: Any) -> str:
    place = ".".join(printable(part, limit=60) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{place}: no such setting; remove it, or correct its name"
    got = printable(error["input"], limit=80)
    return f"{place} = {got}: {printable(error['msg'], limit=300)}"

"""A run file: TOML with the settings of one run, in tables named as the sections. Any bytes give settings or a ConfigError.

    [train]
    rounds = 10

Says where each fault is, all of them at once; what a value may be is `RunConfig.from_flat`'s word.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedsplit.core import toml_file
from fedsplit.core.config.flat import Flat, suggestion, unknown
from fedsplit.core.config.run_config import FIELDS, NOT_GIVEN, SECTIONS
from fedsplit.core.errors import ConfigError
from fedsplit.core.foreign import printable

_MOST_FAULTS = 100


def read_run_file(path: Path) -> Flat:
    """The settings that a run file gives, as flat keys. Raises ConfigError."""
    data = toml_file.read_bytes(path, "run file")
    return parse_run_file(data, where=printable(path))


def parse_run_file(data: bytes, *, where: str) -> Flat:
    """The same from a file's bytes; `where` names it in errors."""
    tables = toml_file.parse(data, "run file", where=where)
    faults = [fault for name, table in tables.items() for fault in _faults(name, table)]
    if faults:
        more = len(faults) - _MOST_FAULTS
        shown = faults[:_MOST_FAULTS] + ([f"and {more} more"] if more > 0 else [])
        raise ConfigError(
            f"run file {where} has faults; no run was started:\n"
            + "\n".join(f"  - {fault}" for fault in shown)
        )
    return {key: value for table in tables.values() for key, value in table.items()}


def _faults(name: str, table: Any) -> Iterator[str]:
    """What is wrong with one entry of the file's top level."""
    shown = printable(name, limit=100)
    if not isinstance(table, dict):
        if name in SECTIONS and name not in FIELDS:
            yield f"{name} is a table; write its keys below [{name}]"
        else:
            place = (
                f"put it into table [{FIELDS[name].section}]" if name in FIELDS else _tables(name)
            )
            yield f"{shown} stands outside the tables; {place}"
    elif name not in SECTIONS:
        yield f"unknown table [{shown}]; {_tables(name)}"
    else:
        for key, value in table.items():
            yield from (f"[{name}] {fault}" for fault in _faults_of_key(name, key, value))


def _faults_of_key(table: str, key: str, value: Any) -> Iterator[str]:
    if key not in FIELDS:
        there = {k for k, of in FIELDS.items() if of.section == table}
        yield unknown(printable(key, limit=100), there if _near(key, there) else set(FIELDS))
    elif FIELDS[key].section != table:
        yield f"{key} belongs into table [{FIELDS[key].section}]; move it there"
    elif not isinstance(value, str | int | float):
        yield f"{key} is {_kind(value)}; a text, a number, true or false is wanted"
    elif value == NOT_GIVEN:
        yield f'{key} = "{NOT_GIVEN}": the word stands for a key that is not given; leave {key} out'


def _near(key: str, keys: set[str]) -> bool:
    """Is something in `keys` meant?"""
    return suggestion(key, keys, "none").startswith("did you mean")


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "a table"
    return "an array" if isinstance(value, list) else "a date or a time"


def _tables(name: str) -> str:
    return suggestion(name, SECTIONS, "there are the tables")

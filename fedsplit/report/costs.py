"""costs.toml: what inspection costs at the plant today and with the module. No value of money is built in.

Each value says what it is, between which bounds it may lie, and whether it is the plant's own or assumed:
`seconds-a-part = { value = 8, low = 6, high = 11, source = "own" }`. A key that is not there stays unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from fedsplit.core.config.flat import suggestion
from fedsplit.core.config.section import Section
from fedsplit.core.errors import ConfigError
from fedsplit.core.foreign import ClassName, printable
from fedsplit.core.names import MAX_TASK_CHARS
from fedsplit.core.toml_file import parse, read_bytes
from fedsplit.report.words import Words

KIND = "costs file"
Unit = Literal["s", "min", "h", "share", "count", "money", "W", "days"]
Source = Literal["own", "assumed"]
_MOST = 1e12
_EMPTY = re.compile(r"=\s*[,}]")

UNITS: dict[str, Unit] = {
    "seconds-a-part": "s",
    "parts-a-month": "count",
    "defect-rate": "share",
    "escape-rate-today": "share",
    "false-reject-rate-today": "share",
    "reinspected-share": "share",
    "false-alarm-rate": "share",
    "false-alarm-minutes": "min",
    "false-alarm-rejected-share": "share",
    "escape-rate": "share",
    "upkeep-hours-a-month": "h",
    "hour-cost": "money",
    "escape-cost": "money",
    "false-reject-cost": "money",
    "gigabyte-cost": "money",
    "kwh-cost": "money",
    "runs-a-month": "count",
    "machine-watts": "W",
    "machine-hours-a-month": "h",
    "machines": "count",
    "machine-cost": "money",
    "engineer-days": "days",
    "engineer-day-cost": "money",
    "other-cost-once": "money",
}
"""Every value that the file may hold, in the order of the template."""
GROUPS = {
    "seconds-a-part": "today",
    "reinspected-share": "module",
    "hour-cost": "money",
    "runs-a-month": "running",
    "machines": "once",
}
"""The first key of each group of the template."""
_POSITIVE = {"seconds-a-part", "parts-a-month"}
"""A share of no hours means nothing."""


class Value(Section):
    """One value of the file. Without bounds it counts as exact, and the report says that none were stated."""

    value: float = Field(ge=0, le=_MOST, allow_inf_nan=False)
    low: float | None = Field(default=None, ge=0, le=_MOST, allow_inf_nan=False)
    high: float | None = Field(default=None, ge=0, le=_MOST, allow_inf_nan=False)
    source: Source
    """own: measured or known at this plant. assumed: a guess, a catalogue, another plant's."""
    note: str = Field(default="", max_length=500)
    """Where it comes from."""

    @model_validator(mode="after")
    def _in_order(self) -> Value:
        low, high = self.bounds
        if not low <= self.value <= high:
            raise ValueError(
                f"low {low:g}, value {self.value:g}, high {high:g} are not in order; put the least first"
            )
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high); the value itself where none is stated."""
        return (
            self.value if self.low is None else self.low,
            self.value if self.high is None else self.high,
        )


class _File(Section):
    """The keys beside the values."""

    format: Literal[1] = 1
    currency: Annotated[str, Field(max_length=12)] = ""
    """Stands behind each amount, e.g. "JPY". Nothing is converted."""
    task: Annotated[str, Field(max_length=MAX_TASK_CHARS)] = ""
    """Whose measured rates count, where a report has several tasks."""
    good_classes: tuple[ClassName, ...] = Field(default=(), max_length=1000)
    """Classes of parts that are good. All others are defects."""


@dataclass(frozen=True)
class Costs:
    """What a costs file says, and at which of its lines."""

    path: Path
    values: dict[str, Value]
    lines: dict[str, int]
    """Key -> the number of its line; 0 where it could not be found."""
    currency: str = ""
    task: str = ""
    good_classes: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Costs:
        """Raises ConfigError with all faults of the file at once."""
        data = read_bytes(path, KIND)
        raw = _parsed(data, path)
        settings = {key: raw.pop(key) for key in list(raw) if key in _keys_beside()}
        faults: list[str] = []
        values = dict(_values(raw, faults))
        try:
            beside = _File.model_validate(settings)
        except ValidationError as err:
            faults += [_fault("", one) for one in err.errors()]
        if faults:
            told = "\n".join(f"  - {fault}" for fault in faults)
            raise ConfigError(
                f"{KIND} {printable(path)} has faults:\n{told}\n"
                "`fedsplit report --costs-template` prints a file with every key"
            )
        return cls(
            path=path,
            values=values,
            lines=_lines(data.decode("utf-8-sig"), values),
            currency=printable(beside.currency),
            task=beside.task,
            good_classes=beside.good_classes,
        )


def template(lang: str) -> str:
    """A costs file with every key and no value, as comments in a language of the report."""
    say = Words(lang)
    lines = [f"# {line}" for line in say("costs.template").splitlines()]
    lines += ["", "format = 1", f"# {say('costs.currency')}", 'currency = ""']
    lines += [f"# {say('costs.task')}", 'task = ""']
    lines += [f"# {say('costs.good-classes')}", "good-classes = []"]
    for key, unit in UNITS.items():
        if key in GROUPS:
            lines += ["", f"# --- {say('costs.group.' + GROUPS[key])} ---"]
        lines += [
            f"# {say('cost.' + key)} ({say('unit.' + unit)})",
            f'# {key} = {{ value = , low = , high = , source = "" }}',
        ]
    return "\n".join(lines) + "\n"


def _parsed(data: bytes, path: Path) -> dict[str, Any]:
    """The file's keys. Raises ConfigError, with the line where a place of the template was left empty."""
    try:
        return parse(data, KIND, where=printable(path))
    except ConfigError as err:
        text = data.decode("utf-8", "replace")
        for number, line in enumerate(text.splitlines(), 1):
            if _EMPTY.search(line.split("#")[0]):
                raise ConfigError(
                    f"{KIND} {printable(path)}, line {number}, has an empty place: {printable(line.strip(), limit=120)}; "
                    "fill in value and source there, and fill in low and high or remove them"
                ) from err
        raise


def _keys_beside() -> set[str]:
    return {field.replace("_", "-") for field in _File.model_fields}


def _values(raw: dict[str, Any], faults: list[str]) -> Iterator[tuple[str, Value]]:
    for key, given in raw.items():
        shown = printable(key, limit=60)
        if key not in UNITS:
            known = [*UNITS, *_keys_beside()]
            faults.append(f"unknown key '{shown}'; {suggestion(key, known, 'known keys:')}")
        elif not isinstance(given, dict):
            faults.append(
                f"{shown} is {printable(given, limit=40)}; say where it comes from: "
                f'{shown} = {{ value = {printable(given, limit=40)}, low = ..., high = ..., source = "own" }} '
                'or "assumed"'
            )
        else:
            try:
                value = Value.model_validate(given)
            except ValidationError as err:
                faults += [_fault(f"{shown}: ", one) for one in err.errors()]
                continue
            if UNITS[key] == "share" and value.bounds[1] > 1:
                faults.append(
                    f"{shown}: {value.bounds[1]:g} is more than all; a share is from 0 to 1, 3 % is 0.03"
                )
            elif key in _POSITIVE and value.bounds[0] <= 0:
                faults.append(
                    f"{shown}: it has to be more than 0, low too; leave it out if it is not known"
                )
            else:
                yield key, value


def _fault(before: str, one: Any) -> str:
    where = ".".join(map(str, one["loc"]))
    if one["type"] == "missing" and where == "source":
        return f'{before}source is missing; write source = "own" or source = "assumed"'
    words = one["msg"].removeprefix("Value error, ")
    return (
        f"{before}{printable(where, limit=60)}{': ' if where else ''}{printable(words, limit=200)}"
    )


def _lines(text: str, keys: dict[str, Value]) -> dict[str, int]:
    """Where each key stands: as a key, or as a table's name."""
    found = dict.fromkeys(keys, 0)
    for number, line in enumerate(text.splitlines(), 1):
        if (hit := re.match(r"""\s*\[?\s*["']?([a-z-]+)["']?\s*[\].=]""", line)) is not None:
            key = hit[1]
            if found.get(key) == 0:
                found[key] = number
    return found

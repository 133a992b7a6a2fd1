"""The grid file: TOML to frozen models. Says where each fault is, all of them at once; knows no run settings.

docs/reference/grid.md describes the format. What a setting may be is RunConfig's word: cells.py
asks it. Any bytes give a Grid or a ConfigError.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedsplit.core import toml_file
from fedsplit.core.errors import ConfigError
from fedsplit.core.names import MAX_TASK_CHARS, RULE, is_name, normalised

MAX_CELLS = 20_000
MAX_CANDIDATES = 256

Scalar = bool | int | float | Annotated[str, Field(max_length=4096)]
_SCALARS = {"bool", "int", "float", "str", "constrained-str"}
Settings = dict[str, Scalar]
Wire = Literal["near", "grpc"]
Choices = dict[str, Annotated[list[Scalar], Field(min_length=1, max_length=256)]]
Label = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f|*`\\]{1,60}$")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class _Table(BaseModel):
    # Strict: TOML has types, and seeds = ["0"] is a slip.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=lambda name: name.replace("_", "-"),
    )


class _WithSettings(_Table):
    """A table of its own keys, where every other key is a setting of the run."""

    settings: Settings = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "settings" in value:
            return value
        own = {field.alias or name for name, field in cls.model_fields.items()}
        rest = {k: v for k, v in value.items() if k not in own}
        return {k: v for k, v in value.items() if k in own} | {"settings": rest}


class Experiment(_Table):
    """[experiment]: what it is called and how often each run is repeated."""

    name: str
    """Name of the experiment: the folder of its results."""
    description: str = Field("", max_length=2000)
    """A sentence that stands above the table."""
    out: str = Field("", max_length=1000, pattern=r"^[^\x00]*$")
    """Folder of the results; empty: results/NAME."""
    seeds: list[Seed] = Field(default=[0], min_length=1, max_length=100)
    """Each run is done once a seed; the table tells mean and deviation over them."""
    wire: Wire = "near"
    """near: the encoder in the run's process, its answers shared between runs; grpc: the real stream."""
    sites_at_once: int = Field(1, ge=1, le=32)
    """Sites of a run that work at the same time: near, a training step each by turns; over grpc as fast as each can."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not is_name(normalised(value), MAX_TASK_CHARS):
            raise ValueError(f"{value[:100]!r} is no name: 1 to {MAX_TASK_CHARS} {RULE} are wanted")
        return normalised(value)


class Problem(_WithSettings):
    """[[problems]]: a backbone and data, with the settings that go with them."""

    name: Label


class MethodRow(_WithSettings):
    """[[methods]]: a row of the table."""

    name: Label
    """How the table calls it."""
    tune: Choices | None = None
    """Setting -> values to try; without it [tuning]'s, {} for none."""
    drop: list[str] = Field(default_factory=list, max_length=64)
    """Keys of [defaults], [[problems]] and [axes] that are not this method's."""
    only: Choices = Field(default_factory=dict, max_length=8)
    """Axis -> those of its values at which the method is run; without it at all."""

    def runs_at(self, axes: Iterable[tuple[str, Scalar]]) -> bool:
        """Is the method run where the axes have these values?"""
        return all(value in self.only.get(key, [value]) for key, value in axes)


class Tuning(_Table):
    """[tuning]: the search that settles a method's open settings before the runs that are reported."""

    seed: Seed = 1000
    """Seed of the search's runs; none of the reported ones."""
    settings: Settings = Field(default_factory=dict)
    """What the search's runs have in place of the axes' first values, e.g. a partition, fewer rounds."""
    tune: Choices = Field(default_factory=dict)
    """Setting -> values to try for every method that has no list of its own."""


class Grid(_Table):
    """A whole grid file."""

    experiment: Experiment
    defaults: Settings = Field(default_factory=dict)
    """Settings of all runs."""
    problems: list[Problem] = Field(default_factory=list, max_length=64)
    axes: Choices = Field(default_factory=dict, max_length=8)
    """Setting -> values, all multiplied with each other."""
    methods: list[MethodRow] = Field(min_length=1, max_length=64)
    tuning: Tuning = Field(default_factory=Tuning)

    @field_validator("methods", "problems")
    @classmethod
    def _unique(cls, value: list[MethodRow] | list[Problem]) -> list[MethodRow] | list[Problem]:
        names = [entry.name for entry in value]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"the name {twice[0]!r} is used more than once; give each its own")
        return value

    @model_validator(mode="after")
    def _bounded(self) -> Grid:
        runs = len(self.methods) * len(self.experiment.seeds) * max(1, len(self.problems))
        runs *= math.prod(len(values) for values in self.axes.values())
        faults = []
        if runs > MAX_CELLS:
            faults.append(f"the grid has {runs} runs, at most {MAX_CELLS} are taken; split it")
        for method in self.methods:
            tried = math.prod(len(v) for v in self.tuned(method).values())
            if tried > MAX_CANDIDATES:
                faults.append(
                    f"method {method.name!r} tunes {tried} candidates, at most {MAX_CANDIDATES} are taken; try fewer"
                )
            for key, values in method.only.items():
                if odd := [v for v in values if v not in self.axes.get(key, [])]:
                    faults.append(
                        f"method {method.name!r} is to run only at {key}={odd[0]!r}, which [axes] does not have; "
                        f"its values: {self.axes.get(key, 'none')}"
                    )
        seeds = self.experiment.seeds
        if len(set(seeds)) < len(seeds):
            faults.append(f"experiment.seeds={seeds} has one twice; name each once")
        if any(self.tuned(m) for m in self.methods) and self.tuning.seed in seeds:
            faults.append(
                f"tuning.seed={self.tuning.seed} is one of experiment.seeds, which would report a run on what it "
                f"was tuned on; choose another seed"
            )
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def tuned(self, method: MethodRow) -> Choices:
        """What is searched for a method; empty: nothing."""
        return self.tuning.tune if method.tune is None else method.tune

    @property
    def out(self) -> Path:
        """Folder of the results."""
        return Path(self.experiment.out or f"results/{self.experiment.name}").expanduser()


def read_grid(path: Path) -> Grid:
    """Read a grid file. Raises one ConfigError that lists every fault of its form."""
    data = toml_file.read_bytes(path, "grid")
    return parse_grid(data, where=str(path))


def parse_grid(data: bytes, *, where: str) -> Grid:
    """A grid from a file's bytes; `where` names it in errors. Raises ConfigError."""
    table = toml_file.parse(data, "grid", where=where)
    try:
        return Grid.model_validate(table)
    except ValidationError as err:
        faults = [fault for error in err.errors() for fault in _faults(error)]
        raise faulty(where, list(dict.fromkeys(faults))) from err


def faulty(where: str, faults: list[str]) -> ConfigError:
    """The one error for all faults of a grid."""
    shown = faults[:100]
    more = [f"and {len(faults) - len(shown)} more"] if len(faults) > len(shown) else []
    lines = "\n".join(f"  - {fault}" for fault in shown + more)
    count = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
    return ConfigError(f"grid {where} has {count}; no run was started:\n{lines}")


def _faults(error: Any) -> list[str]:
    """A pydantic error in words, with the place in the file."""
    where, in_union = "", False
    for part in error["loc"]:
        if isinstance(part, int):
            where += f"[{part + 1}]"
        elif part in _SCALARS:
            in_union = True
        elif part != "settings":
            where += f".{part}" if where else str(part)
    message = str(error["msg"]).removeprefix("Value error, ")
    shown = repr(error["input"])
    shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
    if error["type"] == "extra_forbidden":
        return [f"{where[:200]}: unknown key; docs/reference/grid.md lists the known ones"]
    if error["type"] == "missing":
        return [f"{where[:200]} is missing; add it"]
    if error["type"] == "value_error":
        return [f"{where}: {line}" if where else line for line in message.splitlines()]
    if in_union and error["type"] != "string_too_long":
        message = "a number, true, false or a string is wanted"
    return [f"{where[:200]}={shown}: {message}"]

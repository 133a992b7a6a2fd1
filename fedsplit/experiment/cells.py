"""A grid multiplied out: one Cell a run, its settings read by RunConfig. Collects faults instead of raising at the first.

Later tables win: [defaults], [[problems]], [axes], [tuning], [[methods]], what was tuned. Starts
nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedsplit import __version__
from fedsplit.core.config import RunConfig
from fedsplit.core.errors import ConfigError, FedsplitError
from fedsplit.core.names import is_name, normalised
from fedsplit.experiment.grid import Grid, MethodRow, Problem, Scalar, Settings, Wire

# What the experiment sets itself.
OWN_KEYS = (
    "seed", "run-name", "runs-dir", "registry", "resume", "encoder-address", "encoder-bind", "encoder-secret-file",
    "encoder-tls-cert", "encoder-tls-key", "encoder-tls-ca", "encoder-insecure",
)  # fmt: skip
# How a run is kept, not what it computes.
_NO_MATTER = ("run-name", "runs-dir", "registry", "resume", "deadline-s")
# No site of a simulation is late: what a grid reports must not depend on the machine's speed.
_PATIENT_S = 10.0**7


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a run reaches its encoder (grpc: the real stream on loopback), and how many of its sites work at a time."""

    wire: Wire = "near"
    sites_at_once: int = 1

    @property
    def by_turns(self) -> bool:
        """Where no wire is between, sites that work at once do so by turns: a run repeats bit for bit."""
        return self.wire == "near" and self.sites_at_once > 1


Tuned = Mapping[tuple[str, str], Settings]
"""(method, problem) -> the settings that a search chose."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a grid. Cells whose settings are equal share one run."""

    method: str
    problem: str
    axes: tuple[tuple[str, Scalar], ...]
    seed: int
    config: RunConfig
    way: Way = Way()

    @property
    def nodes(self) -> list[dict[str, int]]:
        """The node configs of the run's sites."""
        return [
            {"partition-id": i, "num-partitions": self.config.server.sites}
            for i in range(self.config.server.sites)
        ]

    @property
    def run(self) -> str:
        """Name of the run's folder."""
        return self.config.run.run_name

    @property
    def key(self) -> str:
        """Digest of what decides the run's result: settings, version, and how many sites work at once."""
        return config_key(self.config, self.way.sites_at_once)

    @property
    def column(self) -> str:
        """The cell's place in the table beside method and seed."""
        return ", ".join(str(v) if k == "partition" else f"{k}={v}" for k, v in self.axes)

    def __str__(self) -> str:
        where = " ".join(filter(None, (self.problem, self.column)))
        return f"{self.method} {where} seed={self.seed}".replace("  ", " ")


@dataclass
class Faults:
    """What is wrong with a grid, each fault once, with the first place where it shows."""

    only: tuple[str, ...] = ()
    """The methods whose faults count; all of them when empty."""
    _found: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def add(self, method: str, place: str, text: str) -> None:
        """Note a fault of a method's cell."""
        if not self.only or method in self.only:
            self._found.setdefault((method, text), []).append(place)

    def __bool__(self) -> bool:
        return bool(self._found)

    def lines(self) -> list[str]:
        """A line a fault. One that all methods share is not said for each."""
        by_text: dict[str, list[tuple[str, list[str]]]] = {}
        for (method, text), places in self._found.items():
            by_text.setdefault(text, []).append((method, places))
        lines = []
        for text, where in by_text.items():
            names = ", ".join(repr(method) for method, _ in where[:4])
            names += f" and {len(where) - 4} more" if len(where) > 4 else ""
            places = where[0][1]
            at = f" ({places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''})"
            lines.append(f"method {names}{at if places[0] else ''}: {text}")
        return lines


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A cell before its method: problem, axes and seed."""

    problem: Problem
    axes: tuple[tuple[str, Scalar], ...]
    seed: int

    def __str__(self) -> str:
        pairs = [f"{k}={v}" for k, v in self.axes]
        return ", ".join(([self.problem.name] if self.problem.name else []) + pairs)


def conditions(grid: Grid) -> Iterator[Condition]:
    """All conditions of the reported runs; seeds are the outermost, so that a grid cut short has whole tables."""
    problems = grid.problems or [Problem.model_construct(name="", settings={})]
    for seed in grid.experiment.seeds:
        for problem in problems:
            for values in itertools.product(*grid.axes.values()):
                yield Condition(
                    problem=problem, axes=tuple(zip(grid.axes, values, strict=True)), seed=seed
                )


def expand(grid: Grid, out: Path, faults: Faults, *, tuned: Tuned | None = None) -> list[Cell]:
    """The reported runs, as far as their settings can be read; the rest is in `faults`."""
    makers = CellMaker(out / "runs", faults)
    chosen = tuned or {}
    cells = [
        makers.cell(
            grid, method, condition, extra=chosen.get((method.name, condition.problem.name), {})
        )
        for condition in conditions(grid)
        for method in grid.methods
        if method.runs_at(condition.axes)
    ]
    return [cell for cell in cells if cell is not None]


class CellMaker:
    """Reads settings and names runs; equal settings get one run."""

    def __init__(self, runs: Path, faults: Faults) -> None:
        self._runs = runs.absolute()
        self._faults = faults
        self._names: dict[str, str] = {}

    def cell(
        self, grid: Grid, method: MethodRow, condition: Condition, *, extra: Settings
    ) -> Cell | None:
        """The cell, or None when its settings have faults."""
        flat = self._flat(grid, method, condition, extra)
        faults = [
            f"{key} is set by the experiment itself; leave it out"
            for key in OWN_KEYS
            if key in flat
        ]
        known = {key: value for key, value in flat.items() if key not in OWN_KEYS}
        fixed: Settings = {"seed": condition.seed, "runs-dir": str(self._runs), "registry": "none"}
        fixed |= {"deadline-s": flat.get("deadline-s", _PATIENT_S)}
        config = None
        try:
            config = RunConfig.from_flat(known | fixed)
        except ConfigError as err:
            faults += faults_of(err)
        for fault in faults:
            self._faults.add(method.name, str(condition), fault)
        if config is None or faults:
            return None
        name = self._name(method, condition, config_key(config))
        return Cell(
            method=method.name,
            problem=condition.problem.name,
            axes=condition.axes,
            seed=condition.seed,
            config=config.changed(run_name=name),
            way=_way(grid, config),
        )

    def _flat(
        self, grid: Grid, method: MethodRow, condition: Condition, extra: Settings
    ) -> Settings:
        shared = grid.defaults | condition.problem.settings | dict(condition.axes)
        kept = {key: value for key, value in shared.items() if key not in method.drop}
        task = _slug(condition.problem.name) or grid.experiment.name
        return {"task": task[:64]} | kept | method.settings | extra

    def _name(self, method: MethodRow, condition: Condition, key: str) -> str:
        if key not in self._names:
            words = (method.name, condition.problem.name, *(v for _, v in condition.axes))
            name = "-".join(filter(None, (_slug(str(word)) for word in words)))[:80]
            # A name of 80 characters may have too many bytes for a folder's.
            name = name.encode()[:160].decode(errors="ignore")
            name = f"{name}-seed{condition.seed}".lstrip(".-")
            taken = self._names.values()
            self._names[key] = f"{name[:90]}-{key[:8]}" if name in taken else name
        return self._names[key]


def _way(grid: Grid, config: RunConfig) -> Way:
    """How the grid has the run go. Turns are for sites that step one copy; to others they make no difference."""
    said = grid.experiment
    turns_matter = said.wire == "grpc" or config.placement.encoder_training == "shared"
    return Way(wire=said.wire, sites_at_once=said.sites_at_once if turns_matter else 1)


def faults_of(error: FedsplitError) -> list[str]:
    """The single faults of an error that lists several."""
    head, *faults = str(error).split("\n  - ")
    # A head with a colon announces the faults; without one it is the first of them.
    return faults if faults and head.endswith(":") else [head, *faults]


def config_key(config: RunConfig, sites_at_once: int = 1) -> str:
    """Digest of the settings that decide a run's result, and of fedsplit's version.

    Those at their defaults are left out: a setting that is new does not make finished runs others.
    """
    # What runs that are finished did not name before it became automatic.
    named = {"classifier-init": "zero", "loss": "softmax", "learning-rate": 0.01}
    defaults = RunConfig.defaults() | named
    flat = {k: v for k, v in config.flat().items() if k not in _NO_MATTER and v != defaults.get(k)}
    several = [sites_at_once] if sites_at_once > 1 else []
    text = json.dumps([__version__, flat, *several], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _slug(text: str) -> str:
    kept = "".join(c if c in "._" or is_name(f"x{c}", 2) else "-" for c in normalised(text))
    return re.sub("-+", "-", kept).strip("-.")

"""Settles the settings that a method leaves open: one short run a candidate, on a seed that no reported run has.

All methods get what they ask for, and `tuning.csv` tells how many candidates each had and what they
reached. The best global accuracy wins, the earlier candidate in a tie.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsplit.experiment.cells import Cell, CellMaker, Condition, Faults, Tuned
from fedsplit.experiment.files import write_whole
from fedsplit.experiment.grid import Grid, MethodRow, Problem, Settings
from fedsplit.experiment.results import Row, finished


@dataclass(frozen=True)
class Trial:
    """One candidate of one method on one problem."""

    method: str
    problem: str
    candidate: tuple[tuple[str, bool | int | float | str], ...]
    cell: Cell


def trials(grid: Grid, out: Path, faults: Faults) -> list[Trial]:
    """All runs of the search; candidates whose settings have faults are in `faults` instead."""
    maker = CellMaker(out / "tuning", faults)
    found = []
    for problem in grid.problems or [Problem.model_construct(name="", settings={})]:
        for method in grid.methods:
            for candidate in candidates(grid, method):
                condition = Condition(problem=problem, axes=_first(grid), seed=grid.tuning.seed)
                general = {k: v for k, v in grid.tuning.settings.items() if k not in method.drop}
                extra = general | candidate
                cell = maker.cell(grid, method, condition, extra=extra)
                if cell is not None:
                    found.append(Trial(method.name, problem.name, tuple(candidate.items()), cell))
    return found


def candidates(grid: Grid, method: MethodRow) -> Iterator[Settings]:
    """The settings to try for a method; none when it tunes nothing."""
    tuned = grid.tuned(method)
    if tuned:
        for values in itertools.product(*tuned.values()):
            yield dict(zip(tuned, values, strict=True))


def first_candidates(grid: Grid) -> Tuned:
    """A stand-in for what the search will choose, so that the reported runs can be checked before it."""
    names = [problem.name for problem in grid.problems] or [""]
    return {
        (method.name, name): next(candidates(grid, method), {})
        for method in grid.methods
        for name in names
    }


def _first(grid: Grid) -> tuple[tuple[str, bool | int | float | str], ...]:
    """The axes' first values, or what [tuning] has in their place."""
    return tuple(
        (key, grid.tuning.settings.get(key, values[0])) for key, values in grid.axes.items()
    )


def settled(trials_: Sequence[Trial]) -> tuple[list[Trial], list[Row]]:
    """Those of searches that have ended, and their rows: of a method on a problem all candidates or none."""
    found = [(trial, finished(trial.cell)) for trial in trials_]
    open_ = {(trial.method, trial.problem) for trial, row in found if row is None}
    ended = [(t, row) for t, row in found if row and (t.method, t.problem) not in open_]
    return [trial for trial, _ in ended], [row for _, row in ended]


def choose(trials_: Sequence[Trial], rows: Sequence[Row]) -> Tuned:
    """The best candidate of each method on each problem. One whose every run failed keeps its first."""
    best: dict[tuple[str, str], tuple[float, Settings]] = {}
    for trial, row in zip(trials_, rows, strict=True):
        # A method that averages nothing is judged by what its sites reach alone.
        known = (row.accuracy_global, row.accuracy_local_only, -1.0)
        reached = next(value for value in known if value is not None)
        key = (trial.method, trial.problem)
        if row.outcome == "failed":
            reached = -1.0
        if key not in best or reached > best[key][0]:
            best[key] = reached, dict(trial.candidate)
    return {key: settings for key, (_, settings) in best.items()}


def write_tuning(path: Path, trials_: Sequence[Trial], rows: Sequence[Row], chosen: Tuned) -> None:
    """Write tuning.csv: a row a candidate. Raises RunDirError."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["method", "problem", "candidate", "accuracy_global", "outcome", "chosen", "seconds", "run"]
    )
    for trial, row in zip(trials_, rows, strict=True):
        picked = chosen.get((trial.method, trial.problem)) == dict(trial.candidate)
        words = " ".join(f"{k}={v}" for k, v in trial.candidate)
        reached = "" if row.accuracy_global is None else row.accuracy_global
        where = (trial.method, trial.problem, words)
        writer.writerow([*where, reached, row.outcome, picked, row.seconds, row.run])
    write_whole(path, text.getvalue())

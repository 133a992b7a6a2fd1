"""A grid, read and checked: which runs there are, which of them are to be done, and which settings are settled already.

With `only`, the other methods are told of as far as they are done and none of their runs is
started. Starts nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fedsplit.core.errors import ConfigError
from fedsplit.core.extras import check_extra
from fedsplit.experiment.cells import Cell, Faults, Tuned, expand
from fedsplit.experiment.check import check_cells
from fedsplit.experiment.grid import Grid, faulty, read_grid
from fedsplit.experiment.results import finished
from fedsplit.experiment.tuning import Trial, choose, first_candidates, settled, trials


@dataclass(frozen=True)
class GridPlan:
    """A checked grid."""

    grid: Grid
    out: Path
    only: tuple[str, ...]
    """The methods to run; all of them when empty."""
    trials: list[Trial]
    """The search: its runs to do, and of the other methods those of a search that has ended."""
    cells: list[Cell]
    """The reported runs: those to do, and what is done of the other methods. Before a search has ended its first
    candidate stands in for the best."""

    def runs(self, method: str) -> bool:
        """Whether this method's runs are to be done."""
        return not self.only or method in self.only

    @property
    def to_run(self) -> list[Cell]:
        """The search and the reported runs, without what is only told of."""
        cells = [*(trial.cell for trial in self.trials), *self.cells]
        return [cell for cell in cells if self.runs(cell.method)]

    def tuned(self, chosen: Tuned) -> GridPlan:
        """The plan after the search."""
        return replace(self, cells=_cells(self, chosen, Faults()))


def make_plan(path: Path, *, out: Path | None = None, only: tuple[str, ...] = ()) -> GridPlan:
    """Read and check a grid. Raises one ConfigError that lists all faults of what is to be run."""
    check_extra("simulation", "fedsplit experiment", "flwr_datasets", "matplotlib", "scipy")
    grid = read_grid(path)
    if unknown := [label for label in only if label not in {m.name for m in grid.methods}]:
        names = ", ".join(m.name for m in grid.methods)
        raise ConfigError(f"--only {unknown[0]!r} is no method of {path}; it has {names}")
    faults = Faults(only)
    plan = GridPlan(grid, (out or grid.out).absolute(), only, [], [])
    tried = trials(grid, plan.out, faults)
    ended, rows = settled(tried)
    kept = [trial for trial in tried if plan.runs(trial.method) or trial in ended]
    plan = replace(plan, trials=kept, cells=_cells(plan, choose(ended, rows), faults))
    check_cells(plan.to_run, faults)
    if faults:
        raise faulty(str(path), faults.lines())
    return plan


def _cells(plan: GridPlan, chosen: Tuned, faults: Faults) -> list[Cell]:
    stand_in = first_candidates(plan.grid)
    known = {key for key, settings in stand_in.items() if not settings} | set(chosen)
    return [
        cell
        for cell in expand(plan.grid, plan.out, faults, tuned={**stand_in, **chosen})
        if plan.runs(cell.method) or ((cell.method, cell.problem) in known and finished(cell))
    ]

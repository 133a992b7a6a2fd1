"""The files of `fedsplit experiment`: results.csv, table.md and the figures, written anew as runs
finish.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsplit.experiment.cells import Cell
    from fedsplit.experiment.grid import Grid
    from fedsplit.experiment.results import Row

FIGURES_EVERY_S = 60.0
"""Drawing takes a second or two: it must not take more than the runs."""


@dataclass
class Book:
    """The rows so far, and the files that tell of them."""

    grid: Grid
    out: Path
    runs: int
    """How many there will be."""
    rows: list[tuple[Cell, Row]] = field(default_factory=list)
    order: dict[int, int] = field(default_factory=dict)
    tuned: list[str] = field(default_factory=list)
    search_s: float = 0.0
    _drawn: float = 0.0

    def add(self, cell: Cell, row: Row) -> None:
        """Note a run and write everything anew."""
        self.rows.append((cell, row))
        self.write(figures=time.monotonic() - self._drawn > FIGURES_EVERY_S)

    def sorted(self) -> list[Row]:
        """The rows in the grid's order."""
        return [row for _, row in sorted(self.rows, key=lambda pair: self.order[id(pair[0])])]

    def write(self, *, figures: bool) -> None:
        """results.csv, table.md and, where wanted, the figures."""
        from fedsplit.experiment.files import write_whole
        from fedsplit.experiment.results import write_csv
        from fedsplit.report.comparison import write_figures
        from fedsplit.report.comparison_table import comparison_table
        from fedsplit.report.ranking import write_ranking

        rows = self.sorted()
        if not rows:
            return
        methods = [m.name for m in self.grid.methods]
        write_csv(self.out / "results.csv", rows)
        text = comparison_table(
            rows,
            name=self.grid.experiment.name,
            description=self.grid.experiment.description,
            methods=methods,
            runs=self.runs,
            tuned=self.tuned,
            search_s=self.search_s,
        )
        write_whole(self.out / "table.md", text)
        if figures:
            write_figures(self.out, rows, methods=methods)
            write_ranking(self.out, rows, methods=methods)
            self._drawn = time.monotonic()

    def draw_labels(self, cells: list[Cell]) -> None:
        """How the labels fall to the sites, for the first seed."""
        from fedsplit.experiment.check import dealt
        from fedsplit.report.comparison import write_labels

        found: dict[str, dict[str, Any]] = {}
        for cell in cells:
            if cell.seed == self.grid.experiment.seeds[0]:
                name = f"{cell.config.task.partition}, {cell.config.server.sites} sites"
                counts = found.setdefault(cell.problem, {})
                if name not in counts:
                    counts[name] = dealt(cell.config)
        write_labels(self.out, found)

"""How far the product of averaged factors is from the average of the sites' products, round by round.

Averaging A and B each for itself makes mean(B) mean(A) of what should be mean(B A). This does the runs of a grid's plain
rows and tells, for each round, the Frobenius norm of the difference over that of mean(B A), all layers together:
`python -m experiments.lora_error`. Exact rules have 0 there; it is what they can remove.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
from rich.console import Console
from rich.progress import track

from fedsplit.core import lora_pairs, lora_rules
from fedsplit.core.aggregation import Tensors, Update
from fedsplit.core.errors import ConfigError, FedsplitError
from fedsplit.experiment.bench import Bench
from fedsplit.experiment.cells import Cell, Faults, expand
from fedsplit.experiment.grid import Grid, read_grid

GRID = Path(__file__).with_name("lora-aggregation.toml")
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One round of one run."""

    method: str
    partition: str
    seed: int
    round: int
    error: float
    """Of the module's product against the sites' mean product, as a share of the latter."""


def error_of(
    combined: Tensors, updates: Sequence[Update], received: Mapping[str, Tensors]
) -> float:
    """|BA - P| / |P| over all layers that sites trained, P the sample-weighted mean of their B A; 0 where P is 0."""
    missed = wanted = 0.0
    for layer in lora_pairs.layers(combined):
        halves = {layer + lora_pairs.LORA_A, layer + lora_pairs.LORA_B}
        trained = [u for u in updates if halves & u.delta.keys()]
        if not trained:
            continue
        pairs = [lora_pairs.pair_of(layer, u, received[u.site]) for u in trained]
        left_ok, right_ki = lora_pairs.stack(pairs)
        mean_oi = left_ok @ right_ki
        missed += float(np.sum((lora_pairs.product(combined, layer, scale=1.0) - mean_oi) ** 2))
        wanted += float(np.sum(mean_oi**2))
    return math.sqrt(missed / wanted) if wanted else 0.0


@contextmanager
def noting(errors: list[float]) -> Iterator[None]:
    """Every aggregation by a rule that does not write its own adds its error to the list."""
    aggregate = lora_rules.Rule.aggregate

    def noted(
        self: lora_rules.Rule,
        module: Tensors,
        updates: Sequence[Update],
        received: Mapping[str, Tensors],
        round_: int,
    ) -> lora_rules.Module:
        combined = aggregate(self, module, updates, received, round_)
        errors.append(error_of(combined, updates, received))
        return combined

    with mock.patch.object(lora_rules.Rule, "aggregate", noted):
        yield


def measure(bench: Bench, cell: Cell) -> list[Row]:
    """A row a round. Raises FedsplitError when the run does not end well."""
    errors: list[float] = []
    with noting(errors):
        done = bench.run(cell)
    if done.outcome != "complete":
        raise FedsplitError(f"{cell}: {done.reason}")
    return [
        Row(method=cell.method, partition=cell.column, seed=cell.seed, round=i, error=error)
        for i, error in enumerate(errors, 1)
    ]


def markdown(rows: Sequence[Row]) -> str:
    """A page with a line a run's kind and a column a round, mean and deviation over the seeds in %."""
    rounds = sorted({row.round for row in rows})
    lines = [
        "# What averaging the factors misses",
        "",
        "Written by `python -m experiments.lora_error`: |mean(B) mean(A) - mean(BA)| / |mean(BA)| in %, by",
        "round. Frobenius norms over all layers; mean and standard deviation over the seeds.",
        "",
        "| method | sites | " + " | ".join(map(str, rounds)) + " |",
        "|---|---|" + "---:|" * len(rounds),
    ]
    for method, partition in dict.fromkeys((row.method, row.partition) for row in rows):
        cells = []
        for round_ in rounds:
            found = [
                100 * row.error
                for row in rows
                if (row.method, row.partition, row.round) == (method, partition, round_)
            ]
            spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.1f}{spread}")
        lines.append(f"| {method} | {partition} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write(rows: Sequence[Row], folder: Path) -> None:
    """lora-error.csv and lora-error.md in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lora-error.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "partition", "seed", "round", "error"])
        writer.writerows([r.method, r.partition, r.seed, r.round, f"{r.error:.6f}"] for r in rows)
    (folder / "lora-error.md").write_text(markdown(rows), encoding="utf-8")


def plain_cells(grid: Grid, runs: Path) -> list[Cell]:
    """The grid's runs that average factor by factor. Raises ConfigError for a grid with faults."""
    faults = Faults()
    cells = expand(grid, runs, faults)
    if faults:
        raise ConfigError("\n  - ".join(["the grid has faults:", *faults.lines()]))
    return [cell for cell in cells if cell.config.module.lora_aggregation == "plain"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the runs one after the other. 1 when one does not end well."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.lora_error",
        description="How far mean(B) mean(A) is from mean(BA), by round, in the plain runs of a grid.",
    )
    parser.add_argument("--grid", type=Path, default=GRID)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the two tables")
    given = parser.parse_args(arguments)
    console, bench, rows = Console(stderr=True), Bench(), list[Row]()
    try:
        with tempfile.TemporaryDirectory(prefix="fedsplit-lora-error-") as folder:
            cells = plain_cells(read_grid(given.grid), Path(folder))
            for cell in track(cells, "plain runs", console=console):
                rows += measure(bench, cell)
    except FedsplitError as err:
        console.print(f"{err}", style="red", markup=False)
        return 1
    if not rows:
        parser.error(f"{given.grid} has no run with lora-aggregation=plain that trains LoRA")
    write(rows, given.out)
    console.print(markdown(rows), markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

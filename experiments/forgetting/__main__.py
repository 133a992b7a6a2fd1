"""Train, test, write: see the package's docstring."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.forgetting import table, tasks
from experiments.forgetting.chain import chain
from fedsplit.core.errors import FedsplitError
from fedsplit.experiment.bench import Bench

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.forgetting",
        description="What earlier tasks lose while later ones are trained on the same backbone.",
    )
    parser.add_argument("--backbone", default="", help="default: ViT-Tiny; vit-glyphs with --small")
    parser.add_argument(
        "--small", action="store_true", help="digits alone, few samples: no data needed"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sites", type=int, default=0, help="default: 20; 4 with --small")
    parser.add_argument("--rounds", type=int, default=0, help="default: 4; 2 with --small")
    parser.add_argument("--threads", type=int, default=0, help="threads for torch; 0: its choice")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the two tables")
    return parser


def _plan(given: argparse.Namespace) -> tasks.Plan:
    if given.small:
        backbone = given.backbone or "vit-glyphs"
        return tasks.Plan(
            backbone=backbone, sites=given.sites or 4, samples=120, rounds=given.rounds or 2
        )
    backbone = given.backbone or str(tasks.DATA / "vit-tiny")
    return tasks.Plan(backbone=backbone, sites=given.sites or 20, rounds=given.rounds or 4)


def main(arguments: Sequence[str] | None = None) -> int:
    """Both ways with every seed. 1 when a run did not end well; what was done before is kept."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.sites < 0 or given.sites == 1 or given.rounds < 0:
        parser.error("at least 2 sites and 1 round are wanted")
    if given.threads:
        torch.set_num_threads(given.threads)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="fedsplit-forgetting-") as folder:
        chosen = tasks.small(Path(folder)) if given.small else tasks.real()
        if chosen is None:
            parser.error(
                f"no cifar10.npz and deeppcb.npz in {tasks.DATA}; see experiments/README.md, or take --small"
            )
        try:
            rows = _measure(given, _plan(given), chosen, Path(folder), console)
        except FedsplitError as err:
            console.print(f"{err}", style="red", markup=False)
            return 1
    for path in table.write(rows, given.out):
        console.print(f"{path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _measure(
    given: argparse.Namespace,
    plan: tasks.Plan,
    chosen: list[tasks.Task],
    folder: Path,
    console: Console,
) -> list[table.Row]:
    bench = Bench()
    rows: list[table.Row] = []
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(given.seeds) * len(tasks.WAYS) * len(chosen))
        for seed in given.seeds:
            for way in tasks.WAYS:
                progress.update(bar, description=f"{way}, seed {seed}")
                for stage in chain(bench, plan, chosen, way=way, seed=seed, runs=folder / "runs"):
                    rows += stage
                    for row in stage:
                        progress.console.print(table.line(row), markup=False, highlight=False)
                    progress.advance(bar)
            table.write(rows, given.out)  # what is done is kept if the rest is not waited for
    return rows


if __name__ == "__main__":
    sys.exit(main())

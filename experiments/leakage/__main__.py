"""Measure, show, write: see the package's docstring."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from experiments.leakage import measure, scene, table

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.leakage",
        description="How much of labels and images can be read off what leaves a site.",
    )
    parser.add_argument("--scene", choices=("all", "digits", "cifar10"), default="all")
    parser.add_argument("--samples", type=int, default=512, help="the site's training samples")
    parser.add_argument("--epochs", type=int, default=2, help="the last one is attacked")
    parser.add_argument("--images", type=int, default=64, help="images to reconstruct")
    parser.add_argument("--public", type=int, default=1000, help="the attacker's own images")
    parser.add_argument("--threads", type=int, default=1, help="threads for torch")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the two tables")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every attack on every scene that is there."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.samples < 100 or not 1 <= given.images <= given.samples or given.epochs < 1:
        parser.error("at least 100 samples, 1 epoch, and between 1 and --samples images are wanted")
    torch.set_num_threads(given.threads)
    console = Console(stderr=True)
    scenes = []
    if given.scene != "cifar10":
        scenes.append(scene.digits(given.samples, given.public))
    if given.scene != "digits":
        real = scene.cifar10(given.samples, given.public)
        if real is not None:
            scenes.append(real)
        elif given.scene == "cifar10":
            parser.error(f"no cifar10.npz and vit-tiny in {scene.DATA}; see experiments/README.md")
        else:
            console.print("CIFAR-10 is left out: run experiments/prepare.py first", style="yellow")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    rows: list[table.Row] = []
    with Progress(*columns, console=console) as progress:
        for one in scenes:
            task = progress.add_task(one.name, total=None)
            for row in itertools.chain(
                measure.label_rows(one, epochs=given.epochs),
                measure.class_rows(one, epochs=given.epochs),
                measure.image_rows(one, images=given.images),
            ):
                rows.append(row)
                progress.console.print(table.line(row), markup=False, highlight=False)
            progress.update(task, total=1, completed=1)
            written = table.write(
                rows, given.out
            )  # what is done is kept if the rest is not waited for
    for path in written:
        console.print(f"{path}", markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Small grids: a tiny backbone, some digits, a run in a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsplit.experiment.cells import Cell, Faults, expand
from fedsplit.experiment.grid import Grid, parse_grid

Parse = Callable[..., Grid]

HEAD = """
[experiment]
name = "small"
seeds = {seeds}
[defaults]
backbone = "{backbone}"
data = "digits"
max-samples = 80
image-size = 16
batch-size = 16
rounds = 1
sites = 2
cut = "1,3"
classifier-init = "zero"
{defaults}
"""
METHODS = """
[[methods]]
name = "FedV"
method = "fedv"
[[methods]]
name = "Probe"
method = "linear-probe"
"""


@pytest.fixture
def text(tiny: dict[str, Path]) -> Callable[..., str]:
    """A grid's TOML: `rest` follows the head."""

    def make(rest: str = METHODS, *, seeds: Any = "[0]", defaults: str = "") -> str:
        return HEAD.format(seeds=seeds, backbone=tiny["vit"], defaults=defaults) + rest

    return make


@pytest.fixture
def parse(text: Callable[..., str]) -> Parse:
    """A small grid from the tables that follow its head."""

    def make(rest: str = METHODS, **head: Any) -> Grid:
        return parse_grid(text(rest, **head).encode(), where="small.toml")

    return make


def cells_of(grid: Grid, out: Path, **other: Any) -> list[Cell]:
    faults = Faults()
    cells = expand(grid, out, faults, **other)
    assert not faults, faults.lines()
    return cells

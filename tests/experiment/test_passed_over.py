"""What a method's table gives and the method does not take is a fault, also where it is the setting's default."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsplit.experiment.cells import Faults, expand
from tests.experiment.conftest import Parse


def faults(parse: Parse, tmp_path: Path, method: str) -> list[str]:
    grid = parse(f'[axes]\nsites = [2]\n[[methods]]\nname = "m"\n{method}')
    found = Faults()
    expand(grid, tmp_path, found)
    return found.lines()


@pytest.mark.parametrize(
    ("method", "part"),
    [
        ('method = "fedyolo"\ncut = "1,5"', "runs the whole model on the device; leave cut out"),
        ('method = "fedyolo"\ncut = "1,4"', "runs the whole model on the device; leave cut out"),
        ('method = "linear-probe"\nmodule = "lora"', "module=lora: method=linear-probe means"),
    ],
)
def test_it_is_said_once(parse: Parse, tmp_path: Path, method: str, part: str) -> None:
    (line,) = faults(parse, tmp_path, method)
    assert part in line


def test_what_the_method_takes_is_none(parse: Parse, tmp_path: Path) -> None:
    assert faults(parse, tmp_path, 'method = "fedyolo"\ncut = "6,6"') == []
    assert faults(parse, tmp_path, 'method = "linear-probe"\nmodule = "classifier"') == []
    assert faults(parse, tmp_path, 'method = "sfprompt"\ncut = "0,6"\nkeep-hardest = 1.0') == []


def test_a_draw_of_nobody_is_one_fault(parse: Parse, tmp_path: Path) -> None:
    (line,) = faults(parse, tmp_path, "participation = 0.1")
    assert "selects nobody" in line

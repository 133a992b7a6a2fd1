"""What is to be run of a grid, and what is only told of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsplit.core.errors import ConfigError
from fedsplit.experiment.plan import GridPlan, make_plan
from fedsplit.experiment.results import folder_of
from fedsplit.experiment.schedule import Schedule
from fedsplit.experiment.tuning import settled

TUNED = """
[[methods]]
name = "FedV"
method = "fedv"
[[methods]]
name = "Probe"
method = "linear-probe"
tune = { learning-rate = [0.01, 0.1] }
"""


@pytest.fixture
def grid(text: Callable[..., str], tmp_path: Path) -> Path:
    path = tmp_path / "grid.toml"
    path.write_text(text(TUNED), encoding="utf-8")
    return path


def plan_of(grid: Path, *only: str) -> GridPlan:
    return make_plan(grid, out=grid.parent / "out", only=only)


def names(plan: GridPlan) -> tuple[list[str], list[str]]:
    return [trial.method for trial in plan.trials], [cell.method for cell in plan.cells]


def test_other_methods_are_told_of_as_far_as_they_are_done(grid: Path) -> None:
    whole, fedv, probe = plan_of(grid), plan_of(grid, "FedV"), plan_of(grid, "Probe")
    assert names(whole) == (["Probe", "Probe"], ["FedV", "Probe"])
    assert names(fedv) == ([], ["FedV"])
    assert names(probe) == (["Probe", "Probe"], ["Probe"])
    assert len(whole.to_run) == 4
    with Schedule() as schedule:
        schedule.go([whole.trials[0].cell, whole.cells[0]], lambda *_: None)
        # Half a search says nothing: the first candidate's run is not taken for the best one's.
        schedule.go([whole.cells[1]], lambda *_: None)
        assert names(plan_of(grid, "FedV")) == ([], ["FedV"])
        assert names(plan_of(grid, "Probe")) == (["Probe", "Probe"], ["FedV", "Probe"])
        schedule.go([whole.trials[1].cell], lambda *_: None)
    assert len(settled(whole.trials)[0]) == 2
    ended = plan_of(grid, "FedV")
    assert [cell.method for cell in ended.to_run] == ["FedV"]
    assert len(ended.trials) == 2


def test_a_search_that_has_ended_settles_the_runs(grid: Path) -> None:
    plan = plan_of(grid)
    assert plan.cells[1].config.train.learning_rate == 0.01
    with Schedule() as schedule:
        schedule.go([trial.cell for trial in plan.trials], lambda *_: None)
    # A backbone this small learns nothing in a round, so the better candidate is made so by hand.
    summary = folder_of(plan.trials[1].cell) / "summary.json"
    told = json.loads(summary.read_text(encoding="utf-8")) | {"accuracy_global": 0.99}
    summary.write_text(json.dumps(told), encoding="utf-8")
    assert plan_of(grid).cells[1].config.train.learning_rate == 0.1


def test_only_the_faults_of_what_is_to_be_run_count(grid: Path) -> None:
    grid.write_text(grid.read_text().replace('method = "linear-probe"', "lora-rank = -3"))
    assert names(plan_of(grid, "FedV")) == ([], ["FedV"])
    with pytest.raises(ConfigError, match="lora-rank"):
        plan_of(grid)
    with pytest.raises(ConfigError, match=r"'Nobody' is no method of .*it has FedV, Probe"):
        plan_of(grid, "Nobody")

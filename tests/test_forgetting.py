"""experiments/forgetting: three small tasks in both ways, and what becomes of the rows."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.forgetting import chain as chains
from experiments.forgetting import table, tasks
from experiments.forgetting.__main__ import main
from experiments.forgetting.table import Row
from fedsplit.experiment.bench import Bench
from fedsplit.federation.server.books.run_dir import RunDir
from fedsplit.report.read import read_summary

PLAN = tasks.Plan(backbone="vit-glyphs", sites=3, samples=90, rounds=1, local_epochs=1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forgetting")


@pytest.fixture(scope="module")
def rows(runs: Path) -> list[Row]:
    chosen, bench = tasks.small(runs), Bench()
    return [
        row
        for way in tasks.WAYS
        for stage in chains.chain(bench, PLAN, chosen, way=way, seed=0, runs=runs)
        for row in stage
    ]


def test_every_task_so_far_is_tested_after_each(rows: list[Row]) -> None:
    names = ["digits-0-3", "digits-4-6", "digits-7-9"]
    wanted = [(a, b) for i, a in enumerate(names) for b in names[: i + 1]]
    for way in tasks.WAYS:
        assert [(r.trained, r.task) for r in rows if r.way == way] == wanted


def test_a_module_a_task_forgets_nothing(rows: list[Row]) -> None:
    drops = [f.drop for f in table.forgotten(rows) if f.way == "fedyolo"]
    assert drops == [0.0, 0.0]


def test_full_fine_tuning_forgets(rows: list[Row]) -> None:
    found = [f for f in table.forgotten(rows) if f.way == "full"]
    assert len(found) == 2
    assert all(f.drop >= 0 for f in found)


@pytest.mark.parametrize("way", tasks.WAYS)
def test_right_after_its_training_a_task_is_as_good_as_its_run_says(
    rows: list[Row], runs: Path, way: str
) -> None:
    for row in (r for r in rows if r.way == way and r.trained == r.task):
        summary = read_summary(runs / f"{way}-0-{row.task}")
        assert row.accuracy == pytest.approx(summary.accuracy_global)
        assert row.accuracy > 0.5


def test_full_fine_tuning_goes_on_from_the_task_before(rows: list[Row], runs: Path) -> None:
    del rows  # the runs are there
    config = RunDir(runs / "full-0-digits-4-6").read_config()["config"]
    assert config["start-module"] == str(runs / "full-0-digits-0-3" / "module")


def test_what_a_round_moves(rows: list[Row]) -> None:
    module, full = (next(r for r in rows if r.way == way) for way in tasks.WAYS)
    assert table.factor(module) > 10
    # The test at the end takes the module once more, and one round is all there is.
    assert 0.6 < table.factor(full) < 1
    assert module.bytes_round_full_model == pytest.approx(full.bytes_round_full_model, rel=0.01)


def test_rows_become_tables(tmp_path: Path) -> None:
    one = Row(
        way="full", seed=0, trained="a", task="a", accuracy=0.9,
        bytes_round=2_000_000, bytes_round_full_model=40_000_000,
    )  # fmt: skip
    rows = [
        one,
        replace(one, trained="b", accuracy=0.4),
        replace(one, trained="b", task="b", accuracy=0.8),
    ]
    again = [replace(row, seed=1, accuracy=row.accuracy / 2) for row in rows]
    paths = table.write(rows + again, tmp_path)
    with paths[0].open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [float(r["accuracy"]) for r in read] == [0.9, 0.4, 0.8, 0.45, 0.2, 0.4]
    page = paths[1].read_text(encoding="utf-8")
    assert "| a | 67.5% (45.0 to 90.0) | 30.0% (20.0 to 40.0) | 37.5 (25.0 to 50.0) |" in page
    assert "| b | 60.0% (40.0 to 80.0) |" in page
    assert "| a | 2 | 40 | 20 |" in page


@pytest.mark.parametrize("words", [["--sites", "1"], ["--rounds", "-1"]])
def test_a_bad_command_line(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2


def test_real_tasks_want_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "DATA", tmp_path)
    assert tasks.real() is None
    with pytest.raises(SystemExit):
        main([])

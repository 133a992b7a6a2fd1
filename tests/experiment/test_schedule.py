"""Runs of a grid as they are done: once, again only where needed, in processes, and past the ones that fail."""

from __future__ import annotations

import csv
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsplit.core.orders import Stream
from fedsplit.experiment import near_encoder, schedule
from fedsplit.experiment.bench import Bench
from fedsplit.experiment.cells import Cell, Way
from fedsplit.experiment.near_encoder import NearEncoder, NearHost
from fedsplit.experiment.results import Row, finished, folder_of, row_of, write_csv
from fedsplit.experiment.schedule import Schedule
from tests.experiment.conftest import METHODS, Parse, cells_of

Done = list[tuple[Cell, Row, bool]]


def go(cells: list[Cell], *, jobs: int = 1) -> Done:
    done: Done = []
    with Schedule(jobs=jobs) as runs:
        runs.go(cells, lambda *what: done.append(what))
    return done


def test_a_grid_runs_once_and_is_read_then(parse: Parse, tmp_path: Path) -> None:
    cells = cells_of(parse(), tmp_path)
    done = go(cells)
    assert [cell for cell, _, _ in done] == cells
    assert [row.outcome for _, row, _ in done] == ["complete"] * 2
    assert not any(before for _, _, before in done)
    row = done[0][1]
    assert row.run == "FedV-seed0"
    assert row.accuracy_global is not None
    assert row.accuracy_personal is not None
    assert len(row.accuracy_by_round) == len(row.bytes_by_round) == 2
    assert 0 == row.bytes_by_round[0] < row.bytes_by_round[1]
    assert row.bytes_activation_up > row.bytes_module_up > 0
    assert row.seconds > 0
    assert row.peak_rss_bytes > 10**7
    stamps = [(folder_of(cell) / "summary.json").stat().st_mtime_ns for cell in cells]
    again = go(cells)
    assert [row for _, row, _ in again] == [row for _, row, _ in done]
    assert all(before for _, _, before in again)
    assert stamps == [(folder_of(cell) / "summary.json").stat().st_mtime_ns for cell in cells]


def test_what_is_not_whole_or_not_the_same_is_done_again(parse: Parse, tmp_path: Path) -> None:
    (cell,) = cells_of(
        parse(METHODS.split("[[methods]]\n", 2)[1].join(["[[methods]]\n", ""])), tmp_path
    )
    go([cell])
    (other,) = cells_of(
        parse("[[methods]]\nname='FedV'\nmethod='fedv'\n", defaults="weight-decay = 0.5"), tmp_path
    )
    assert cell.run == other.run
    assert finished(cell) is not None
    assert finished(other) is None
    [(_, _, before)] = go([other])
    assert not before
    assert finished(cell) is None
    summary = folder_of(other) / "summary.json"
    record = json.loads(summary.read_text())
    for damaged in (b"", b"{", json.dumps(record | {"outcome": "partial"}).encode()):
        summary.write_bytes(damaged)
        assert finished(other) is None
    summary.write_text(json.dumps(record))
    assert finished(other) is not None
    (folder_of(other) / "cell.json").write_text("[]")
    assert finished(other) is None


def test_a_run_that_fails_is_told_and_the_rest_go_on(parse: Parse, tmp_path: Path) -> None:
    grid = parse(
        """
        [[methods]]
        name = "explodes"
        method = "linear-probe"
        learning-rate = 1e38
        optimizer = "sgd"
        local-epochs = 3
        [[methods]]
        name = "good"
        method = "linear-probe"
        """
    )
    done = go(cells_of(grid, tmp_path))
    assert [row.outcome for _, row, _ in done] == ["failed", "complete"]
    assert "lower learning-rate" in done[0][1].reason
    again = go(cells_of(grid, tmp_path))
    assert [before for _, _, before in again] == [
        True,
        False,
    ]  # the good one is told first: it is there
    assert again[0][0].method == "good"


def test_a_bug_in_one_run_is_its_own(
    parse: Parse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsplit.experiment import bench

    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(bench, "Run", broken)
    row = Bench().run(cells_of(parse(), tmp_path)[0])
    assert (row.outcome, row.reason) == ("failed", "internal error: ZeroDivisionError: a bug")


def test_equal_settings_share_a_run(parse: Parse, tmp_path: Path) -> None:
    grid = parse(
        """
        [axes]
        rounds = [1, 2]
        [[methods]]
        name = "a"
        method = "linear-probe"
        rounds = 1
        """
    )
    done = go(cells_of(grid, tmp_path))
    assert [row.axes for _, row, _ in done] == [(("rounds", 1),), (("rounds", 2),)]
    assert len({row.run for _, row, _ in done}) == 1
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_near_and_grpc_give_the_same_row(parse: Parse, tmp_path: Path) -> None:
    [(_, near, _)] = go(cells_of(parse(), tmp_path / "near")[:1])
    [(_, far, _)] = go(cells_of(parse(seeds='[0]\nwire = "grpc"'), tmp_path / "grpc")[:1])
    assert near.accuracy_by_round == far.accuracy_by_round
    assert near.bytes_activation_up == far.bytes_activation_up
    # A welcome names its session in decimal: a few bytes more or less, six sessions.
    assert abs(near.bytes_activation_down - far.bytes_activation_down) < 20
    assert near.bytes_module_up == far.bytes_module_up


def test_sites_may_work_at_once(parse: Parse, tmp_path: Path) -> None:
    [(_, one, _)] = go(cells_of(parse(), tmp_path / "one")[:1])
    [(_, two, _)] = go(
        cells_of(parse(seeds='[0]\nwire = "grpc"\nsites-at-once = 2'), tmp_path / "two")[:1]
    )
    assert two.outcome == "complete"
    assert two.accuracy_by_round == one.accuracy_by_round


def test_turns_change_nothing_without_a_shared_encoder(parse: Parse, tmp_path: Path) -> None:
    alone = cells_of(parse(), tmp_path / "one")[0]
    asked = cells_of(parse(seeds="[0]\nsites-at-once = 2"), tmp_path / "one")[0]
    # So a grid that has shared encoders go by turns does not redo its other runs.
    assert asked.way == Way()
    assert asked.key == alone.key
    turns = replace(cells_of(parse(), tmp_path / "turns")[0], way=Way(sites_at_once=2))
    one, two = Bench().run(alone), Bench().run(turns)
    assert two.outcome == "complete"
    assert two.accuracy_by_round == one.accuracy_by_round
    assert two.bytes_activation_up == one.bytes_activation_up


SHARED = """
[[methods]]
name = "shared"
method = "fedv"
encoder-training = "shared"
sites = 3
rounds = 2
batch-size = 4
lora-learning-rate = 0.05
"""


def test_turns_on_a_shared_encoder_go_round_and_repeat(
    parse: Parse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    class Noting(NearEncoder):
        def __init__(self, near: NearHost, how: Stream, *args: Any) -> None:
            super().__init__(near, how, *args)
            self.site = how.grant.site

        def settle(self, step: int, answer: Any, *, quiet: bool = False) -> Any:
            order.append(self.site)
            return super().settle(step, answer, quiet=quiet)

    def cell_of(name: str, at_once: int) -> Cell:
        grid = parse(SHARED, seeds=f"[0]\nsites-at-once = {at_once}")
        (cell,) = cells_of(grid, tmp_path / name)
        return cell

    def module_of(name: str, at_once: int) -> bytes:
        order.clear()
        cell = cell_of(name, at_once)
        assert Bench().run(cell).outcome == "complete"
        (weights,) = (folder_of(cell) / "module").rglob("adapter_model.safetensors")
        return weights.read_bytes()

    monkeypatch.setattr(near_encoder, "NearEncoder", Noting)
    one = module_of("one", 1)
    assert order[:2] == ["site-0", "site-0"]
    three = module_of("three", 3)
    assert order[:6] == ["site-0", "site-1", "site-2"] * 2
    assert three != one
    # In one folder, each would be done anew for the other.
    assert cell_of("one", 1).key != cell_of("one", 3).key
    assert module_of("again", 3) == three


def test_frozen_answers_are_shared_between_runs(parse: Parse, tmp_path: Path) -> None:
    bench = Bench()
    cells = cells_of(parse(), tmp_path)
    bench.run(cells[0])
    assert bench.memo.misses == 80  # each sample once, in whatever batch and round
    before = bench.memo.hits
    bench.run(cells[1])
    assert bench.memo.misses == 80
    assert bench.memo.hits > before


@pytest.mark.slow
def test_processes_share_the_work_and_one_that_dies_fails_its_run_alone(
    parse: Parse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = cells_of(parse(seeds="[0, 1]"), tmp_path)
    give = schedule._Worker.give
    started: list[int] = []

    def murderous(worker: schedule._Worker, cell: Cell) -> bool:
        assert worker.process.pid is not None
        if not started:
            os.kill(worker.process.pid, signal.SIGKILL)
        started.append(worker.process.pid)
        return give(worker, cell)

    monkeypatch.setattr(schedule._Worker, "give", murderous)
    done = go(cells, jobs=2)
    outcomes = {cell.run: row for cell, row, _ in done}
    assert len(outcomes) == 4
    failed = [row for row in outcomes.values() if row.outcome == "failed"]
    # Killed before it got its cell, the cell goes to the next; killed over it, the cell fails.
    assert len(failed) <= 1
    assert all("signal 9" in row.reason for row in failed)
    assert len(set(started)) == 3
    for pid in set(started):
        with pytest.raises(OSError, match="No such process"):
            os.kill(pid, 0)
    alone = Bench().run(cells[-1])
    assert outcomes[cells[-1].run].accuracy_by_round == alone.accuracy_by_round


def test_results_csv(parse: Parse, tmp_path: Path) -> None:
    cells = cells_of(parse('[axes]\npartition = ["iid"]\nsites = [2]\n' + METHODS), tmp_path)
    rows = [row for _, row, _ in go(cells[:1])]
    failed = rows[0].model_copy(
        update={"outcome": "failed", "accuracy_global": None, "reason": 'a, "b"\n'}
    )
    write_csv(tmp_path / "results.csv", [*rows, failed])
    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert first["partition"] == "iid"
    assert first["sites"] == "2"
    assert float(first["accuracy_global"]) == rows[0].accuracy_global
    assert int(first["bytes_activation_up"]) == rows[0].bytes_activation_up
    assert second["accuracy_global"] == ""
    assert second["reason"] == 'a, "b"\n'
    assert row_of(cells[0]) == rows[0]
    assert list(tmp_path.glob(".*.part")) == []

"""How a run of several tasks is followed, shown and judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from fedsplit.cli.console import Output
from fedsplit.cli.execute import summary_in_log, tasks_in_log
from fedsplit.cli.follow import Progress, RunFiles
from fedsplit.cli.run import finish_tasks
from fedsplit.core.records import Status, Summary, TasksSummary
from fedsplit.report import read_tasks
from tests.report import samples

LINES = samples.metrics(sites=2, rounds=2)


def summary(task: str, **changes: object) -> Summary:
    return samples.summary(LINES, run=f"two/{task}", task=task, **changes)


FAILED = {
    "outcome": "failed",
    "reason": "round 1 got 1 useful update",
    "rounds_done": 0,
    "sites": (),
}


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({}, 0, "Run two/shapes is complete"),
        ({"left_out": samples.LOST}, 3, "Run two: 1 of 2 tasks are complete"),
        (FAILED, 1, "Run two/shapes failed after 0 of 2 rounds: round 1 got 1 useful update"),
    ],
)
def test_the_worst_task_decides(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    code: int,
    words: str,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    # Drawn already, for drawing takes seconds and is tested elsewhere.
    for task in ("digits", "shapes"):
        folder = tmp_path / task
        folder.mkdir()
        for name in ("accuracy.png", "accuracy.svg", "traffic.png", "traffic.svg"):
            (folder / name).touch()
    ended = TasksSummary(run="two", tasks=(summary("digits"), summary("shapes", **changes)))
    assert finish_tasks(ended, tmp_path, Output(as_json=True)) == code
    told = capsys.readouterr()
    record = json.loads(told.out)
    assert [task["task"] for task in record["tasks"]] == ["digits", "shapes"]
    assert record["exit_code"] == code
    assert record["tasks"][0]["exit_code"] == 0
    assert len(record["tasks"][0]["plots"]) == 4
    assert ("error" in record) == (code == 1)
    shown = " ".join(told.err.split())
    assert words in shown
    assert "All tasks" in shown
    assert "Run two/digits is complete" in shown


def test_outcome_and_reason_of_the_whole() -> None:
    good, lost, failed = summary("a"), summary("b", outcome="partial", reason="lost"), FAILED
    assert TasksSummary(run="r", tasks=(good, good)).outcome == "complete"
    assert TasksSummary(run="r", tasks=(good, lost)).outcome == "partial"
    whole = TasksSummary(run="r", tasks=(good, lost, summary("c", **failed)))
    assert whole.outcome == "failed"
    assert whole.reason == "b: lost; c: round 1 got 1 useful update"
    assert TasksSummary(run="r", tasks=()).outcome == "failed"


def test_the_run_is_over_with_its_tasks_and_not_with_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(status: Status) -> None:
        (tmp_path / "status.json").write_text(status.model_dump_json())

    files, progress = RunFiles(tmp_path), Progress(Console(width=100))
    going = Status(phase="training", round=2, rounds=2, sites=("a",), replied=(), task="digits")
    for status in (going, going, going.model_copy(update={"task": "shapes"})):
        write(status)
        progress.show(files.snapshot())
    assert capsys.readouterr().out.splitlines() == [
        "digits: round 2 of 2",
        "shapes: round 2 of 2",
    ]
    write(Status(phase="done", round=2, rounds=2, sites=("a",), replied=()))
    assert not files.snapshot().over
    ended = TasksSummary(run="two", tasks=(summary("digits"),))
    (tmp_path / "tasks.json").write_text(ended.model_dump_json())
    assert files.snapshot().over
    assert read_tasks(tmp_path) == ended


def test_the_tasks_are_found_in_the_log_of_a_run_elsewhere() -> None:
    ended = TasksSummary(run="two", tasks=(summary("digits"), summary("shapes")))
    log = "".join(f"INFO: FEDSPLIT_SUMMARY {t.model_dump_json()}\n" for t in ended.tasks)
    assert tasks_in_log(log) is None
    log += f"INFO: FEDSPLIT_TASKS {ended.model_dump_json()}\nbye\n"
    assert tasks_in_log(log) == ended
    assert summary_in_log(log) == ended.tasks[-1]

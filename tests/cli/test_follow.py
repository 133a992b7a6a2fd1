"""The follower against run folders that a script writes, whole, half and damaged."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from fedsplit.cli.execute import error_in_log, summary_in_log
from fedsplit.cli.follow import Progress, RunFiles, Snapshot, follow
from fedsplit.core.records import RoundMetrics, Status
from fedsplit.core.scores import Tally
from tests.report import samples

SITES = ("halle", "werk-2")


def status(run_dir: Path, phase: str, number: int, replied: int) -> None:
    """Rewrite status.json as the app does."""
    record = Status.model_validate(
        {"phase": phase, "round": number, "rounds": 2, "sites": SITES, "replied": SITES[:replied]}
    )
    (run_dir / "status.tmp").write_text(record.model_dump_json())
    (run_dir / "status.tmp").replace(run_dir / "status.json")


def line(number: int, site: str, right: int) -> str:
    """A line of metrics.jsonl."""
    return RoundMetrics(
        round=number, site=site, cut="1,5", codec="fp32", samples=10, test_samples=10, correct_global=right,
        correct_personal=None, loss=None, bytes_activation_up=0, bytes_activation_down=0, bytes_module_up=0,
        bytes_module_down=0, steps=1, seconds_device=0, seconds_wait=0, peak_rss_bytes=1,
    ).model_dump_json() + "\n"  # fmt: skip


def test_snapshots_of_a_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    files = RunFiles(run_dir)
    assert files.snapshot() == Snapshot(None, (), False)
    run_dir.mkdir()
    status(run_dir, "training", 1, 1)
    (run_dir / "metrics.jsonl").write_text(line(1, "halle", 4) + '{"round": 1, "si')
    seen = files.snapshot()
    assert (seen.done, seen.total) == (1, 6)
    assert seen.tested() == (0, Tally(sums={"correct": 4}, samples=10), 1)
    (run_dir / "metrics.jsonl").write_text(
        line(1, "halle", 4) + line(1, "werk-2", 6) + line(2, "halle", 9)
    )
    status(run_dir, "training", 2, 1)
    seen = files.snapshot()
    assert seen.done == 3
    assert seen.tested() == (1, Tally(sums={"correct": 9}, samples=10), 1)
    assert not seen.over


def test_damaged_file_keeps_the_last_good_content(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    status(tmp_path, "training", 1, 2)
    assert files.snapshot().done == 2
    (tmp_path / "status.json").write_text("{")
    assert files.snapshot().done == 2
    status(tmp_path, "training", 2, 2)
    assert files.snapshot().done == 4


def test_files_of_the_run_before_do_not_count(tmp_path: Path) -> None:
    status(tmp_path, "done", 2, 0)
    (tmp_path / "summary.json").write_text("{}")
    files = RunFiles(tmp_path)
    assert files.snapshot() == Snapshot(None, (), False)
    status(tmp_path, "training", 2, 0)
    assert not files.snapshot().over


def test_follow_shows_rounds_and_ends_with_flowers_word(tmp_path: Path) -> None:
    script = [
        lambda: status(tmp_path, "waiting", 0, 0),
        lambda: status(tmp_path, "training", 1, 1),
        lambda: (tmp_path / "metrics.jsonl").write_text(line(1, "halle", 5)),
        lambda: status(tmp_path, "training", 2, 0),
        lambda: status(tmp_path, "evaluating", 3, 2),
        lambda: (tmp_path / "summary.json").write_text("{}"),
        lambda: status(tmp_path, "done", 2, 0),
    ]

    def finished(_: Snapshot) -> bool:
        if script:
            script.pop(0)()
        return not script

    shown = io.StringIO()
    with Progress(Console(file=shown, width=200)) as progress:
        snapshot = follow(RunFiles(tmp_path), progress, finished=finished)
    assert snapshot.over
    assert snapshot.done == snapshot.total == 6
    text = shown.getvalue()
    for part in (
        "round 1 of 2",
        "round 2 of 2; accuracy before training: 50.0 % (10 test samples, 1 site)",
        "done",
    ):
        assert part in text


def test_follow_does_not_wait_for_ever_after_the_end(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    status(tmp_path, "done", 2, 0)
    with Progress(Console(file=io.StringIO())) as progress:
        assert follow(files, progress, finished=lambda _: False, linger_s=0.3).over


def test_progress_on_a_terminal_names_round_and_accuracy(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    status(tmp_path, "training", 2, 1)
    (tmp_path / "metrics.jsonl").write_text(line(2, "halle", 7))
    shown = io.StringIO()
    with Progress(Console(file=shown, width=200, force_terminal=True)) as progress:
        progress.show(files.snapshot())
    assert "round 2 of 2" in shown.getvalue()
    assert "70.0 %" in shown.getvalue()


def test_a_classifier_of_zeros_has_no_accuracy(tmp_path: Path) -> None:
    """The same word as in the tables; after a round there is one."""
    files, shown = RunFiles(tmp_path), io.StringIO()
    progress = Progress(Console(file=shown, width=200), untrained=True)
    for number in (1, 2):
        (tmp_path / "metrics.jsonl").write_text(line(number, "halle", 5))
        status(tmp_path, "training", number, 1)
        progress.show(files.snapshot())
    assert shown.getvalue().splitlines() == [
        "round 1 of 2; accuracy before training: untrained",
        "round 2 of 2; accuracy after 1 round: 50.0 % (10 test samples, 1 site)",
    ]


LOG = """\x1b[92mINFO \x1b[0m: Starting
Traceback (most recent call last):
  File "x.py", line 1, in main
fedsplit.core.errors.ConfigError: the run's settings have faults:
  - cut: too deep
  - rounds: none
\x1b[91mERROR \x1b[0m:     Exit Code: 700
"""


def test_typed_error_is_found_in_the_log() -> None:
    assert error_in_log(LOG) == (
        "ConfigError",
        "the run's settings have faults:\n  - cut: too deep\n  - rounds: none",
    )


def test_a_machine_too_busy_for_ray_is_told() -> None:
    """Ray gives itself 15 and 30 s and says so in the midst of a long log."""
    log = LOG.replace(
        "fedsplit.core.errors.ConfigError",
        "Exception: The current node timed out during startup. This could happen because",
    )
    kind, message = error_in_log(log)
    assert kind == "FederationError"
    assert message.startswith("Ray, which runs the simulated sites")


def test_last_lines_stand_in_for_an_untyped_error() -> None:
    kind, message = error_in_log(
        LOG.replace("fedsplit.core.errors.ConfigError", "ValueError"), lines=3
    )
    assert kind == ""
    assert message.splitlines()[0].startswith("ValueError: the run's settings")
    assert error_in_log("") == ("", "The run's log is empty.")


def test_summary_is_found_in_the_log_of_a_run_elsewhere() -> None:
    record = samples.summary(samples.metrics())
    log = f"{LOG}\x1b[92mINFO \x1b[0m:      FEDSPLIT_SUMMARY {record.model_dump_json()}\nlater\n"
    assert summary_in_log(log) == record
    assert summary_in_log(LOG) is None
    assert summary_in_log("FEDSPLIT_SUMMARY {\n") is None

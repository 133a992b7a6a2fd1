"""`fedsplit run` through a real SuperLink, Ray and all, with an app that trains nothing: start to clean end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

import psutil
import pytest

from .conftest import COMMAND, Cli

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
MARK = "FEDSPLIT_TEST_MARK"


@pytest.fixture
def mark(environment: dict[str, str], tmp_path: Path) -> str:
    """A word in the environment of everything the command starts, and a temporary folder for it alone."""
    environment[MARK] = uuid.uuid4().hex
    # Not below pytest's own folder: Ray's socket paths would not fit.
    folder = tempfile.mkdtemp(prefix="ft-")
    environment["TMPDIR"] = folder
    return environment[MARK]


def left_over(mark: str) -> list[str]:
    """The command lines of processes that carry the mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                found.append(" ".join(process.cmdline()))
    return found


def assert_clean(mark: str, environment: dict[str, str]) -> None:
    """No process and no temporary file is left."""
    assert left_over(mark) == []
    folder = Path(environment["TMPDIR"])
    # torch makes a folder for what it compiles, and keeps it.
    assert [p for p in folder.iterdir() if not p.name.startswith("torchinductor_")] == []
    shutil.rmtree(folder)


def test_partial_run(cli: Cli, echo_app: Path, mark: str, environment: dict[str, str]) -> None:
    done = cli(
        "run",
        "--app",
        str(echo_app),
        "--set",
        "task=lost",
        "--set",
        "rounds=2",
        "--json",
        timeout_s=200,
    )
    assert done.returncode == 3, done.stderr
    record = json.loads(done.stdout)
    assert record["outcome"] == "partial"
    assert record["left_out"][0]["site"] == "site-1"
    assert "Left out: site-1." in done.stderr
    assert "done; accuracy after 2 rounds: 60.0 % (80 test samples, 4 sites)" in done.stderr
    run_dir = Path(record["run_dir"])
    assert {p.name for p in run_dir.glob("*.png")} == {"accuracy.png", "traffic.png"}
    assert len(record["sites"]) == 4
    assert_clean(mark, environment)


def test_failure_in_the_app_is_told(
    cli: Cli, echo_app: Path, mark: str, environment: dict[str, str]
) -> None:
    done = cli("run", "--app", str(echo_app), "--set", "task=boom", "--json", timeout_s=200)
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"] == {
        "kind": "FederationError",
        "message": "4 sites wanted, got 1:\n  - start more sites\n  - or lower min-sites",
    }
    assert "Traceback" not in done.stderr
    assert_clean(mark, environment)


def test_stopping_in_a_round(
    echo_app: Path, tmp_path: Path, mark: str, environment: dict[str, str]
) -> None:
    """SIGINT to the command alone; for a terminal's Ctrl-C and SIGTERM see tests/system/test_stopped_runs.py."""
    command = [
        *COMMAND,
        "run",
        "--app",
        str(echo_app),
        "--set",
        "task=slow",
        "--set",
        "rounds=500",
        "--json",
    ]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("runs/*/metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    record = json.loads(out)
    assert record["error"]["kind"] == "Interrupted"
    assert str(tmp_path / "runs") in record["error"]["message"]
    assert_clean(mark, environment)


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_nothing_outlives_the_command_that_is_killed(
    echo_app: Path, tmp_path: Path, mark: str, environment: dict[str, str]
) -> None:
    """SIGKILL: nothing of the command's own can clean up."""
    sets = ["--set", "task=slow", "--set", "rounds=500"]
    with subprocess.Popen(
        [*COMMAND, "run", "--app", str(echo_app), *sets], cwd=tmp_path, env=environment
    ) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("runs/*/metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.2)
        process.kill()
    deadline = time.monotonic() + 30
    while left_over(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert_clean(mark, environment)


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_stopping_before_the_run(
    echo_app: Path, tmp_path: Path, mark: str, environment: dict[str, str]
) -> None:
    command = [*COMMAND, "run", "--app", str(echo_app), "--json"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert any("starting Flower" in process.stderr.readline() for _ in range(2))
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (
        json.loads(out)["error"]["message"] == "stopped before the run began; nothing was written"
    )
    assert_clean(mark, environment)

"""Runs that a full disk, Ctrl-C, SIGTERM or an error ends: no orphan, nothing half-written, and a way to go on.

Real Flower processes are started where only they can show it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedsplit.cli.execute import error_in_log
from fedsplit.core.errors import RunDirError
from fedsplit.core.records import RoundMetrics
from fedsplit.federation.server.books.run_dir import RunDir
from tests.federation.conftest import simulated
from tests.small_disk import small_disk
from tests.system.conftest import (
    BASE,
    assert_nothing_half_written,
    assert_one_screen,
    one_object,
    run_once,
)
from tests.system.flower import BIN

# The disk.


@pytest.fixture(name="small_disk")
def a_small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MB."""
    with small_disk(tmp_path / "disk", "size=2m") as where:
        yield where


def test_disk_fills_up_in_a_run(
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flat = BASE | {"runs-dir": str(small_disk), "rounds": 3}
    ballast = small_disk / "ballast"
    save = RunDir.save_checkpoint

    def save_and_fill(self: RunDir, checkpoint: Any) -> None:
        save(self, checkpoint)
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(b"x" * 65536):
                pass

    monkeypatch.setattr(RunDir, "save_checkpoint", save_and_fill)
    with pytest.raises(RunDirError) as caught:
        run_once(flat, simulated(2))
    monkeypatch.undo()
    message = str(caught.value)
    for words in (str(small_disk / "run"), "No space left on device", "resume=run", "runs-dir"):
        assert words in message
    assert_one_screen(message)
    assert error_in_log("".join(traceback.format_exception(caught.value))) == (
        "RunDirError",
        message,
    )
    assert_nothing_half_written(small_disk)
    kept = RunDir(small_disk / "run").last_checkpoint()
    assert kept.round == 1
    assert kept.module
    # With room again the run goes on from there.
    ballast.unlink()
    summary = run_once(flat | {"resume": "run", "run-name": ""}, simulated(2))
    assert summary.rounds_done == 3
    assert (small_disk / "run" / "module" / "adapter_model.safetensors").is_file()


def test_runs_dir_that_cannot_be_written(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = fails(runs_dir=str(tmp_path / "file"))
    assert f"run directory {tmp_path / 'file' / 'run'} cannot be written" in message
    assert "set runs-dir" in message


# Real processes: what is left when a run is stopped.

ENDLESS = 10_000
"""Rounds of a run that no machine, however fast, is done with before the signal comes."""


@contextlib.contextmanager
def marked() -> Iterator[tuple[dict[str, str], Callable[[], list[str]]]]:
    """An environment that all descendants inherit, and what is left of them: processes and temporary files."""
    mark = uuid.uuid4().hex
    # Not below pytest's own folder: Ray's socket paths would not fit.
    temporary = Path(tempfile.mkdtemp(prefix="ft-"))
    env = dict(os.environ) | {
        "FEDSPLIT_TEST_MARK": mark, "COLUMNS": "100", "TMPDIR": str(temporary),
    }  # fmt: skip

    def alive() -> list[str]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = process.environ().get("FEDSPLIT_TEST_MARK") == mark
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
        return found

    def left() -> list[str]:
        # torch makes a folder for what it compiles, and keeps it.
        files = [p.name for p in temporary.iterdir() if not p.name.startswith("torchinductor_")]
        return alive() + files

    try:
        yield env, left
    finally:
        for entry in alive():
            with contextlib.suppress(psutil.Error):
                psutil.Process(int(entry.split()[0])).kill()
        shutil.rmtree(temporary, ignore_errors=True)


def start(env: dict[str, str], cwd: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(BIN / "fedsplit"), *args], env=env, cwd=cwd, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen[str], timeout_s: float = 200.0) -> None:
    end = time.monotonic() + timeout_s
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{path} did not come within {timeout_s:g} s"
        time.sleep(0.05)


def assert_whole(folder: Path) -> int:
    """The run's folder can be read; its last round."""
    assert_nothing_half_written(folder)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        RoundMetrics.model_validate_json(line)
    json.loads((folder / "config.json").read_text())
    json.loads((folder / "status.json").read_text())
    return RunDir(folder).last_checkpoint().round


def shorten(path: Path, rounds: int) -> None:
    """The run's own settings with a round count that can be waited for."""
    saved = json.loads(path.read_text())
    saved["config"]["rounds"] = rounds
    path.write_text(json.dumps(saved))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_then_sigterm_then_the_run_completes(tmp_path: Path) -> None:
    settings = {
        "rounds": ENDLESS,
        "sites": 2,
        "max-samples": 60,
        "run-name": "stopped",
        "partition": "iid",
    }
    sets = [arg for k, v in settings.items() for arg in ("--set", f"{k}={v}")]
    folder = tmp_path / "runs" / "stopped"
    rounds = []
    with marked() as (env, left):
        for number, args, kind, code in (
            (signal.SIGINT, ["run", *sets], "Interrupted", 130),
            (signal.SIGTERM, ["run", "--resume", "stopped"], "Terminated", 143),
        ):
            process = start(env, tmp_path, *args, "--json")
            wait_for(folder / "checkpoints" / f"round-{max(rounds, default=0) + 2:05d}", process)
            if number is signal.SIGINT:
                os.killpg(process.pid, number)  # as a terminal does it
            else:
                process.send_signal(number)
            out, err = process.communicate(timeout=60)
            assert process.returncode == code
            error = one_object(out)["error"]
            assert error["kind"] == kind
            assert "fedsplit run --resume stopped" in error["message"]
            assert str(tmp_path / "runs") in error["message"]
            assert "Traceback" not in err
            assert left() == []
            rounds.append(assert_whole(folder))
            if (folder / "summary.json").exists():
                # Where the app outlived its sites for a moment it could still say so.
                assert json.loads((folder / "summary.json").read_text())["outcome"] == "failed"
        assert 2 <= rounds[0] < rounds[1] < ENDLESS
        last = rounds[1] + 2
        shorten(folder / "config.json", last)
        done = start(env, tmp_path, "run", "--resume", "stopped", "--json")
        out, err = done.communicate(timeout=300)
        assert done.returncode == 0, err
        assert left() == []
    summary = one_object(out)
    assert summary["rounds_done"] == last
    assert summary["outcome"] == "complete"
    assert len(summary["accuracy_by_round"]) == last + 1
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    told = [line["round"] for line in lines]
    assert all(told.count(number) == 2 for number in range(1, last + 2))
    # The sums of the ridge start and its calibration, once: a resumed run does not solve again.
    assert told.count(0) == 4
    assert_whole(folder)

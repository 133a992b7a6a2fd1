"""The keeper over real processes: its command is killed outright, closes the pipe, or the program ends by itself."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedsplit.core.keeper import kept

MARK = "FEDSPLIT_KEEPER_TEST"
SLEEP = "import time; time.sleep(600)"
# A child, a session of its own whose leader goes so that its child is nobody's, and one that hears no signal.
FAMILY = f"""
import signal, subprocess, sys, time
sleep = [sys.executable, "-c", {SLEEP!r}]
subprocess.Popen(sleep)
leader = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}])"
subprocess.Popen([sys.executable, "-c", leader], start_new_session=True).wait()
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", deaf])
print("ready", flush=True)
time.sleep(600)
"""
COMMAND = f"""
import subprocess, sys, time
from fedsplit.core.keeper import kept
process = kept([sys.executable, "-c", {FAMILY!r}], remove=sys.argv[1], stdout=subprocess.PIPE)
print(process.stdout.readline().decode(), process.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """In the environment of all that a test starts; what is left of it is killed."""
    monkeypatch.setenv(MARK, str(tmp_path))
    yield str(tmp_path)
    for process in alive(str(tmp_path)):
        with contextlib.suppress(psutil.Error):
            process.kill()


def alive(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.pid != os.getpid() and process.environ().get(MARK) == mark
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def gone(mark: str, within_s: float) -> bool:
    end = time.monotonic() + within_s
    while alive(mark) and time.monotonic() < end:
        time.sleep(0.1)
    return not alive(mark)


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux")
def test_nothing_outlives_a_command_that_is_killed(mark: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").touch()
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(folder)], stdout=subprocess.PIPE, text=True
    ) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == "ready\n"
        assert len(alive(mark)) >= 6
        command.kill()
    assert gone(mark, 20)
    assert not folder.exists()


def test_who_closes_the_pipe_waits_until_all_have_ended(mark: str) -> None:
    with kept([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        os.kill(process.pid, signal.SIGTERM)  # Not its sign.
    assert process.returncode == 0
    assert alive(mark) == []


@pytest.mark.parametrize("code", [0, 3])
def test_a_program_that_ends_by_itself_ends_its_keeper(mark: str, code: int) -> None:
    script = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); sys.exit({code})"
    process = kept([sys.executable, "-c", script])
    assert process.wait(30) == code
    assert alive(mark) == []
    with process:
        pass

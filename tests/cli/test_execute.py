"""What `fedsplit run` says when it is stopped while another's SuperLink has the run."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from rich.console import Console

from fedsplit.cli import execute as module
from fedsplit.cli.endings import Interrupted, Terminated
from fedsplit.cli.execute import execute
from fedsplit.cli.follow import Progress
from fedsplit.cli.request import prepare
from fedsplit.core.keeper import kept
from tests.report import samples

TOLD = "Flower was told to stop the run; its processes on the server and at the sites end within about a minute."
RESUME = "fedsplit run --superlink plant --resume mine"


class Commands:
    """A SuperLink that takes a run, and stops it or not."""

    stops = True

    def __init__(self, connection: str, _: object) -> None:
        assert connection == "plant"

    def start(self, *_: object) -> str:
        return "17"

    def stream_log(self, _: str) -> subprocess.Popen[bytes]:
        return kept([sys.executable, "-c", "input()"], stdout=subprocess.PIPE)

    def stop(self, run_id: str) -> bool:
        assert run_id == "17"
        return self.stops


def stopped(app: Path, patch: pytest.MonkeyPatch, *, by: type[KeyboardInterrupt]) -> Interrupted:
    """The error of a run that is stopped while it is followed."""

    def follow(*_: object, **__: object) -> NoReturn:
        raise by

    patch.setattr(module, "FlowerCommands", Commands)
    patch.setattr(module, "follow", follow)
    request = prepare({"run-name": "mine"}, app=app, superlink="plant")
    with Progress(Console(file=io.StringIO())) as progress, pytest.raises(Interrupted) as caught:
        execute(request, progress)
    return caught.value


def test_stopped_elsewhere(echo_app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    far = stopped(echo_app, monkeypatch, by=KeyboardInterrupt)
    assert not far.terminated
    assert str(far) == (
        f"{TOLD} Its folder is on the ServerApp's machine. To go on from its last checkpoint, if it has one: {RESUME}"
    )
    folder = tmp_path / "runs" / "mine"
    (folder / "checkpoints" / ".round-00001.part").mkdir(parents=True)
    early = stopped(echo_app, monkeypatch, by=Terminated)
    assert early.terminated
    assert "nothing to go on from" in str(early)
    # The run's own processes may still write here.
    assert (folder / "checkpoints" / ".round-00001.part").exists()
    (folder / "checkpoints" / "round-00001").mkdir()
    later = str(stopped(echo_app, monkeypatch, by=KeyboardInterrupt))
    assert later.startswith(TOLD)
    assert later.endswith(f"To go on from its last checkpoint: {RESUME}")


def test_stopped_too_early_too_late_or_in_vain(
    echo_app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Commands, "stops", False)
    vain = str(stopped(echo_app, monkeypatch, by=KeyboardInterrupt))
    assert "may go on" in vain
    assert vain.endswith("flwr stop 17 plant")

    def stream_log(*_: object) -> NoReturn:
        lines = samples.metrics()
        samples.write(tmp_path / "runs" / "mine", lines, samples.summary(lines))
        raise KeyboardInterrupt

    monkeypatch.setattr(Commands, "stream_log", stream_log)
    late = str(stopped(echo_app, monkeypatch, by=KeyboardInterrupt))
    assert late.startswith("stopped after the run's end")

    def start(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(Commands, "start", start)
    early = str(stopped(echo_app, monkeypatch, by=KeyboardInterrupt))
    assert early == "stopped before the run was with Flower; nothing was started"

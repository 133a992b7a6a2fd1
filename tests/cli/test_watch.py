"""Watching a run on another's SuperLink: by one stream; Flower is asked only when that ends or is silent for long."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from fedsplit.cli.flower import FlowerCommands, RunState
from fedsplit.cli.follow import Snapshot
from fedsplit.cli.watch import RemoteWatch
from fedsplit.core.errors import FederationError
from fedsplit.core.keeper import kept
from fedsplit.core.records import Status


class Commands:
    """Flower's commands as a script of streams, and what `flwr list` says in turn."""

    def __init__(self, streams: list[str], states: list[str]) -> None:
        self.streams, self.states, self.asked = streams, states, 0

    def stream_log(self, _: str) -> subprocess.Popen[bytes]:
        return kept([sys.executable, "-uc", self.streams.pop(0)], stdout=subprocess.PIPE)

    def state(self, _: str) -> RunState:
        self.asked += 1
        state = self.states.pop(0)
        if state == "away":
            raise FederationError("nobody answers")
        return RunState(state, "")


NOTHING = Snapshot(None, (), False)
FOREVER = "import time; time.sleep(600)"


def watch_until(
    watch: RemoteWatch, done: Callable[[], bool], snapshot: Snapshot = NOTHING, within_s: float = 20
) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if watch(snapshot) or done():
            return True
        time.sleep(0.02)
    return False


def made(commands: Commands, run_dir: Path, **more: Any) -> RemoteWatch:
    said = more.pop("say", lambda _: None)
    return RemoteWatch(cast(FlowerCommands, commands), "1", run_dir, say=said, **more)


def test_flower_is_not_asked_while_the_stream_lasts(tmp_path: Path) -> None:
    commands = Commands([FOREVER], [])
    watch = made(commands, tmp_path)
    assert not watch_until(watch, lambda: False, within_s=1.0)
    watch.close()
    assert commands.asked == 0


def test_the_streams_end_is_the_runs(tmp_path: Path) -> None:
    commands = Commands(["print('x')"], ["finished:completed"])
    watch = made(commands, tmp_path)
    assert watch_until(watch, lambda: False)
    watch.close()
    assert commands.asked == 1


def test_a_lost_connection_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsplit.cli.watch._SHOWS_WITHIN_S", -1.0)
    monkeypatch.setattr("fedsplit.cli.watch._MOST_PAUSE_S", 0.01)
    commands = Commands(
        ["print(1, 2, sep='\\n')", "print(1)", "print(1, 2, 3, sep='\\n')"],
        ["away", "away", "finished:failed"],
    )
    watch = made(commands, tmp_path / "elsewhere")
    assert watch_until(watch, lambda: False)
    watch.close()
    assert commands.asked == 3
    # What was shown before is not shown again, also where a stream broke off earlier than the one before it.
    assert capsys.readouterr().err == "1\n2\n3\n"


def test_a_superlink_that_stays_away_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsplit.cli.watch._MOST_PAUSE_S", 0.01)
    commands = Commands(["pass"] * 9, ["away"] * 9)
    watch = made(commands, tmp_path)
    with pytest.raises(FederationError, match="nobody answers"):
        watch_until(watch, lambda: False)
    watch.close()
    assert commands.asked == 5


def test_after_long_silence_flower_is_asked(tmp_path: Path) -> None:
    commands = Commands([FOREVER], ["running", "finished:completed"])
    watch = made(commands, tmp_path, silence_s=0.2)
    assert watch_until(watch, lambda: False)
    watch.close()
    assert commands.asked == 2


def test_sites_that_do_not_come_get_a_hint_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsplit.cli.watch._WAITS_LONG_S", 0.0)
    status = Status(phase="waiting", round=0, rounds=2, sites=(), replied=())
    said: list[str] = []
    watch = made(Commands([FOREVER], []), tmp_path, say=said.append)
    for _ in range(3):
        watch(Snapshot(status, (), False))
    watch.close()
    assert len(said) == 1
    assert "NTP" in said[0]

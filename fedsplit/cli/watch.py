"""Knows when Flower's part of a run is over, and asks as little as it can: each question starts a program of a second.

For our own SuperLink the process that runs the apps is looked at. For another's, one connection
streams the run's log, and its end is the sign; only then, or after long silence, Flower is asked.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from fedsplit.cli.flower import FlowerCommands
from fedsplit.cli.flower_words import CLOCKS
from fedsplit.cli.follow import Snapshot
from fedsplit.core.errors import FederationError

_STARTS_WITHIN_S = 8.0
"""Flower starts the engine's process a few seconds after the run; only then is its absence the end."""
_SHOWS_WITHIN_S = 15.0
"""A run's folder that is not here by then is on another machine."""
_SILENCE_S = 600.0
"""A connection that died without a word looks like a run that has nothing to say."""
_WAITS_LONG_S = 60.0
_MOST_PAUSE_S = 60.0
_MOST_FAILURES = 5
_LINES_KEPT = 500


class Watch(Protocol):
    """Called with each snapshot of the run's files."""

    def __call__(self, snapshot: Snapshot) -> bool:
        """Is Flower's part over? Raises FederationError where Flower cannot be asked."""
        ...

    def close(self) -> None:
        """End what was started to watch."""
        ...


class _Asking:
    """`flwr list` for one run, forgiving a few failures in a row."""

    def __init__(self, commands: FlowerCommands, run_id: str) -> None:
        self._commands = commands
        self._run_id = run_id
        self._failures = 0

    def finished(self) -> bool:
        try:
            state = self._commands.state(self._run_id)
        except FederationError:
            self._failures += 1
            if self._failures >= _MOST_FAILURES:
                raise
            return False
        self._failures = 0
        return state.finished


class LocalWatch:
    """For a SuperLink of our own."""

    def __init__(
        self, commands: FlowerCommands, run_id: str, simulating: Callable[[], bool]
    ) -> None:
        self._asking = _Asking(commands, run_id)
        self._simulating = simulating
        self._started = time.monotonic()
        self._next_look = 0.0
        self._seen = False

    def __call__(self, snapshot: Snapshot) -> bool:
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + 1.0
        if self._simulating():
            self._seen = True
            return False
        if not self._seen and now - self._started < _STARTS_WITHIN_S:
            return False
        return snapshot.over or self._asking.finished()

    def close(self) -> None:
        """Nothing was started."""


class RemoteWatch:
    """For another's SuperLink: one stream of the run's log, shown where the run's folder is not to be seen here."""

    def __init__(
        self,
        commands: FlowerCommands,
        run_id: str,
        run_dir: Path,
        *,
        say: Callable[[str], None],
        silence_s: float = _SILENCE_S,
    ) -> None:
        self._commands = commands
        self._run_id = run_id
        self._run_dir = run_dir
        self._say = say
        self._silence_s = silence_s
        self._asking = _Asking(commands, run_id)
        self._log = _Log(commands.stream_log(run_id))
        self._started = self._last_word = time.monotonic()
        self._snapshot: Snapshot | None = None
        self._pause_s = 1.0
        self._next_try = 0.0
        self._warned = False

    def __call__(self, snapshot: Snapshot) -> bool:
        now = time.monotonic()
        if snapshot is not self._snapshot:
            self._snapshot, self._last_word = snapshot, now
        self._last_word = max(self._last_word, self._log.last_word)
        ended = self._log.ended
        if not self._run_dir.exists() and now - self._started > _SHOWS_WITHIN_S:
            self._log.show()
        self._warn(snapshot, now)
        if ended:
            if snapshot.over:
                return True
            if now < self._next_try:
                return False
            # The run is over, or the connection was lost, or the SuperLink was restarted.
            return self._asking.finished() or self._again(now)
        if now - self._last_word > self._silence_s:
            self._last_word = now
            return self._asking.finished()
        return False

    def close(self) -> None:
        """End the stream."""
        self._log.close()

    def _again(self, now: float) -> bool:
        self._pause_s = min(2 * self._pause_s, _MOST_PAUSE_S)
        self._next_try = now + self._pause_s
        self._log.close()
        self._log = _Log(self._commands.stream_log(self._run_id), skip=self._log.shown)
        return False

    def _warn(self, snapshot: Snapshot, now: float) -> None:
        """Once, where sites do not come: their SuperNodes may have ended without a word."""
        waiting = snapshot.status is not None and snapshot.status.phase == "waiting"
        if waiting and not self._warned and now - self._started > _WAITS_LONG_S:
            self._warned = True
            self._say(
                f"still waiting for sites. Does flower-supernode run at each of them? If the SuperLink was restarted "
                f"without --database, each SuperNode has ended by itself with exit code 0: start it again. {CLOCKS}"
            )


class _Log:
    """The lines that a program writes, read by a thread and held until they are shown; the oldest give way."""

    def __init__(self, process: subprocess.Popen[bytes], *, skip: int = 0) -> None:
        """`skip`: lines that were shown before; a new stream begins at the run's beginning."""
        self.shown = skip
        """The number of the last line that was shown."""
        self._skip = skip
        self.last_word = time.monotonic()
        self._process = process
        self._held: deque[tuple[int, bytes]] = deque(maxlen=_LINES_KEPT)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def ended(self) -> bool:
        """Did the program end?"""
        return not self._reader.is_alive()

    def show(self) -> None:
        """Write what is held to stderr."""
        while self._held:
            self.shown, line = self._held.popleft()
            sys.stderr.write(line.decode("utf-8", "replace"))

    def close(self) -> None:
        """End the program and wait for it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=20)
        self._reader.join(timeout=5)
        if self.ended and self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for number, line in enumerate(self._process.stdout, start=1):
            self.last_word = time.monotonic()
            if number > self._skip:
                self._held.append((number, line))
        self._process.wait()

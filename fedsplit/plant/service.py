"""One service of a supervisor: what it is, and its process as it stands, from start to end.

A service is down until its time comes, starting until it is ready, and up. Its keeper (`core/keeper.py`) sees that
nothing of it is left when it ends, however it does. What it says goes to its log, line by line.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import psutil

from fedsplit.core.keeper import kept
from fedsplit.core.processes import ProcessTree
from fedsplit.plant.logs import FILES, JsonLines

BACK_OFF_S = 1.0
MAX_BACK_OFF_S = 60.0
STEADY_S = 60.0
"""After a service has run for as long, the next wait is `BACK_OFF_S` again."""
ASK_S = 30.0
"""How often a service that is up is asked whether it is ready ..."""
SILENT_TIMES = 6
"""... and how often in a row it may say no, or nothing: a machine may be busy with something else for minutes."""
_KILL_S = 2.5
"""What a keeper takes beyond `stop_s`: it kills what does not end when asked."""
_MAX_LINE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Service:
    """One program that runs as long as the supervisor does.

    `env` is added to this process's environment. `ready` is asked every 0.1 s until it is true, at most for `ready_s`,
    and later every 30 s; it must answer within a second or two. `stop_s`, at most 6, is the time to end by itself before it is killed.
    What it writes goes to `log`, a file of JSON lines.
    """

    name: str
    command: list[str]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    ready: Callable[[], bool] | None = None
    ready_s: float = 60.0
    stop_s: float = 5.0
    port: int = 0
    cwd: Path | None = None


class Child:
    """One service as it stands: `down` until its time comes, `starting`, `up`."""

    def __init__(self, service: Service, log_mb: int) -> None:
        self.service = service
        self.log = JsonLines(service.log, service.name, max_bytes=log_mb * 2**20 // FILES)
        self.phase: Literal["down", "starting", "up"] = "down"
        self.wait_s = 0.0
        self._again_at = 0.0
        self._since = 0.0
        self._ask_at = 0.0
        self._silent = 0
        self._restarts = 0
        self._pid: int | None = None
        self._last_exit: dict[str, Any] | None = None
        self._keeper: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._tree = ProcessTree()

    def last_lines(self) -> str:
        """What it said last, for an error."""
        tail = self.log.tail()
        return f"The last lines of {self.service.log}:\n{tail}" if tail else "It said nothing."

    def state(self) -> dict[str, Any]:
        """As it stands in `state.json`."""
        return {
            "pid": self._pid,
            "port": self.service.port,
            "state": self.phase,
            "restarts": self._restarts,
            "last_exit": self._last_exit,
        }

    def start(self) -> None:
        """Start the program. It is up when `tick` has found it ready."""
        service = self.service
        self.phase, self._since = "starting", time.monotonic()
        self._keeper = keeper = kept(
            service.command,
            grace_s=min(service.stop_s, 6.0),
            env={**os.environ, **service.env},
            cwd=service.cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._tree = ProcessTree()
        self._tree.adopt(keeper.pid)
        self._reader = threading.Thread(target=self._read, args=[keeper], daemon=True)
        self._reader.start()

    def tick(self) -> str:
        """Look how it is. Says what went wrong, if something did: then it is down, and starts again in `wait_s`."""
        now = time.monotonic()
        if self.phase == "down":
            if now >= self._again_at:
                self._restarts += 1
                try:
                    self.start()
                except OSError as err:
                    return self._failed(f"cannot be started: {err.strerror}", None)
            return ""
        assert self._keeper is not None
        code = self._keeper.poll()
        if code is not None:
            return self._failed(f"ended by itself ({_in_words(code)})", code)
        if self.phase == "starting":
            if self._is_ready():
                self.phase, self._silent, self._ask_at = "up", 0, now + ASK_S
            elif now - self._since > self.service.ready_s:
                return self._failed(f"was not ready within {self.service.ready_s:.0f} s", None)
        elif now >= self._ask_at:
            self._ask_at = now + ASK_S
            self._silent = 0 if self._is_ready() else self._silent + 1
            if self._silent >= SILENT_TIMES:
                return self._failed(
                    f"hung: it did not answer {SILENT_TIMES} times in a row, every {ASK_S:.0f} s",
                    None,
                )
        return ""

    def ask_to_end(self) -> None:
        """Have its keeper end it; `end` waits."""
        if self._keeper is not None and self._keeper.stdin is not None:
            with contextlib.suppress(OSError):
                self._keeper.stdin.close()

    def end(self) -> None:
        """End all of it. Twice is harmless."""
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        if keeper.stdin is not None:
            with contextlib.suppress(OSError):
                keeper.stdin.close()
        try:
            keeper.wait(self.service.stop_s + _KILL_S)
        except subprocess.TimeoutExpired:
            keeper.kill()
        # Nothing is left here, unless the keeper itself was killed.
        self._tree.end(grace_s=0.0)
        keeper.wait()
        if self._reader is not None:
            self._reader.join(1.0)
        self.phase, self._pid = "down", None

    def _failed(self, what: str, code: int | None) -> str:
        up_s = time.monotonic() - self._since
        self.end()
        reset = up_s >= STEADY_S or not self.wait_s
        self.wait_s = BACK_OFF_S if reset else min(2 * self.wait_s, MAX_BACK_OFF_S)
        self.phase, self._again_at = "down", time.monotonic() + self.wait_s
        self._last_exit = {"code": code, "at": now(), "why": what, "after_s": round(up_s, 1)}
        return f"{self.service.name} {what} after {up_s:.0f} s"

    def _is_ready(self) -> bool:
        assert self._keeper is not None
        if self._pid is None:
            with contextlib.suppress(psutil.Error):
                children = psutil.Process(self._keeper.pid).children()
                self._pid = children[0].pid if children else None
        if self._pid is None or not (self.service.ready is None or self.service.ready()):
            return False
        self._tree.refresh()
        return True

    def _read(self, keeper: subprocess.Popen[bytes]) -> None:
        assert keeper.stdout is not None
        with contextlib.suppress(OSError, ValueError), keeper.stdout as stream:
            while line := stream.readline(_MAX_LINE_BYTES):
                self.log.write(line.decode("utf-8", "replace"))


def _in_words(code: int) -> str:
    number = code - 128 if code > 128 else -code
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(number).name}"
    return f"exit code {code}"


def now() -> str:
    """The time as `state.json` has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")

"""The processes that a command started: known by id, ended by id, none left behind.

Flower detaches what it starts (its SuperExec leads a session of its own, Ray's agents outlive their
parent), so ending the SuperLink alone leaves orphans. A `ProcessTree` remembers every descendant it
has ever seen and the sessions they lead. Knows nothing of Flower.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import psutil


class ProcessTree:
    """A process, its descendants and whoever they left behind. Never touches another process."""

    def __init__(self, *, below: int = 0) -> None:
        """`below`: a process whose descendants are ours while it is not."""
        self._below = below
        self._known: dict[int, psutil.Process] = {}

    def adopt(self, root_pid: int) -> None:
        """Count a process that the caller has just started, and all that come of it, as ours."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._known[root_pid] = psutil.Process(root_pid)

    def refresh(self) -> None:
        """Learn of descendants that are new. Call it while the root lives: orphans are found by it later."""
        parents = {p: p.info["ppid"] for p in psutil.process_iter(["ppid"])}
        ours = {p.pid for p in self._known.values() if p.is_running()}
        if self._below:
            ours.add(self._below)
        # A session counts only when one of ours led it: a shared one holds strangers.
        sessions = {
            s for s in map(_session, ours) if s in self._known and s != _session(os.getpid())
        }
        found = True
        while found:
            found = False
            for process, parent in parents.items():
                if process.pid in ours:
                    continue
                if parent in ours or _session(process.pid) in sessions:
                    self._known[process.pid] = process
                    ours.add(process.pid)
                    found = True

    def running(self) -> list[psutil.Process]:
        """Those that still run; a zombie does not. A process id that was given away again is not ours."""
        return [p for p in self._known.values() if runs(p)]

    def find(self, name: str) -> psutil.Process | None:
        """One that runs and has `name` in its command line's first two words."""
        for process in self.running():
            with contextlib.suppress(psutil.Error):
                if any(os.path.basename(word).startswith(name) for word in process.cmdline()[:2]):  # noqa: PTH119
                    return process
        return None

    def end(self, *, grace_s: float = 5.0) -> list[int]:
        """Ask all to end, newest first, then kill what stays. Returns the ids that would not die."""
        self.refresh()
        for process in reversed(self.running()):
            with contextlib.suppress(psutil.Error):
                process.terminate()
        self._wait(grace_s)
        for _ in range(3):
            self.refresh()
            for process in self.running():
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if self._wait(2.0):
                break
        return [p.pid for p in self.running()]

    def _wait(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self.running():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
            self.refresh()
        return True


def runs(process: psutil.Process) -> bool:
    """Is it there and no zombie?"""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _session(pid: int) -> int | None:
    """The session that a process belongs to; None where there is no such thing or no such process."""
    getsid = getattr(os, "getsid", None)
    if getsid is None:
        return None
    try:
        return int(getsid(pid))
    except OSError:
        return None


@contextlib.contextmanager
def held_signals(*, drop: bool = False) -> Iterator[None]:
    """Ctrl-C and requests to end wait until the block is through, or are dropped where it cleans up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = [n for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
    held: list[int] = []

    def hold(number: int, _frame: FrameType | None) -> None:
        held.append(number)

    before = {getattr(signal, n): signal.signal(getattr(signal, n), hold) for n in names}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held and not drop:
        signal.raise_signal(held[0])

"""Runs the services of a server or a site as children of one process, for years.

`Supervisor.run` starts them in order, each when the one before it is ready; starts one that dies again, with back-off;
and ends them all within 10 s. Each service has a keeper (`core/keeper.py`): when a service dies, or this process does,
however it does, nothing of it is left. What it knows stands in `state.json`, and in a log. It knows nothing of what
the services do, and loads nothing heavy: a site's small computer holds it all the time.

A service that has `ready` must become ready at the first start, else `run` raises with the end of its log; up, it is
asked again now and then, and one that hangs is started anew. Without `ready` it is up when it runs. What ends is
started again and again: after 1 s, then 2 s, up to 60 s.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from fedsplit.core.closing import Closing
from fedsplit.core.errors import ServiceError
from fedsplit.core.processes import ProcessTree
from fedsplit.core.whole_files import write_whole
from fedsplit.plant.lock import pids_before, taken
from fedsplit.plant.service import Child, Service, now
from fedsplit.plant.systemd import Notifier

_TICK_S = 0.5
_QUICK_TICK_S = 0.1


class Supervisor(Closing):
    """The services, from start to end. Owns `state_file` and the lock beside it."""

    def __init__(
        self,
        services: Sequence[Service] | Callable[[], Sequence[Service]],
        *,
        state_file: Path,
        say: Callable[[str], None],
        about: Mapping[str, Any] | None = None,
        log_mb: int = 25,
    ) -> None:
        """`about`: more for `state.json`, e.g. the public host and port. `log_mb` bounds each service's log.

        A callable is asked for the services when the folder is ours. Raises ServiceError when it is in use.
        """
        self._state_file = state_file
        self._say = say
        self._about = dict(about or {})
        self._notify = Notifier()
        self._written = self._fault = ""
        self._started = now()
        self._lock = taken(state_file)
        try:
            self._end_left_over()
            found = services() if callable(services) else services
        except BaseException:
            self._lock.release()
            raise
        self._children = [Child(service, log_mb) for service in found]
        self._write()

    def run(
        self,
        stop: threading.Event,
        *,
        on_up: Callable[[], None] | None = None,
        chore: Callable[[], None] | None = None,
        chore_s: float = 3600.0,
    ) -> None:
        """Keep the services up until `stop` is set. Raises ServiceError when one does not come up at first.

        `chore` is done every `chore_s` in this thread; it is quick, and sees to its own errors.
        """
        try:
            if not self._start(stop):
                return
            self._notify.send("READY=1")
            if on_up is not None:
                on_up()
            due = time.monotonic() + chore_s
            while not stop.wait(self._pause()):
                if chore is not None and time.monotonic() >= due:
                    due = time.monotonic() + chore_s
                    chore()
                for child in self._children:
                    if said := child.tick():
                        self._tell(child, said)
                self._write()
                self._notify.alive()
        finally:
            self._notify.send("STOPPING=1")
            self._end()

    def restart(self, name: str) -> None:
        """End a service that is up and start it again, for it reads something anew. From `chore`, or before `run`."""
        for child in self._children:
            if child.service.name == name and child.phase != "down":
                child.end()
                child.start()

    def state(self) -> dict[str, Any]:
        """What `state.json` holds."""
        services = {c.service.name: c.state() for c in self._children}
        return {"pid": os.getpid(), "started": self._started, **self._about, "services": services}

    def close(self) -> None:
        """End what runs, and give the folder free."""
        self._end()
        for child in self._children:
            child.log.close()
        self._lock.release()

    def _end_left_over(self) -> None:
        """End services of an earlier supervisor that was killed together with their keepers: they hold ports and keys."""
        folder = str(self._state_file.parent.parent)
        tree = ProcessTree()
        for name, pid in pids_before(self._state_file).items():
            with contextlib.suppress(psutil.Error):
                # A number may be another program's by now; ours name the folder.
                if any(folder in word for word in psutil.Process(pid).cmdline()):
                    tree.adopt(pid)
                    self._say(
                        f"{name} (process {pid}) is left over from an earlier time; it is ended"
                    )
        tree.end()

    def _start(self, stop: threading.Event) -> bool:
        for child in self._children:
            child.start()
            while child.phase != "up":
                if stop.wait(_QUICK_TICK_S):
                    return False
                self._notify.starting()
                if said := child.tick():
                    if child.service.ready is not None:
                        raise ServiceError(f"{said}. {child.last_lines()}")
                    self._tell(child, said)
                    break
            self._write()
        return True

    def _tell(self, child: Child, said: str) -> None:
        last = child.log.tail(1)
        said += f"; it starts again in {child.wait_s:.0f} s" + (
            f". It said: {last}" if last else ""
        )
        child.log.write(said, level="error")
        self._say(said)

    def _pause(self) -> float:
        return _TICK_S if all(c.phase == "up" for c in self._children) else _QUICK_TICK_S

    def _end(self) -> None:
        for child in reversed(self._children):
            child.ask_to_end()
        for child in reversed(self._children):
            child.end()
        self._write(over=True)

    def _write(self, *, over: bool = False) -> None:
        """Bring `state.json` up to date. A full disk is told once, and it is tried again."""
        text = json.dumps(self.state() | ({"pid": None} if over else {}), indent=1)
        if text == self._written:
            return
        try:
            write_whole(self._state_file, text + "\n")
            self._written, self._fault = text, ""
        except OSError as err:
            if self._fault != str(err.strerror):
                self._fault = str(err.strerror)
                self._say(f"{self._state_file} cannot be written: {self._fault}; free some space")


@contextlib.contextmanager
def stop_on_signals(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C and requests to end set `stop`, in the block. For the main thread."""

    def set_it(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    names = [n for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
    before = {getattr(signal, n): signal.signal(getattr(signal, n), set_it) for n in names}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

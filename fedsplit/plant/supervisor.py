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
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from filelock import FileLock, Timeout

from fedsplit.core.closing import Closing
from fedsplit.core.errors import ServiceError
from fedsplit.core.foreign import read_json
from fedsplit.core.keeper import kept
from fedsplit.core.processes import ProcessTree
from fedsplit.core.whole_files import write_whole
from fedsplit.plant.logs import FILES, JsonLines
from fedsplit.plant.systemd import Notifier

BACK_OFF_S = 1.0
MAX_BACK_OFF_S = 60.0
STEADY_S = 60.0
"""After a service has run for as long, the next wait is `BACK_OFF_S` again."""
ASK_S = 30.0
"""How often a service that is up is asked whether it is ready ..."""
SILENT_TIMES = 6
"""... and how often in a row it may say no, or nothing: a machine may be busy with something else for minutes."""
_TICK_S = 0.5
_QUICK_TICK_S = 0.1
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
        self._started = _now()
        self._lock = taken(state_file)
        try:
            self._end_left_over()
            found = services() if callable(services) else services
        except BaseException:
            self._lock.release()
            raise
        self._children = [_Child(service, log_mb) for service in found]
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
        for name, pid in _pids_before(self._state_file).items():
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
                self._notify.alive()
                if said := child.tick():
                    if child.service.ready is not None:
                        raise ServiceError(f"{said}. {child.last_lines()}")
                    self._tell(child, said)
                    break
            self._write()
        return True

    def _tell(self, child: _Child, said: str) -> None:
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


class _Child:
    """One service as it stands: `down` until its time comes, `starting`, `up`."""

    def __init__(self, service: Service, log_mb: int) -> None:
        self.service = service
        self.log = JsonLines(service.log, service.name, max_bytes=log_mb * 2**20 // FILES)
        self.phase = "down"
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
        self._last_exit = {"code": code, "at": _now(), "why": what, "after_s": round(up_s, 1)}
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


def taken(state_file: Path) -> FileLock:
    """The lock of a folder whose services run. Raises ServiceError, which names the process that has it."""
    state_file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(state_file.with_name("lock"), timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout as err:
        pid = running_pid(state_file)
        raise ServiceError(
            f"the services of {state_file.parent.parent} run already"
            + (f": process {pid} keeps them" if pid else "")
            + "; end them first, or leave them as they are"
        ) from err
    except OSError as err:
        raise ServiceError(
            f"{state_file.parent} cannot be written: {err.strerror}; its owner must start the services, and the disk "
            "must have room"
        ) from err
    return lock


def is_taken(state_file: Path) -> bool:
    """Do the folder's services run now? Raises ServiceError where this user may not know."""
    path = state_file.with_name("lock")
    if not path.exists():
        return False
    try:
        FileLock(path, timeout=0, thread_local=False).acquire().lock.release()
    except Timeout:
        return True
    except OSError as err:
        raise ServiceError(
            f"{path} cannot be looked at: {err.strerror}; do this as the user who owns the folder, or as root"
        ) from err
    return False


def running_pid(state_file: Path) -> int | None:
    """The supervisor's process id as `state.json` has it; None where it has none. It is old unless the lock is held."""
    try:
        pid = read_json(state_file, limit=1 << 20)["pid"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return pid if isinstance(pid, int) and pid > 1 else None


def _pids_before(state_file: Path) -> dict[str, int]:
    """The services' processes as the last supervisor wrote them."""
    try:
        services = read_json(state_file, limit=1 << 20)["services"]
        pids = {str(name): one["pid"] for name, one in services.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {name: pid for name, pid in pids.items() if isinstance(pid, int) and pid > 1}


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


def _in_words(code: int) -> str:
    number = code - 128 if code > 128 else -code
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(number).name}"
    return f"exit code {code}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

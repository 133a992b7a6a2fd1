"""The lock of a folder whose services run, and what `state.json` beside it says of the process that holds it."""

from __future__ import annotations

import time
from pathlib import Path

from filelock import FileLock, Timeout

from fedsplit.core.errors import ServiceError
from fedsplit.core.foreign import read_json

_LOOK_S = 1.0
_SAYS_WITHIN_S = 10.0


def taken(state_file: Path) -> FileLock:
    """The lock of a folder whose services run. Raises ServiceError, which names the process that has it."""
    state_file.parent.mkdir(parents=True, exist_ok=True)
    # Who only looks whether it is free holds it for an instant.
    lock = FileLock(state_file.with_name("lock"), timeout=_LOOK_S, thread_local=False)
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


def up_pid(state_file: Path) -> int | None:
    """The process that keeps the services now; None where none does. Raises ServiceError where that cannot be known.

    A number in a file alone would not do: after a power cut it is another program's.
    """
    deadline = time.monotonic() + _SAYS_WITHIN_S
    while is_taken(state_file):
        if pid := running_pid(state_file):
            return pid
        # It is about to write its number, or to end.
        if time.monotonic() > deadline:
            raise ServiceError(
                f"{state_file.with_name('lock')} is held by a process that says nothing in {state_file}; look with `ps`"
            )
        time.sleep(0.1)
    return None


def running_pid(state_file: Path) -> int | None:
    """The supervisor's process id as `state.json` has it; None where it has none. It is old unless the lock is held."""
    try:
        pid = read_json(state_file, limit=1 << 20)["pid"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return pid if isinstance(pid, int) and pid > 1 else None


def pids_before(state_file: Path) -> dict[str, int]:
    """The services' processes as the last supervisor wrote them."""
    try:
        services = read_json(state_file, limit=1 << 20)["services"]
        pids = {str(name): one["pid"] for name, one in services.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {name: pid for name, pid in pids.items() if isinstance(pid, int) and pid > 1}

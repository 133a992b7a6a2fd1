"""Runs one program for a command and ends it, with all that came of it, when the command is gone.

`python -m fedsplit.core.keeper [--remove FOLDER] [--grace SECONDS] PROGRAM ARGS...` with a pipe as its standard input. The pipe's end
(EOF) is the sign: it comes when the command closes it, and also when the command was killed outright and could close
nothing. Then every descendant is ended, the folder is removed, and only then does this process end. So who waits for
this process knows that nothing is left. Started by `cli/flower.py` for a run and by `plant/service.py` for each
service; knows nothing of Flower.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from typing import Any, NoReturn

from fedsplit.core.processes import ProcessTree

GRACE_S = 5.0
_SET_CHILD_SUBREAPER = 36
DETACHED: dict[str, Any] = (
    {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    if os.name == "nt"
    else {"start_new_session": True}
)
"""How what belongs to a command is started: the terminal's Ctrl-C is the command's affair alone."""


def kept(
    command: list[str], *, remove: str = "", grace_s: float = GRACE_S, **options: Any
) -> subprocess.Popen[bytes]:
    """Start `command` under a keeper. Close the process's `stdin` to end it, then wait for it.

    Its processes have `grace_s` to end by themselves, then they are killed.
    """
    before = [
        sys.executable,
        "-m",
        "fedsplit.core.keeper",
        *(["--remove", remove] if remove else []),
        *(["--grace", str(grace_s)] if grace_s != GRACE_S else []),
    ]
    return subprocess.Popen([*before, *command], stdin=subprocess.PIPE, **options, **DETACHED)


def main(args: list[str]) -> NoReturn:
    """Keep the program that `args` name."""
    remove, grace_s = "", GRACE_S
    if args[:1] == ["--remove"]:
        remove, args = args[1], args[2:]
    if args[:1] == ["--grace"]:
        grace_s, args = float(args[1]), args[2:]
    _adopt_orphans()
    tree = ProcessTree(below=os.getpid())
    child = subprocess.Popen(args, stdin=subprocess.DEVNULL, **DETACHED)
    tree.adopt(child.pid)
    once = threading.Lock()

    def end(code: int) -> NoReturn:
        # Whoever comes second waits here for the end of the process.
        with once:
            tree.end(grace_s=grace_s)
            if remove:
                shutil.rmtree(remove, ignore_errors=True)
            os._exit(code)

    def ended_by_itself() -> None:
        code = child.wait()
        end(code if code >= 0 else 128 - code)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=ended_by_itself, daemon=True).start()
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    end(0)


def _adopt_orphans() -> None:
    """Linux: a descendant whose parent ends becomes a child of ours, so none is ever out of sight."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


if __name__ == "__main__":
    main(sys.argv[1:])

"""A terminal in which a command is left running, for tests that do what a person does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path


class Terminal:
    """A command that is left running; what it says is kept."""

    def __init__(self, commands: str, cwd: Path, env: dict[str, str]) -> None:
        self.commands = commands
        self.said: list[str] = []
        self.process = subprocess.Popen(
            ["sh", "-e", "-c", commands],
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.rstrip())

    def wait_for(self, words: str, timeout_s: float = 200) -> None:
        """Until a line has these words. Fails where the command ends before."""
        end = time.monotonic() + timeout_s
        while not any(words in line for line in self.said):
            shown = f"{self.commands}:\n" + "\n".join(self.said)
            assert self.process.poll() is None, f"ended: {shown}"
            assert time.monotonic() < end, f"does not say {words!r}: {shown}"
            time.sleep(0.1)

    def press_ctrl_c(self) -> int:
        """End it as a person does; the exit code."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(30)

    def end(self) -> None:
        """End it whatever it does. Twice is harmless."""
        with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
            self.press_ctrl_c()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(5)
        if self.process.stdout is not None:
            self.process.stdout.close()

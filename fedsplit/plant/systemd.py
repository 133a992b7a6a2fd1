"""What a service of systemd tells it: that it is ready, ends, and is alive. Does nothing where systemd does not ask."""

from __future__ import annotations

import contextlib
import os
import socket
import time

_MORE_S = 120


class Notifier:
    """Writes to the socket that systemd names (sd_notify(3)), and keeps the watchdog quiet (WATCHDOG_USEC)."""

    def __init__(self) -> None:
        path = os.environ.pop("NOTIFY_SOCKET", "")
        # Children must not speak for us: they do not get the variables.
        period = os.environ.pop("WATCHDOG_USEC", "")
        os.environ.pop("WATCHDOG_PID", None)
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._every_s = int(period) / 3e6 if period.isdigit() else 0.0
        self._due: dict[str, float] = {}

    def send(self, message: str) -> None:
        """Send one assignment, e.g. `READY=1`. A socket that is gone is no fault of ours."""
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(message.encode(), self._address)

    def alive(self) -> None:
        """Say so a few times within the time that the watchdog gives. Call it often."""
        self._say("WATCHDOG=1", self._every_s)

    def starting(self) -> None:
        """Have systemd wait on: a large backbone is read for longer than a unit may take to start. Call it often."""
        self._say(f"EXTEND_TIMEOUT_USEC={_MORE_S}000000", _MORE_S / 4)

    def _say(self, message: str, every_s: float) -> None:
        now = time.monotonic()
        if every_s and now >= self._due.get(message, 0.0):
            self._due[message] = now + every_s
            self.send(message)

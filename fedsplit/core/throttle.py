"""Says a thing of one kind only so often, so that whoever repeats it cannot fill a disk with log lines."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable


class ThrottledWarnings(logging.Filter):
    """Lets a logger's warnings of one message (before its values are put in) through only so often."""

    def __init__(self, throttle: Throttle) -> None:
        super().__init__()
        self._throttle = throttle

    def filter(self, record: logging.LogRecord) -> bool:
        """See logging.Filter. Errors always pass."""
        if record.levelno != logging.WARNING:
            return True
        left_out = self._throttle.left_out(str(record.msg))
        if left_out:
            record.msg = f"{record.msg} ({left_out} more like this are not in this log)"
        return left_out is not None


class Throttle:
    """At most `most` lines of a kind in `every_s` seconds. Safe to use from several threads."""

    def __init__(
        self, most: int = 10, every_s: float = 60.0, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._most, self._every_s, self._now = most, every_s, now
        self._seen: dict[str, tuple[float, int]] = {}
        self._lock = threading.Lock()

    def left_out(self, kind: str) -> int | None:
        """None: say nothing now. Else how many of this kind have been left out since the last line. Kinds are few."""
        with self._lock:
            began, count = self._seen.get(kind, (self._now(), 0))
            if self._now() - began >= self._every_s:
                self._seen[kind] = self._now(), 1
                return max(0, count - self._most)
            self._seen[kind] = began, count + 1
            return 0 if count < self._most else None

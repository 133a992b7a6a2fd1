"""Turns of the sessions that step one copy of some tensors (encoder-training=shared). Called by training_encoder.py."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

log = logging.getLogger(__name__)

WAIT_S = 60.0
"""What a session waits at the most, well below the time that a site waits for the answer to a step."""


class Turns:
    """One session at a time is between a forward and the step that it leads to, in the order in which they asked.

    So a gradient is that of the weights which it steps. Without turns, n sites that start at once send n gradients of the
    same weights, and their steps together go n times as far as any of them meant to.

    A turn that others wait for lasts `wait_s` / (those who wait) at the most, so that nobody waits longer than about
    `wait_s` for a slow site or a dead one. The gradient of a turn that ran out still counts when it comes, a few steps old.
    """

    def __init__(self, wait_s: float = WAIT_S) -> None:
        self._wait_s = wait_s
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        """The first one has the turn."""
        self._began = 0.0

    def take(self, who: object) -> None:
        """Wait for the turn; at once for who has it."""
        with self._changed:
            if who in self._queue:
                return
            self._queue.append(who)
            if len(self._queue) == 1:
                self._began = time.monotonic()
            while self._queue[0] != who:
                left_s = self._began + self._wait_s / (len(self._queue) - 1) - time.monotonic()
                if left_s > 0:
                    self._changed.wait(left_s)
                else:
                    waited_s, waiting = time.monotonic() - self._began, len(self._queue) - 1
                    log.warning(
                        "a turn on the shared encoder ran out after %.1f s, for %d sessions wait; its gradient will be old",
                        waited_s, waiting,
                    )  # fmt: skip
                    self._pass_on()

    def give(self, who: object) -> None:
        """The turn is over; nothing where it was over before."""
        with self._changed:
            if self._queue and self._queue[0] == who:
                self._pass_on()

    def _pass_on(self) -> None:
        self._queue.popleft()
        self._began = time.monotonic()
        self._changed.notify_all()

"""Who computes next at the encoder: turns of the sessions that step one copy of some tensors, and of sites at the cores.

`Turns` is for encoder-training=shared, `FairTurns` for all sessions.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

WAIT_S = 60.0
"""What a session waits at the most, well below the time that a site waits for the answer to a step."""


_REMEMBERED = 256


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


class FairTurns:
    """So many computations at a time, given to sites in turn: a site with four streams gets no more than one with one.

    A computation is one forward or backward. The next place goes to the waiting site whose last one began the longest ago,
    and there to the oldest of what it has waiting.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: dict[Hashable, deque[threading.Event]] = {}
        self._began: OrderedDict[Hashable, None] = OrderedDict()
        """Sites in the order in which their last computation began; those of long ago are forgotten."""
        self._lock = threading.Lock()

    @contextmanager
    def of(self, site: Hashable) -> Iterator[None]:
        """Hold a place for a computation of this site. Not to be nested."""
        mine = threading.Event()
        with self._lock:
            if self._free:
                self._free -= 1
                self._note(site)
                mine.set()
            else:
                self._waiting.setdefault(site, deque()).append(mine)
        mine.wait()
        try:
            yield
        finally:
            self._next()

    def _next(self) -> None:
        with self._lock:
            if not self._waiting:
                self._free += 1
                return
            order = {site: place for place, site in enumerate(self._began, 1)}
            site = min(self._waiting, key=lambda site: order.get(site, 0))
            queue = self._waiting[site]
            self._note(site)
            queue.popleft().set()
            if not queue:
                del self._waiting[site]

    def _note(self, site: Hashable) -> None:
        self._began[site] = None
        self._began.move_to_end(site)
        if len(self._began) > _REMEMBERED:
            self._began.popitem(last=False)

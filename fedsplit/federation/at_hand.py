"""The order that an executor has at hand: kept its own by heartbeats, dropped once nobody wants it, noted for the next executor."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fedsplit.core.closing import Closing
from fedsplit.core.errors import ConfigError, SuperNodeError

if TYPE_CHECKING:
    from fedsplit.federation.flower_runtime import Claim, Work

log = logging.getLogger(__name__)

# A SuperNode gives a task up after a minute without a heartbeat.
BEAT_S, LOOK_S = 10.0, 2.0
STOPPING = "the site's runtime is being stopped"
OVER = "its run is over"

Over = Callable[[int, int], bool]
"""(run, node) -> has the run ended?"""


class Watch(Closing):
    """Keeps a task ours while it is worked on, and knows why it is to be dropped."""

    def __init__(self, claim: Claim, work: Work, over: Over, stop: threading.Event) -> None:
        self._claim, self._over, self._stop = claim, over, stop
        self._run = work.context.run_id, work.context.node_id
        self._why = ""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeats", daemon=True)
        self._thread.start()

    def cancelled(self) -> str:
        """Why the order is to be dropped; empty while it is not."""
        return STOPPING if self._stop.is_set() else self._why

    def close(self) -> None:
        """No heartbeat from now on."""
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        beaten = time.monotonic()
        while not self._done.wait(LOOK_S):
            if time.monotonic() - beaten >= BEAT_S:
                beaten = time.monotonic()
                self._beat()
            if not self._why and self._over(*self._run):
                self._why = OVER

    def _beat(self) -> None:
        try:
            self._claim.beat()
        except SuperNodeError as err:
            # Away for a moment is no reason to drop anything: the answer is pushed when it is back.
            if err.lost:
                self._why = str(err)
        except ConfigError as err:
            self._why = str(err)


class Note:
    """The file in which an executor notes its order; `path` None: nowhere. It holds the right to answer that order."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def write(self, note: bytes) -> None:
        """Note an order, readable to the owner alone. Where that fails the order is carried out all the same."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._path.unlink(missing_ok=True)
            number = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(number, "wb") as file:
                file.write(note)
        except OSError as err:
            log.warning("%s cannot be written: %s", self._path, err)

    def read(self) -> bytes | None:
        """What an executor that died has left; None where it left nothing that can be read."""
        try:
            return self._path.read_bytes() if self._path is not None else None
        except OSError:
            return None

    def drop(self) -> None:
        """The order is answered."""
        if self._path is not None:
            try:
                self._path.unlink(missing_ok=True)
            except OSError as err:
                log.warning("%s cannot be removed: %s", self._path, err)

"""Keeps the module in use the one that is meant: looks which that is, loads another one, and swaps it in.

What cannot be loaded is told, tried again, and changes nothing: the module before it goes on answering.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from fedsplit.core.closing import Closing
from fedsplit.core.errors import FedsplitError
from fedsplit.core.foreign import printable
from fedsplit.predict.found import FoundModule
from fedsplit.predict.predictor import Predictor
from fedsplit.predict.serve.answering import Answering

log = logging.getLogger(__name__)

EVERY_S = 2.0
_AGAIN_S = 30.0


class Follow(Closing):
    """A thread that swaps; `fault` says why a newer module is not in use."""

    def __init__(
        self,
        answering: Answering,
        find: Callable[[], FoundModule | None],
        load: Callable[[FoundModule], Predictor],
        *,
        every_s: float = EVERY_S,
    ) -> None:
        """`find` is asked again and again; None: none is to be used. Both may raise FedsplitError."""
        self.fault = ""
        self._answering, self._find, self._load, self._every_s = answering, find, load, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="serve-follow", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        wait_s = 0.0
        while not self._stop.wait(wait_s):
            try:
                self._look()
                self.fault, wait_s = "", self._every_s
            except Exception as err:
                told = printable(err, limit=1000)
                if not isinstance(err, FedsplitError):
                    told = f"{type(err).__name__}: {told}"
                if told != self.fault:
                    log.warning(
                        "the module in use stays: %s",
                        told,
                        exc_info=not isinstance(err, FedsplitError),
                    )
                self.fault = told
                wait_s = min(_AGAIN_S, self._every_s * 5)

    def _look(self) -> None:
        found = self._find()
        now = self._answering.predictor
        if found is None:
            if now is not None:
                self._answering.swap(None)
                log.info("no module is in use any more")
            return
        if now is not None and now.found.digest == found.digest:
            return
        self._answering.swap(self._load(found))
        log.info("module %s (%s) is in use", found.digest[:12], found.name)

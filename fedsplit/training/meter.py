"""How long a site waits for its encoder."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fedsplit.core.encoder import Array, Encoder, Mask, Want


class WaitMeter:
    """An Encoder that adds up how long the training thread waited for the one behind it."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._thread = threading.get_ident()
        self.wait_s = 0.0

    @property
    def trains(self) -> bool:
        """See core.encoder.Encoder."""
        return self._encoder.trains

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, want: Want = "output"
    ) -> Array:
        """See core.encoder.Encoder."""
        with self.waiting():
            return self._encoder.encode(step, h_BTD, mask_BT, want=want)

    def settle(self, step: int, answer: Array, *, quiet: bool = False) -> Array | None:
        """See core.encoder.Encoder."""
        with self.waiting():
            return self._encoder.settle(step, answer, quiet=quiet)

    def close(self) -> None:
        """See core.encoder.Encoder."""
        self._encoder.close()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside, on the training thread only: steps in flight overlap its work."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if threading.get_ident() == self._thread:
                self.wait_s += time.perf_counter() - start

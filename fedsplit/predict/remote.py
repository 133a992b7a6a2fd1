"""The encoder of a device that holds only head and tail: over gRPC, with a grant to predict.

`RemoteMiddle` is what `load_predictor(middle=...)` takes. It asks for a grant when it needs one, dials when it has
something to send, and sends a step again where the line was lost: a forward leaves nothing at the encoder, so a second one
changes nothing. Who grants: a federation's control service (plant/site/inference.py), or a file (grant_file.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from fedsplit.core.closing import Closing
from fedsplit.core.encoder import Array, Grant, Mask, Want
from fedsplit.core.errors import OverloadedError, RefusedError, UnreachableError
from fedsplit.transport.client import StreamEncoder
from fedsplit.transport.wiring import ClientTls

PATIENCE_S = 60.0
"""So long is an encoder waited for that has answered before, or is full."""
_RETRY_S = 1.0
_MARGIN_S = 10.0
"""A grant is left so long before its end."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Way:
    """What opens a stream to predict."""

    address: str
    token: str
    grant: Grant
    seconds: float
    """How long the grant is good for from now on."""
    tls: ClientTls | None = None
    allow_insecure: bool = False


class RemoteMiddle(Closing):
    """An Encoder over streams that predict. Safe to call from several threads."""

    def __init__(
        self,
        ask: Callable[[], Way],
        *,
        codec: str = "fp32",
        in_flight: int = 2,
        patience_s: float = PATIENCE_S,
        say: Say = lambda _text: None,
    ) -> None:
        """`ask` gets the next grant; what it raises, `encode` raises. `say` hears what a person waits for."""
        self._ask, self._codec, self._in_flight = ask, codec, in_flight
        self._patience_s, self._say = patience_s, say
        self._way: Way | None = None
        self._ends = 0.0
        self._rows_left = 0
        self._stream: StreamEncoder | None = None
        self._lock = threading.Lock()
        self._answered = False
        self._up = self._down = 0

    @property
    def trains(self) -> bool:
        """Never."""
        return False

    @property
    def bytes_up(self) -> int:
        """Bytes sent so far, over all streams."""
        return self._up + (self._stream.bytes_up if self._stream else 0)

    @property
    def bytes_down(self) -> int:
        """Bytes received so far, over all streams."""
        return self._down + (self._stream.bytes_down if self._stream else 0)

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, want: Want = "output"
    ) -> Array:
        """See core.encoder.Encoder; outputs alone. Raises EncoderError, and what asking for a grant raises."""
        if want != "output":
            raise RefusedError(f"step {step}: a grant to predict gives outputs alone, no {want}")
        give_up = time.monotonic() + self._patience_s
        while True:
            stream = None
            try:
                stream = self._ready(len(h_BTD))
                z = stream.encode(step, h_BTD, mask_BT)
            except OverloadedError as err:
                self._drop(stream)
                self._wait(err, err.retry_after_s, give_up)
            except UnreachableError as err:
                self._drop(stream)
                # Who has never answered is rather not there, or the address is wrong: a person wants to know now.
                if not self._answered:
                    raise
                self._wait(err, _RETRY_S, give_up)
            else:
                self._answered = True
                return z

    def settle(self, step: int, answer: Array, *, quiet: bool = False) -> Array | None:
        """Nothing waits for a gradient here. Raises RefusedError."""
        del answer, quiet
        raise RefusedError(f"step {step}: a grant to predict trains nothing")

    def close(self) -> None:
        """End the stream. Twice is harmless."""
        with self._lock:
            self._end_stream()

    def _wait(self, err: Exception, seconds: float, give_up: float) -> None:
        """Raise `err` where patience would end before its time."""
        if time.monotonic() + seconds > give_up:
            raise err
        if seconds >= _RETRY_S:
            self._say(f"{err}; trying again in {seconds:.0f} s")
        time.sleep(seconds)

    def _ready(self, rows: int) -> StreamEncoder:
        """A stream whose grant allows so many more samples."""
        with self._lock:
            if self._way is None or self._rows_left < rows or time.monotonic() > self._ends:
                self._end_stream()
                self._way = way = self._ask()
                # A short grant is used for most of its time all the same.
                self._ends = time.monotonic() + max(way.seconds - _MARGIN_S, way.seconds / 2)
                self._rows_left = way.grant.inference.max_rows if way.grant.inference else 0
            if self._stream is None:
                way = self._way
                self._stream = StreamEncoder(
                    way.address,
                    way.token,
                    way.grant,
                    codec=self._codec,
                    tls=way.tls,
                    max_in_flight=self._in_flight,
                    allow_insecure=way.allow_insecure,
                )
            self._rows_left -= rows
            return self._stream

    def _drop(self, stream: StreamEncoder | None) -> None:
        """Let go of a stream that failed, unless another thread has made a new one already."""
        with self._lock:
            if stream is not None and stream is self._stream:
                self._end_stream()

    def _end_stream(self) -> None:
        if self._stream is not None:
            self._up += self._stream.bytes_up
            self._down += self._stream.bytes_down
            self._stream.close()
            self._stream = None

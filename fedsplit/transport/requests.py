"""The bodies of the small calls, read after the token and within bounds of size and time.

gRPC reads and unzips the request of a unary handler before the handler runs. So every method here is a stream handler of
raw bytes: it starts on the headers, and nothing of the body is read until it asks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from fedsplit.core.errors import OverloadedError, ProtocolError
from fedsplit.transport.frames import CHUNK_BYTES

MAX_SMALL_BYTES = 1 << 10
"""Of a request that names a version at most."""
MAX_CHUNK_BYTES = CHUNK_BYTES + MAX_SMALL_BYTES

_M = TypeVar("_M", bound=Message)


class SmallCalls:
    """Counts the small calls that are on, so that they never take a session's thread, and ends those that stay silent."""

    def __init__(self, most: int, retry_after_s: float) -> None:
        self._most = most
        self._retry_after_s = retry_after_s
        self._waiting: dict[int, tuple[float, Any]] = {}
        self._live = 0
        self._lock = threading.Lock()

    @contextmanager
    def place(self, *, half: bool) -> Iterator[None]:
        """Hold a place for one call; `half` of them are for those that any token may make. Raises OverloadedError."""
        most = self._most // 2 if half else self._most
        with self._lock:
            if self._live >= most:
                text = f"{self._live} small calls are on, {most} are allowed"
                raise OverloadedError(text, retry_after_s=self._retry_after_s)
            self._live += 1
        try:
            yield
        finally:
            with self._lock:
                self._live -= 1

    def read(
        self, kind: type[_M], requests: Iterator[bytes], context: Any, *, max_bytes: int
    ) -> Iterator[_M]:
        """The call's messages, each of at most `max_bytes`. Raises ProtocolError for what is none of `kind`."""
        while True:
            self._waiting[id(context)] = time.monotonic(), context
            try:
                data = next(requests, None)
            finally:
                del self._waiting[id(context)]
            if data is None:
                return
            if len(data) > max_bytes:
                raise ProtocolError(
                    f"a {kind.__name__} of {len(data)} bytes: at most {max_bytes} are allowed"
                )
            try:
                yield kind.FromString(data)
            except DecodeError as error:
                raise ProtocolError(
                    f"{len(data)} bytes came that are no {kind.__name__}; install the same fedsplit on both sides"
                ) from error

    def silent(self, longer_than_s: float) -> list[Any]:
        """The gRPC contexts of calls whose next message has been awaited for longer."""
        before = time.monotonic() - longer_than_s
        return [context for since, context in list(self._waiting.values()) if since < before]

"""How the deltas that sites trained at the encoder travel to the ServerApp: one safetensors file a site, in chunks.

`chunks_of` is the encoder's side, `Gatherer` the ServerApp's, which trusts sizes and bytes no further than it has checked
them. Both are driven by the Collect call (servicer.py, calls.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedsplit.core.encoder import Array
from fedsplit.core.errors import ProtocolError
from fedsplit.transport import encoder_pb2 as pb
from fedsplit.transport.frames import CHUNK_BYTES

Deltas = dict[str, dict[str, Array]]
_MAX_SITE_CHARACTERS = 128


def chunks_of(deltas: Mapping[str, Mapping[str, Array]]) -> Iterator[Any]:
    """The CollectChunks of all sites, made when they leave."""
    for site, delta in deltas.items():
        data = save({name: np.ascontiguousarray(value) for name, value in delta.items()})
        for offset in range(0, len(data), CHUNK_BYTES):
            total = 0 if offset else len(data)
            part = data[offset : offset + CHUNK_BYTES]
            yield pb.CollectChunk(site=site, total_bytes=total, data=part)


class Gatherer:
    """Puts the chunks together again. `max_bytes` is for all sites in all."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._taken = 0
        self._site = ""
        self._data = bytearray()
        self._total = 0
        self._deltas: Deltas = {}

    def feed(self, chunk: Any) -> None:
        """Take one chunk. Raises ProtocolError."""
        if chunk.total_bytes:
            self._begin(chunk)
        if chunk.site != self._site or len(self._data) + len(chunk.data) > self._total:
            raise ProtocolError(
                f"the encoder sent {len(chunk.data)} bytes for site {chunk.site[:100]!r} that do not continue those "
                f"of {self._site!r} ({len(self._data)} of {self._total} bytes)"
            )
        self._data += chunk.data
        if self._total and len(self._data) == self._total:
            self._deltas[self._site] = _read(self._site, bytes(self._data))
            self._data, self._total = bytearray(), 0

    def finish(self) -> Deltas:
        """All deltas. Raises ProtocolError when the last one is not whole."""
        self._check_whole()
        return self._deltas

    def _begin(self, chunk: Any) -> None:
        self._check_whole()
        self._taken += chunk.total_bytes
        if self._taken > self._max_bytes:
            raise ProtocolError(
                f"the encoder's deltas come to {self._taken} bytes or more: {self._max_bytes} are allowed"
            )
        if chunk.site in self._deltas or len(chunk.site) > _MAX_SITE_CHARACTERS:
            raise ProtocolError(
                f"the encoder sent a delta of site {chunk.site[:100]!r}: sites come once, with names of at most "
                f"{_MAX_SITE_CHARACTERS} characters"
            )
        self._site, self._total = chunk.site, chunk.total_bytes

    def _check_whole(self) -> None:
        if self._total:
            raise ProtocolError(
                f"the delta of site {self._site!r} ends after {len(self._data)} of {self._total} bytes"
            )


def _read(site: str, data: bytes) -> dict[str, Array]:
    """One site's delta. Raises ProtocolError unless it is finite float32 safetensors."""
    try:
        delta: dict[str, Array] = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProtocolError(
            f"the delta of site {site!r} could not be read ({type(error).__name__}: {str(error)[:200]}); it is "
            "safetensors bytes as fedsplit writes them"
        ) from error
    for name, value in delta.items():
        if value.dtype != np.float32 or not np.isfinite(value).all():
            raise ProtocolError(f"the delta of site {site!r}: {name[:200]!r} is not finite float32")
    return delta

"""Sends parts of files to sites: whole or from a byte on (Range, RFC 9110), so many at one time.

Which bytes a site may ask for is the caller's: backbone.py, production.py. Nothing is held but a chunk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from fedsplit.core.foreign import printable
from fedsplit.plant.wire import Refusal

MAX_TRANSFERS = 32
"""At one time; more are asked to come again. Each holds a chunk, an open file, and a thread while it reads."""
_RETRY_S = 3
_CHUNK = 1 << 18
# Of RFC 9110 the forms with one range; what is none of them is answered whole, as it says.
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


@dataclass(frozen=True)
class Blob:
    """Bytes that a site may ask for."""

    file: Path
    offset: int
    bytes: int
    sha256: str
    private: tuple[int, ...] = ()
    """The private blocks that they belong to: then nobody may have them."""


class Turns:
    """How many transfers go on. Of one event loop, so it needs no lock."""

    def __init__(self, limit: int) -> None:
        self._left = limit

    def take(self) -> bool:
        """One more, if there may be."""
        if not self._left:
            return False
        self._left -= 1
        return True

    def give(self) -> None:
        """One has ended."""
        self._left += 1


class _Transfer(StreamingResponse):
    """Gives its turn back however it ends, also where nobody listens any more."""

    turns: Turns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.turns.give()


def sent(blob: Blob, request: Request, turns: Turns) -> Response:
    """The bytes, or those that Range asks for."""
    etag = f'"{blob.sha256}"'
    headers = {"etag": etag, "accept-ranges": "bytes", "cache-control": "private, no-transform"}
    wanted = request.headers.get("range", "")
    if request.headers.get("if-range", etag) != etag:
        wanted = ""  # the beginning that the site has is of other bytes
    status, start, end = _span(wanted, blob.bytes)
    if status != 200:
        said = f"{start}-{end - 1}" if status == 206 else "*"
        headers["content-range"] = f"bytes {said}/{blob.bytes}"
    if status == 416:
        return Response(status_code=status, headers=headers)
    headers["content-length"] = str(end - start)
    if not turns.take():
        refusal = refused(503, "busy", "too many sites fetch just now; try again in some seconds")
        refusal.headers["retry-after"] = str(_RETRY_S)
        return refusal
    answer = _Transfer(
        _chunks(blob.file, blob.offset + start, end - start),
        status_code=status,
        headers=headers,
        media_type="application/octet-stream",
    )
    answer.turns = turns
    return answer


def _span(wanted: str, size: int) -> tuple[int, int, int]:
    """(status, start, end) of what a Range header asks for: 200 all, 206 a part, 416 where there are no such bytes."""
    match = _RANGE.fullmatch(wanted)
    first, last = match.groups() if match else ("", "")
    if not first and not last:
        return 200, 0, size
    if not first:  # the last so many
        start, end = max(size - int(last), 0), size
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return 200, 0, size
    return (206, start, end) if start < end else (416, 0, 0)


def _chunks(file: Path, offset: int, size: int) -> Iterator[bytes]:
    with file.open("rb") as handle:
        handle.seek(offset)
        while size:
            chunk = handle.read(min(size, _CHUNK))
            if not chunk:
                raise OSError(f"{file} became shorter while it was sent")
            size -= len(chunk)
            yield chunk


def refused(status: int, kind: str, message: str) -> Response:
    """An answer that says why there are no bytes."""
    told = Refusal(kind=kind, message=printable(message, limit=2000))
    return JSONResponse({"error": told.model_dump()}, status)

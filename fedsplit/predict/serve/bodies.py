"""A request's body: read no further than is allowed, and turned into samples for the module that answers.

An image is the body itself. JSON is {"text": ...} or {"image": BASE64}, or a list of them. A text may also come as
text/plain. curl says `application/x-www-form-urlencoded` of whatever it sends, so where the type says nothing the first
byte does.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from fedsplit.core.errors import DataError, OverloadedError
from fedsplit.core.foreign import parse_json, printable
from fedsplit.predict.predictor import Predictor, Sample
from fedsplit.training.data.image_files import MAX_FILE_BYTES

MAX_TEXT_BYTES = 4 * 2**20
"""Of a body with texts."""
MAX_ITEMS = 64
"""Samples of one request."""
READ_S = 30.0
"""How long a body may take to arrive."""
_HELD_BODIES = 4
_JSON = ("application/json", "text/json")
_IMAGES = ("application/octet-stream", "application/x-www-form-urlencoded", "")
"""Types that say nothing."""
_SEND = {
    "image": 'send the image itself as the body (curl --data-binary @FILE), or JSON: {"image": BASE64}, or a list of them',
    "text": 'send JSON: {"text": TEXT} or a list of them (curl --json \'{"text": "..."}\')',
}


class Room:
    """Bytes of all bodies that are held at a time."""

    def __init__(self, most: int = _HELD_BODIES * MAX_FILE_BYTES) -> None:
        self._most, self._held = most, 0
        self._lock = threading.Lock()

    @contextmanager
    def held(self) -> Iterator[_Held]:
        """Room for a body, which grows as it arrives."""
        mine = _Held(self)
        try:
            yield mine
        finally:
            with self._lock:
                self._held -= mine.bytes

    def take(self, size: int) -> None:
        """Raises OverloadedError where there is no room."""
        with self._lock:
            if self._held + size > self._most:
                raise OverloadedError(
                    f"bodies of {self._held} bytes are held here, {self._most} is the most; ask again in a second",
                    retry_after_s=1.0,
                )
            self._held += size


@dataclass(eq=False)
class _Held:
    room: Room
    bytes: int = 0

    def add(self, size: int) -> None:
        self.room.take(size)
        self.bytes += size


@dataclass(frozen=True, eq=False)
class Body:
    """A body and what its sender says it is."""

    raw: bytes
    type: str
    """Of the content, in small letters, without parameters."""

    @property
    def is_json(self) -> bool:
        """Is it JSON, by its type or, where that says nothing, by its first byte?"""
        if self.type in _JSON or self.type.endswith("+json"):
            return True
        return self.type in _IMAGES and self._first in (b"{", b"[", b'"')

    @property
    def is_list(self) -> bool:
        """Is it a list of samples, so that the answer is one too?"""
        return self.is_json and self._first == b"["

    @property
    def _first(self) -> bytes:
        return self.raw[:64].lstrip()[:1]


async def read_body(request: Request, held: _Held, kind: Literal["image", "text"]) -> Body:
    """The body of a request. Raises HTTPException for what is too long, too slow, or packed, and OverloadedError."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "the body is packed (Content-Encoding); send it as it is")
    most = MAX_FILE_BYTES if kind == "image" else MAX_TEXT_BYTES
    said = request.headers.get("content-length", "0")
    if said.isdecimal() and int(said[:20]) > most:
        raise _too_long(said[:20], most)
    found = bytearray()
    try:
        async with asyncio.timeout(READ_S):
            async for piece in request.stream():
                if len(found) + len(piece) > most:
                    raise _too_long(f"more than {most}", most)
                held.add(len(piece))
                found += piece
    except TimeoutError as err:
        raise HTTPException(
            408, f"the body has not arrived within {READ_S:g} s; send it again, faster"
        ) from err
    except ClientDisconnect as err:
        raise HTTPException(
            400, "the connection was closed before all of the body was here"
        ) from err
    return Body(
        bytes(found), request.headers.get("content-type", "").partition(";")[0].strip().lower()
    )


def _too_long(said: str, most: int) -> HTTPException:
    return HTTPException(
        413, f"the body has {said} bytes, {most} is the most; send fewer or smaller samples"
    )


def samples_of(body: Body, predictor: Predictor) -> list[Sample]:
    """The samples in a body. Raises HTTPException(415) for a type that is none of ours, DataError for what is malformed."""
    kind = predictor.kind
    if not body.raw:
        raise DataError(f"the body is empty; {_SEND[kind]}")
    if body.is_json:
        return _of_json(body.raw, kind)
    if kind == "text" and body.type == "text/plain":
        try:
            return [body.raw.decode("utf-8")]
        except UnicodeDecodeError as err:
            raise DataError("the text is not UTF-8; save it as UTF-8 and send it again") from err
    if kind == "image" and (body.type in _IMAGES or body.type.startswith("image/")):
        return [body.raw]
    raise HTTPException(
        415,
        f"a body of type {printable(body.type, limit=80) or 'unknown'} came, and the module reads {kind}s; {_SEND[kind]}",
    )


def _of_json(raw: bytes, kind: Literal["image", "text"]) -> list[Sample]:
    try:
        said = parse_json(raw, limit=MAX_FILE_BYTES)
    except ValueError as err:
        raise DataError(
            f"the body is no JSON ({printable(err, limit=200)}); {_SEND[kind]}"
        ) from err
    if not isinstance(said, list):
        return [_sample(said, kind, "")]
    if not 0 < len(said) <= MAX_ITEMS:
        raise DataError(f"a list of {len(said)} samples came, 1 to {MAX_ITEMS} are taken at once")
    return [_sample(one, kind, f"sample {i}: ") for i, one in enumerate(said, 1)]


def _sample(said: Any, kind: Literal["image", "text"], where: str) -> Sample:
    value = said.get(kind) if isinstance(said, dict) and set(said) == {kind} else None
    if kind == "text" and isinstance(said, str):
        value = said
    if not isinstance(value, str):
        raise DataError(f"{where}{_found(said)} came, and the module reads {kind}s; {_SEND[kind]}")
    if kind == "text":
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as err:
        raise DataError(
            f"{where}the image is no base64 ({printable(err, limit=100)}); encode the file's bytes"
        ) from err


def _found(said: Any) -> str:
    if isinstance(said, dict):
        keys = ", ".join(printable(key, limit=40) for key in list(said)[:5])
        return f"an object with {keys}" if keys else "an empty object"
    return f"a value of type {type(said).__name__}"

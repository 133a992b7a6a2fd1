"""Brings bytes of a known size from the control service, over lines that break.

What has come stays, and the next request asks for the rest (Range, RFC 9110). It tries on for as long as new bytes come
now and then. What is done with the bytes, and whether they are the right ones, is the caller's.
"""

from __future__ import annotations

import contextlib
import logging
import random
import re
import ssl
from collections.abc import Callable, Iterable, Iterator
from time import monotonic, sleep
from typing import Protocol

import httpx

from fedsplit.core.errors import ServerAwayError, ServerRefusalError
from fedsplit.core.foreign import printable
from fedsplit.plant.site.line_faults import away, refuse

log = logging.getLogger(__name__)

PATIENCE_S = 300.0
"""How long nothing new may come before it is given up."""
Say = Callable[[str], None]
_WAIT_S, _LONGEST_WAIT_S = 1.0, 30.0
_TELL_AT = 3
_MAX_REFUSAL_BYTES = 64 << 10
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})")


class Sink(Protocol):
    """Where bytes go."""

    def have(self) -> int:
        """How many are there, from the beginning."""

    def write(self, start: int, chunks: Iterable[bytes]) -> None:
        """Put `chunks` at `start`, in place of what is there from that byte on. What comes before one fails stays."""


class GoneError(ServerRefusalError):
    """The server has not what was asked for, or not any more."""


class _LineError(Exception):
    """What may pass: nobody answers, the line was cut, the server is busy."""

    def __init__(self, why: str, *, after_s: float = 0.0) -> None:
        super().__init__(why)
        self.after_s = after_s


class Ranges:
    """One control service, asked by one thread."""

    def __init__(
        self,
        client: httpx.Client,
        *,
        say: Say = log.info,
        patience_s: float = PATIENCE_S,
        what: str = "backbone",
    ) -> None:
        """`what` is brought, in a word."""
        self._client, self._say, self._patience_s, self._what = client, say, patience_s, what
        self._address = client.base_url.netloc.decode("ascii")
        self._heard, self._failures = monotonic(), 0

    def whole(self, path: str, most: int) -> bytes:
        """All bytes of an answer of unknown size. Raises PlantError: refused, more than `most`, nothing came."""
        self._begin()
        while True:
            try:
                with self._asked(path, {}) as answer:
                    found = bytearray()
                    for chunk in answer.iter_raw():
                        found += chunk
                        if len(found) > most:
                            raise ServerAwayError(
                                f"{path} has more than {most} bytes; is it a fedsplit server?"
                            )
                    return bytes(found)
            except _LineError as err:
                self._wait(err)

    def fill(self, path: str, sha256: str, size: int, sink: Sink) -> None:
        """Go on until `sink` has `size` bytes. Raises PlantError: refused, no such range, nothing came."""
        self._begin()
        furthest = sink.have()
        while (have := sink.have()) != size:
            have = have if have < size else 0
            asked = {"range": f"bytes={have}-", "if-range": f'"{sha256}"'} if have else {}
            try:
                with self._asked(path, asked) as answer:
                    start = _start(answer, have, size)
                    sink.write(start, answer.iter_raw())
                raise _LineError("the line was cut")
            except _LineError as err:
                if (now := sink.have()) == size:
                    return
                if now > furthest:
                    furthest = now
                    self._begin()
                self._wait(err)

    def _begin(self) -> None:
        self._heard, self._failures = monotonic(), 0

    def _wait(self, err: _LineError) -> None:
        """Until it is tried again. Raises ServerAwayError where that went on for too long."""
        self._failures += 1
        wait = min(_WAIT_S * 2 ** (self._failures - 1), _LONGEST_WAIT_S)
        # Sites that lost one server together do not come back together.
        wait = max(wait * random.uniform(0.5, 1.0), err.after_s)
        if monotonic() - self._heard + wait > self._patience_s:
            raise ServerAwayError(
                f"the {self._what} does not come from the server: {err}. Nothing new came for {self._patience_s:g} s. What is "
                f"here stays: fetch again when the line is up"
            ) from err
        if self._failures == _TELL_AT:
            self._say(f"nothing comes from the server ({err}); trying on")
        sleep(wait)

    @contextlib.contextmanager
    def _asked(self, path: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
        # Nothing that unpacks to more than it is.
        headers = {"accept-encoding": "identity", **headers}
        try:
            with self._client.stream("GET", path, headers=headers) as answer:
                if answer.status_code not in (200, 206, 416):
                    self._refuse(answer)
                yield answer
        except httpx.TransportError as err:
            told = away(err, self._address)
            if _is_about_certificates(err):
                raise told from err
            raise _LineError(str(told)) from err

    def _refuse(self, answer: httpx.Response) -> None:
        """Raise what an answer that is none of those wanted means."""
        text = bytearray()
        for chunk in answer.iter_raw():
            text += chunk[: _MAX_REFUSAL_BYTES - len(text)]
        try:
            refuse(answer.status_code, bytes(text), self._address)
        except ServerAwayError as err:
            if answer.status_code == 404:
                raise
            after = answer.headers.get("retry-after", "")
            after_s = float(after) if after.isdigit() and len(after) < 4 else 0.0
            raise _LineError(str(err), after_s=min(after_s, _LONGEST_WAIT_S)) from err
        except ServerRefusalError as err:
            if answer.status_code == 404:
                raise GoneError(str(err)) from err
            raise


def _start(answer: httpx.Response, have: int, size: int) -> int:
    """From which byte on the answer goes. Raises GoneError."""
    if answer.status_code == 200:
        return 0
    given = answer.headers.get("content-range", "")
    match = _CONTENT_RANGE.fullmatch(given)
    if answer.status_code == 416 or match is None or (int(match[1]), int(match[2])) != (have, size):
        raise GoneError(
            f"the bytes from {have} on of {size} were asked for, the server gives {printable(given, limit=60) or 'none'}; "
            f"its files have changed, or something between does not pass ranges on"
        )
    return have


def _is_about_certificates(err: BaseException | None) -> bool:
    while err is not None:
        if isinstance(err, ssl.SSLCertVerificationError):
            return True
        err = err.__cause__ or err.__context__
    return False

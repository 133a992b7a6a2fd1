"""Who may have a session: the server's limits, and the counts that they are held against.

One `Admission` a server; it is the one place that knows what is live, so `stats()` is exact.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from fedsplit.core.errors import OverloadedError, RefusedError
from fedsplit.core.memory import available_bytes
from fedsplit.transport.tokens import LEEWAY_S, SiteToken


class Limits(BaseModel):
    """What the encoder's port allows, whatever a token says. Memory: see `session_bytes`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_sessions: int = Field(default=32, ge=1, le=1024)
    """Live streams in all; each has two threads."""
    max_sessions_per_site: int = Field(default=2, ge=1)
    """Live streams of one site of one run: the present one, and a lost one that nobody has missed yet. Those with which a
    site predicts are counted by themselves."""
    max_inference_sessions: int = Field(default=8, ge=0)
    """Live streams that predict, of all sites; so many at most of `max_sessions` are not a run's."""
    max_message_bytes: int = Field(default=64 << 20, ge=1 << 10, lt=1 << 32)
    """Payload of one tensor as it travels."""
    max_kept_steps: int = Field(default=8, ge=1)
    """Steps of a session whose graph waits for its gradient."""
    max_kept_bytes: int = Field(default_factory=lambda: available_bytes() // 2, ge=1 << 10)
    """Graphs of all sessions' kept steps together, as measured; by default half of the memory that is free at the start."""
    room_timeout_s: float = Field(default=60.0, gt=0)
    """So long a step waits for room that other sessions' graphs take."""
    max_publish_bytes: int = Field(default=256 << 20, ge=1)
    """One module version."""
    hello_timeout_s: float = Field(default=20.0, gt=0)
    """A stream that has said nothing by then is ended."""
    idle_timeout_s: float = Field(default=300.0, gt=0)
    """So long may a session be silent, or not read what is sent to it."""
    retry_after_s: float = Field(default=2.0, gt=0)
    """What a site is told that finds no free session."""
    max_pace_wait_s: float = Field(default=30.0, gt=0)
    """So long waits a step of a site that predicts faster than it may; beyond that it is told when to come back."""
    clock_leeway_s: float = Field(default=LEEWAY_S, ge=0)
    """So far may the clocks of signer and encoder differ."""

    @property
    def session_bytes(self) -> int:
        """Most tensor bytes that one session holds here outside the host; graphs are held to `max_kept_bytes` in all.

        In messages: one in assembly, two ahead, one in work and decoded to float32 (2, were it fp16), the
        answer (2) and its encoding: 9.
        """
        return 9 * self.max_message_bytes


class Stats(BaseModel):
    """Counters since the server's start, and what is live now."""

    model_config = ConfigDict(frozen=True)

    live_sessions: int
    kept_steps: int
    kept_bytes: int
    sessions: int
    encoded: int
    backpropped: int
    probed: int
    scored: int
    predicted: int
    """Samples of sessions that predict."""
    published: int
    refused: dict[str, int]
    """By reason: token, certificate, revoked, overloaded, and the wire's error codes."""


_BURST_S = 10.0
"""A site that was idle may predict so many seconds' samples at once."""


class _Place(NamedTuple):
    """What a session's place is counted under. None: it predicts, for no run."""

    run: str | None
    site: str

    @classmethod
    def of(cls, token: SiteToken) -> _Place:
        grant = token.grant
        return cls(grant.run if grant.inference is None else None, grant.site)


@dataclass
class _Used:
    steps: int = 0
    rows: int = 0
    expires: float = 0.0
    live: bool = False


@dataclass
class Admission:
    """Counts live sessions by site and token, steps and samples by token, and samples a minute by site."""

    limits: Limits
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _sites: Counter[_Place] = field(default_factory=Counter)
    _tokens: dict[str, _Used] = field(default_factory=dict)
    _counts: Counter[str] = field(default_factory=Counter)
    _refused: Counter[str] = field(default_factory=Counter)
    _kept_bytes: int = 0
    _paces: dict[str, float] = field(default_factory=dict)
    """Site -> monotonic seconds when what it has asked would be done at the pace that it was granted."""

    def __post_init__(self) -> None:
        self._room = threading.Condition(self._lock)

    @contextmanager
    def admit(self, token: SiteToken) -> Iterator[None]:
        """Hold a session's place. Raises OverloadedError when there is none."""
        place = _Place.of(token)
        with self._lock:
            self._forget_expired()
            self._check_room(place, token)
            self._sites[place] += 1
            used = self._tokens.setdefault(token.id, _Used(expires=token.expires))
            used.live = True
            self._counts["sessions"] += 1
        try:
            yield
        finally:
            with self._lock:
                self._sites[place] -= 1
                if not self._sites[place]:
                    del self._sites[place]
                used.live = False

    def take_step(self, token: SiteToken, rows: int) -> float:
        """Count a step of so many samples against the token, over all its streams. Gives the seconds that it has to wait.

        Raises RefusedError beyond the token's limits, OverloadedError for a site that predicts far too fast.
        """
        grant = token.grant
        with self._lock:
            used = self._tokens[token.id]
            if used.steps >= grant.max_steps:
                raise RefusedError(
                    f"the token allows {grant.max_steps} steps and all are used; ask for a new one"
                )
            wait_s = self._paced(token, used, rows) if grant.inference else 0.0
            used.steps += 1
            used.rows += rows
            return wait_s

    def _paced(self, token: SiteToken, used: _Used, rows: int) -> float:
        """The wait of a step that predicts: a site's samples leave at its pace, `_BURST_S` of them at once."""
        site, inference = token.grant.site, token.grant.inference
        assert inference is not None, "asked for sessions that predict alone"
        over_s = time.time() - token.expires - self.limits.clock_leeway_s
        if over_s > 0:
            raise RefusedError(
                f"the grant to predict ended {over_s:.0f} s ago, also for a stream that is open; ask for a new one"
            )
        if used.rows + rows > inference.max_rows:
            raise RefusedError(
                f"the grant to predict allows {inference.max_rows} samples, {used.rows} are used and this step has {rows}; "
                "ask for a new one"
            )
        now = time.monotonic()
        done = max(self._paces.get(site, 0.0), now - _BURST_S)
        wait_s = max(0.0, done - now)
        if wait_s > self.limits.max_pace_wait_s:
            raise OverloadedError(
                f"site {site} may predict {inference.rows_per_minute} samples a minute and has asked for more",
                retry_after_s=wait_s,
            )
        self._paces[site] = done + rows * 60 / inference.rows_per_minute
        self._counts["predicted"] += rows
        return wait_s

    def keep(self, size: int, *, held: bool) -> None:
        """Take room for the graph of a step: `size` bytes. `held`: this session holds one already, so it does not wait.

        Raises RefusedError for a step that never fits, OverloadedError where others' graphs leave no room.
        """
        most = self.limits.max_kept_bytes
        if size > most:
            raise RefusedError(
                f"the graph of this step takes {size} bytes at the encoder, {most} are allowed for all sessions; use a "
                f"smaller batch-size or a cut with fewer blocks at the server, or give the encoder more memory"
            )
        wait_s = 0.0 if held else self.limits.room_timeout_s
        with self._room:
            if not self._room.wait_for(lambda: self._kept_bytes + size <= most, wait_s):
                raise OverloadedError(
                    f"graphs of other steps take {self._kept_bytes} of {most} bytes and this step wants {size}",
                    retry_after_s=self.limits.retry_after_s,
                )
            self._kept_bytes += size

    def release(self, size: int) -> None:
        """Give room back."""
        with self._room:
            self._kept_bytes -= size
            self._room.notify_all()

    def count(self, what: str, by: int = 1) -> None:
        """Count something for `stats`: encoded, backpropped, probed, scored, published, kept (also downwards)."""
        with self._lock:
            self._counts[what] += by

    def refuse(self, reason: str) -> None:
        """Count a refusal."""
        with self._lock:
            self._refused[reason] += 1

    def stats(self) -> Stats:
        """A snapshot."""
        with self._lock:
            c = self._counts
            return Stats(
                live_sessions=self._sites.total(),
                kept_steps=c["kept"],
                kept_bytes=self._kept_bytes,
                sessions=c["sessions"],
                encoded=c["encoded"],
                backpropped=c["backpropped"],
                probed=c["probed"],
                scored=c["scored"],
                predicted=c["predicted"],
                published=c["published"],
                refused=dict(self._refused),
            )

    def _check_room(self, place: _Place, token: SiteToken) -> None:
        limits, live = self.limits, self._sites.total()
        predicting = sum(n for p, n in self._sites.items() if p.run is None)
        used = self._tokens.get(token.id)
        if used is not None and used.live:
            what = "this token already has a live stream; a token is for one stream at a time"
        elif self._sites[place] >= limits.max_sessions_per_site:
            what = f"site {place.site} already has {self._sites[place]} live sessions, {limits.max_sessions_per_site} are allowed"
        elif place.run is None and predicting >= limits.max_inference_sessions:
            what = f"{predicting} sessions that predict are live, {limits.max_inference_sessions} are allowed"
        elif live >= limits.max_sessions:
            what = f"{live} sessions are live, {limits.max_sessions} are allowed"
        else:
            return
        raise OverloadedError(what, retry_after_s=limits.retry_after_s)

    def _forget_expired(self) -> None:
        now = time.time() - 2 * self.limits.clock_leeway_s
        for token_id in [
            i for i, used in self._tokens.items() if used.expires < now and not used.live
        ]:
            del self._tokens[token_id]
        idle = time.monotonic() - _BURST_S
        for site in [s for s, done in self._paces.items() if done < idle]:
            del self._paces[site]

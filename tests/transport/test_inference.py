"""Sessions that predict: forwards and nothing else, within limits of their own; hostile clients with either kind of token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from threading import Timer
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from fedsplit.core.encoder import Grant, Inference
from fedsplit.core.errors import OverloadedError, RefusedError
from fedsplit.transport import tokens
from fedsplit.transport.client import StreamEncoder, capabilities, collect, publish
from fedsplit.transport.frames import Flag, FrameKind
from fedsplit.transport.server import EncoderServer, Limits
from tests.transport.conftest import (
    HOSTED,
    KEY,
    ZEROTH,
    FakeHost,
    RawClient,
    connect,
    eventually,
    make_grant,
    make_h,
)

VERSION = "cd" * 32


def to_predict(**changes: Any) -> Grant:
    limits = {"max_rows": 1000, "rows_per_minute": 100_000}
    limits |= {key: changes.pop(key) for key in tuple(changes) if key in limits}
    return make_grant(
        run="predict", round=0, version=VERSION, inference=Inference(**limits), **changes
    )


@pytest.fixture(autouse=True)
def _registered(host: FakeHost) -> None:
    host.published[VERSION] = b"registered"


@pytest.fixture
def small(host: FakeHost) -> Iterator[Callable[..., EncoderServer]]:
    """Makes a server with the limits of a test."""
    running: list[EncoderServer] = []

    def make(**limits: Any) -> EncoderServer:
        running.append(EncoderServer(host, key=KEY, limits=Limits(**limits)))
        return running[-1]

    yield make
    for one in running:
        one.close()


def test_a_session_that_predicts_gets_forwards(server: EncoderServer, host: FakeHost) -> None:
    with connect(server.address, to_predict()) as stream:
        assert stream.welcome.inference
        h_BTD = make_h(4, 6, 8)
        for step in range(3):
            np.testing.assert_array_equal(stream.encode(step, h_BTD), 2 * h_BTD + 1)
    stats = server.stats()
    assert (stats.encoded, stats.predicted, stats.kept_steps) == (3, 12, 0)
    with connect(server.address) as stream:
        assert not stream.welcome.inference
        stream.encode(0, make_h())
    assert server.stats().predicted == 12


WRONG: dict[str, Callable[[RawClient], list[bytes]]] = {
    "keep": lambda c: c.tensor(FrameKind.ENCODE, make_h(), flags=Flag.KEEP),
    "backprop": lambda c: c.tensor(FrameKind.BACKPROP, make_h()),
    "quiet": lambda c: c.tensor(FrameKind.BACKPROP, make_h(), flags=Flag.QUIET),
    "probe": lambda c: c.tensor(FrameKind.PROBE, make_h()),
    "score": lambda c: c.tensor(FrameKind.SCORE, np.ones(3, np.float32)),
    "masked keep": lambda c: [
        *c.mask(2, 3),
        *c.tensor(FrameKind.ENCODE, make_h(), flags=Flag.KEEP | Flag.MASK),
    ],
}


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("wrong", WRONG)
def test_a_token_to_predict_neither_keeps_nor_settles(
    wrong: str, server: EncoderServer, host: FakeHost
) -> None:
    with RawClient(server.address, to_predict()) as client:
        client.greet()
        client.send(*WRONG[wrong](client))
        error = client.error()
    assert error.code == "refused"
    assert "one to predict" in error.message
    assert not host.learned
    assert not host.scored
    assert not host.encoders[0].kept


def test_a_token_to_predict_neither_publishes_nor_collects(
    server: EncoderServer, host: FakeHost
) -> None:
    token = tokens.sign(to_predict(), KEY, 60)
    with pytest.raises(RefusedError, match="the token is for something else"):
        publish(server.address, token, "v9", b"tensors")
    with pytest.raises(RefusedError, match="the token is for something else"):
        collect(server.address, token, VERSION)
    assert "v9" not in host.published
    assert capabilities(server.address, token).blocks == 12


@pytest.mark.parametrize(
    ("grant", "audience"),
    [
        (to_predict(), tokens.SITE_AUDIENCE),
        (make_grant(), tokens.INFERENCE_AUDIENCE),
        (make_grant(training=HOSTED), tokens.INFERENCE_AUDIENCE),
    ],
)
def test_a_token_is_of_one_purpose(server: EncoderServer, grant: Grant, audience: str) -> None:
    """Also where whoever has the key signs what contradicts itself."""
    claims = {"grant": grant.model_dump(exclude_defaults=True)}
    token = tokens._sign(audience, grant.site, KEY, 60, claims)
    with pytest.raises(RefusedError, match="a run's token does not predict"):
        StreamEncoder(server.address, token, grant)
    with pytest.raises(RefusedError, match="a run's token does not predict"):
        capabilities(server.address, token)


def test_what_a_grant_to_predict_says() -> None:
    for training in (HOSTED, ZEROTH):
        with pytest.raises(ValidationError, match="exclude each other"):
            to_predict(training=training)
    with pytest.raises(ValidationError, match="64 hexadecimal digits"):
        make_grant(inference=Inference(max_rows=1, rows_per_minute=1))


def test_samples_are_counted_over_a_tokens_streams(server: EncoderServer) -> None:
    grant = to_predict(max_rows=5)
    token = tokens.sign(grant, KEY, 60)
    with StreamEncoder(server.address, token, grant) as stream:
        stream.encode(0, make_h(4, 3, 8))
    eventually(lambda: server.stats().live_sessions == 0)
    with StreamEncoder(server.address, token, grant) as stream:
        stream.encode(0, make_h(1, 3, 8))
        with pytest.raises(RefusedError, match="allows 5 samples, 5 are used and this step has 1"):
            stream.encode(1, make_h(1, 3, 8))
    eventually(lambda: server.stats().live_sessions == 0)
    with connect(server.address, grant) as fresh:
        fresh.encode(0, make_h(4, 3, 8))


def test_a_stream_does_not_outlive_its_grant(small: Callable[..., EncoderServer]) -> None:
    server = small(clock_leeway_s=0.0)
    grant = to_predict()
    with StreamEncoder(server.address, tokens.sign(grant, KEY, 0.5), grant) as stream:
        stream.encode(0, make_h())
        time.sleep(0.6)
        with pytest.raises(RefusedError, match=r"grant to predict ended .* ask for a new one"):
            stream.encode(1, make_h())


def test_who_asks_too_fast_waits(small: Callable[..., EncoderServer]) -> None:
    """Over all of a site's tokens; another site does not wait for it."""
    server = small(max_pace_wait_s=5.0)
    slow = to_predict(rows_per_minute=240)  # 4 a second, 40 at once
    with connect(server.address, slow) as first, connect(server.address, slow) as second:
        for step in range(5):
            first.encode(step, make_h(4, 3, 8))
            second.encode(step, make_h(4, 3, 8))
        started = time.monotonic()
        first.encode(5, make_h(1, 3, 8))  # the 41st: at once, the next ones at their pace
        second.encode(5, make_h(1, 3, 8))
        second.encode(6, make_h(1, 3, 8))
        assert 0.3 < time.monotonic() - started < 3
        started = time.monotonic()
        with connect(server.address, slow.model_copy(update={"site": "site-2"})) as other:
            other.encode(0, make_h(4, 3, 8))
        assert time.monotonic() - started < 1
    hasty = to_predict(rows_per_minute=1, site="site-3")
    with connect(server.address, hasty) as stream:
        stream.encode(0, make_h(4, 3, 8))
        with pytest.raises(OverloadedError, match="may predict 1 samples a minute") as caught:
            stream.encode(1, make_h(1, 3, 8))
    assert 200 < caught.value.retry_after_s <= 240


def test_predicting_leaves_runs_their_places(small: Callable[..., EncoderServer]) -> None:
    server = small(max_sessions=3, max_sessions_per_site=2, max_inference_sessions=1)
    with connect(server.address, to_predict(site="a")):
        with pytest.raises(
            OverloadedError, match="1 sessions that predict are live, 1 are allowed"
        ):
            connect(server.address, to_predict(site="b"))
        # A run's sessions of the same site have places of their own.
        with (
            connect(server.address, make_grant(site="a")),
            connect(server.address, make_grant(site="a")),
        ):
            assert server.stats().live_sessions == 3


def test_a_site_that_waits_for_its_turn_is_put_out_at_once(
    small: Callable[..., EncoderServer],
) -> None:
    server = small()
    with connect(server.address, to_predict(rows_per_minute=8)) as stream:
        stream.encode(0, make_h(4, 3, 8))
        started = time.monotonic()
        # The next waits for 20 s; the server's end comes first.
        Timer(0.3, lambda: server.close(grace_s=0.2)).start()
        with pytest.raises(Exception, match=r"shutting down|was lost"):
            stream.encode(1, make_h(4, 3, 8))
        assert time.monotonic() - started < 5

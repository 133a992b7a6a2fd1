"""Deltas from the encoder to the ServerApp: who may have them, and what the ServerApp does not believe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.core.errors import ProtocolError, RefusedError, UnreachableError
from fedsplit.transport import encoder_pb2 as pb
from fedsplit.transport.client import collect
from fedsplit.transport.deltas import Gatherer, chunks_of
from fedsplit.transport.server import EncoderServer
from fedsplit.transport.tokens import sign, sign_publisher
from tests.transport.conftest import HOSTED, KEY, FakeHost, connect, make_grant, make_h, token_for

DELTAS = {
    "site-1": {"w": make_h(3, 4), "b": make_h(4)},
    "site-2": {"w": make_h(1000, 700)},  # of several chunks
    "": {"scalar": np.float32(2).reshape(())},
}


def publisher() -> str:
    return sign_publisher("run", KEY, 60)


def assert_same(got: Any, wanted: Any) -> None:
    assert got.keys() == wanted.keys()
    for site in wanted:
        assert got[site].keys() == wanted[site].keys()
        for name, value in wanted[site].items():
            np.testing.assert_array_equal(got[site][name], value)


def test_over_the_wire_once(server: EncoderServer, host: FakeHost) -> None:
    host.trained["v0"] = DELTAS
    assert_same(collect(server.address, publisher(), "v0"), DELTAS)
    assert collect(server.address, publisher(), "v0") == {}


def test_who_may_not(server: EncoderServer, host: FakeHost) -> None:
    host.trained["v0"] = DELTAS
    for token in (token_for(make_grant()), sign_publisher("run", KEY, -100), "x"):
        with pytest.raises(RefusedError):
            collect(server.address, token, "v0")
    with pytest.raises(RefusedError, match="not published"):
        collect(server.address, publisher(), "v9")
    for version in ("", "v" * 129):
        with pytest.raises(ProtocolError, match="1 to 128 characters"):
            collect(server.address, publisher(), version)
    assert host.trained["v0"] is DELTAS


def test_more_than_the_server_app_takes(server: EncoderServer, host: FakeHost) -> None:
    host.trained["v0"] = DELTAS
    with pytest.raises(ProtocolError, match="1000000 are allowed"):
        collect(server.address, publisher(), "v0", max_bytes=1_000_000)


def test_a_host_that_fails(
    server: EncoderServer, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "collect", lambda version: 1 / 0)
    with pytest.raises(Exception, match="its log says why"):
        collect(server.address, publisher(), "v0")
    server.close()
    with pytest.raises(UnreachableError):
        collect(server.address, publisher(), "v0", timeout_s=3)


def gathered(chunks: Iterator[Any] | list[Any], max_bytes: int = 1 << 24) -> Any:
    gatherer = Gatherer(max_bytes)
    for chunk in chunks:
        gatherer.feed(chunk)
    return gatherer.finish()


def chunk(site: str, total: int, data: bytes) -> Any:
    return pb.CollectChunk(site=site, total_bytes=total, data=data)


def whole(site: str, value: Any) -> list[Any]:
    return list(chunks_of({site: {"w": value}}))


LONG = list(chunks_of({"s": DELTAS["site-2"]}))
BAD = {
    "not safetensors": ([chunk("s", 3, b"abc")], "could not be read"),
    "a huge header": ([chunk("s", 16, b"\xff" * 16)], "could not be read"),
    "no beginning": ([chunk("s", 0, b"abc")], "do not continue"),
    "more than was said": ([chunk("s", 2, b"abc")], "do not continue"),
    "another site between": ([LONG[0], chunk("t", 0, b"x")], "do not continue"),
    "begun anew": ([LONG[0], LONG[0]], "ends after"),
    "cut off": (LONG[:-1], "ends after"),
    "twice": (whole("s", make_h(2)) * 2, "sites come once"),
    "a long name": (whole("s" * 129, make_h(2)), "at most 128"),
    "too large": ([chunk("s", 1 << 40, b"x")], "are allowed"),
    "float64": (whole("s", np.ones(2)), "not finite float32"),
    "NaN": (whole("s", np.full(2, np.nan, np.float32)), "not finite float32"),
}


@pytest.mark.parametrize(("chunks", "says"), BAD.values(), ids=BAD.keys())
def test_malformed(chunks: list[Any], says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        gathered(chunks)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(st.sampled_from(["", "s"]), st.integers(0, 200), st.binary(max_size=120)),
        max_size=4,
    )
)
def test_chunks_of_anything(chunks: list[tuple[str, int, bytes]]) -> None:
    try:
        deltas = gathered([chunk(*c) for c in chunks], max_bytes=400)
    except ProtocolError:
        return
    assert all(not delta for delta in deltas.values())  # chance makes no tensor


@settings(deadline=None, max_examples=200)
@given(at=st.integers(0, 120), value=st.integers(0, 255))
def test_a_damaged_file(at: int, value: int) -> None:
    (one,) = whole("s", make_h(2, 3))
    raw = bytearray(one.data)
    raw[at % len(raw)] = value
    try:
        deltas = gathered([chunk("s", len(raw), bytes(raw))])
    except ProtocolError:
        return
    assert all(v.dtype == np.float32 and np.isfinite(v).all() for v in deltas["s"].values())


def test_the_stream_asks_the_host_to_learn(server: EncoderServer, host: FakeHost) -> None:
    with connect(server.address, make_grant(training=HOSTED)) as stream:
        assert stream.trains
        stream.encode(5, make_h(), want="gradient")
        stream.settle(5, make_h(), quiet=True)
        with pytest.raises(ProtocolError, match="not kept"):
            stream.settle(5, make_h(), quiet=True)
        assert stream.payload_down == make_h().nbytes
    assert [shape for shape, _ in host.learned] == [make_h().shape]
    stats = server.stats()
    assert (stats.backpropped, stats.kept_steps) == (1, 0)


def test_a_token_for_training_is_a_sites(server: EncoderServer) -> None:
    with pytest.raises(RefusedError):
        collect(server.address, sign(make_grant(training=HOSTED), KEY, 60), "v0")

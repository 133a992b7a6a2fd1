"""Foreign bytes at a service: they are refused in words, bounded before they are held, and the service goes on."""

from __future__ import annotations

import gzip
import json
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsplit.core.errors import OverloadedError
from fedsplit.predict.predictor import load_predictor
from fedsplit.predict.serve.answering import Answering
from fedsplit.predict.serve.bodies import MAX_ITEMS, Room

from .serving import client, pictures, serving

JSONS = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["text", "image", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
TYPES = st.sampled_from(
    ["application/json", "image/png", "text/plain", "application/octet-stream", "", "multipart/form-data", "a/b;c", "\xff"]
)  # fmt: skip
few = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


@pytest.fixture(scope="module")
def image_http(trained_image_module: Path) -> Iterator[httpx.Client]:
    with (
        serving(Answering(load_predictor(trained_image_module))) as (service, _),
        client(service) as http,
    ):
        yield http


@pytest.fixture(scope="module")
def text_http(trained_text_module: Path) -> Iterator[httpx.Client]:
    with (
        serving(Answering(load_predictor(trained_text_module))) as (service, _),
        client(service) as http,
    ):
        yield http


def check(answer: httpx.Response) -> None:
    """An answer, or a refusal in words; never a failure."""
    said = answer.json()
    if answer.status_code == 200:
        assert all("class" in one for one in (said if isinstance(said, list) else [said]))
        return
    assert answer.status_code in (400, 413, 415, 422), answer.text
    assert set(said["error"]) == {"kind", "message"}
    assert len(said["error"]["message"]) > 10
    assert "0x" not in said["error"]["message"]


@few
@given(body=st.binary(max_size=300), kind=TYPES)
def test_any_bytes(
    image_http: httpx.Client, text_http: httpx.Client, body: bytes, kind: str
) -> None:
    for http in (image_http, text_http):
        check(
            http.post("/v1/predict", content=body, headers={"Content-Type": kind.encode("latin-1")})
        )


@few
@given(said=JSONS, kind=TYPES)
def test_any_json(
    image_http: httpx.Client, text_http: httpx.Client, said: object, kind: str
) -> None:
    body = json.dumps(said).encode()
    for http in (image_http, text_http):
        check(
            http.post("/v1/predict", content=body, headers={"Content-Type": kind.encode("latin-1")})
        )


@few
@given(at=st.integers(0, 10_000), change=st.binary(max_size=8), cut=st.integers(0, 10_000))
def test_images_that_are_damaged(
    image_http: httpx.Client, at: int, change: bytes, cut: int
) -> None:
    raw = bytearray(pictures(1)[0])
    at %= len(raw)
    raw[at : at + len(change)] = change
    check(image_http.post("/v1/predict", content=bytes(raw[: len(raw) - cut % len(raw)])))


def test_a_small_file_that_claims_to_be_huge_is_not_decoded(image_http: httpx.Client) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    for side in (9000, 60_000):
        head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 10**6)) + chunk(b"IEND", b"")  # fmt: skip
        answer = image_http.post("/v1/predict", content=bomb)
        assert answer.status_code == 422
        assert "64000000 allowed" in answer.json()["error"]["message"]


def test_packed_bodies_lists_that_are_too_long_and_deep_json(
    image_http: httpx.Client, text_http: httpx.Client
) -> None:
    packed = gzip.compress(b"\0" * 10**6)
    answer = image_http.post("/v1/predict", content=packed, headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415
    long = text_http.post("/v1/predict", json=["belt"] * (MAX_ITEMS + 1))
    assert (long.status_code, f"1 to {MAX_ITEMS}" in long.text) == (422, True)
    for body in (b"[" * 100_000, b'{"text":' * 100_000, b'"\\ud800"', b'{"text": "\x00"}'):
        check(
            text_http.post(
                "/v1/predict", content=body, headers={"Content-Type": "application/json"}
            )
        )


@pytest.mark.parametrize(
    "raw",
    [
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 200_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200,
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nab",
    ],
    ids=["length", "negative", "chunk", "head", "tls", "cut"],
)
def test_what_is_no_request(image_http: httpx.Client, raw: bytes) -> None:
    address = (image_http.base_url.host, image_http.base_url.port or 0)
    with socket.create_connection(address, timeout=10) as line:
        try:
            line.sendall(raw)
            line.shutdown(socket.SHUT_WR)
            said = line.recv(4096)
        except OSError:  # closed before all of it was sent
            said = b""
    assert said == b"" or said.split(b" ")[1] in (b"400", b"413")
    assert image_http.post("/v1/predict", content=pictures(1)[0]).status_code == 200


def test_bodies_together_are_bounded() -> None:
    room = Room(100)
    with room.held() as first, room.held() as second:
        first.add(60)
        with pytest.raises(OverloadedError, match="100 is the most"):
            second.add(50)
        second.add(40)
    with room.held() as third:
        third.add(100)

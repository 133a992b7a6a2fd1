"""The parser: round trips, and hypothesis throwing bytes at it. Only ProtocolError may come out."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.core.encoder import EncoderTraining
from fedsplit.core.errors import ConfigError, EncoderError, ProtocolError, RefusedError
from fedsplit.transport.admission import Limits
from fedsplit.transport.codec import CODECS, CodecId, Dtype, Encoded, check_range, find_codec
from fedsplit.transport.frames import (
    HEADER_BYTES,
    VERSION,
    Assembler,
    Flag,
    FrameKind,
    Header,
    Message,
    frames_of,
    parse,
)
from fedsplit.transport.messages import ErrorBody, Hello, error_of, read_body
from fedsplit.transport.rules import Rules, agree
from tests.transport.conftest import HOSTED, WIDTH, ZEROTH, FakeHost, make_grant, make_h

CAP = 1 << 20


def refuse_large(header: Header) -> None:
    if header.total > CAP:
        raise ProtocolError("too large")


def tensor_frames(array: np.ndarray, chunk_bytes: int = 1 << 16) -> list[bytes]:
    body = find_codec("fp32").encode(array)
    return list(
        frames_of(
            FrameKind.ENCODE, body, codec=CodecId.FP32, session=1, step=2, chunk_bytes=chunk_bytes
        )
    )


def resealed(raw: bytearray) -> bytes:
    """With a right header checksum, so that mutations reach the checks behind it."""
    struct.pack_into("<I", raw, HEADER_BYTES - 4, zlib.crc32(raw[: HEADER_BYTES - 4]))
    return bytes(raw)


@settings(deadline=None)
@given(
    size=st.integers(1, 300_000),
    chunk=st.integers(1 << 16, 1 << 18),
    session=st.integers(0, (1 << 64) - 1),
    step=st.integers(0, (1 << 64) - 1),
)
def test_what_is_cut_comes_together_again(size: int, chunk: int, session: int, step: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    body = Encoded(Dtype.BYTES, (7, 8), data.data)
    options = {"flags": Flag.KEEP, "session": session, "step": step, "chunk_bytes": chunk}
    assembler = Assembler(lambda header: None)
    messages = [assembler.feed(frame) for frame in frames_of(FrameKind.GRAD, body, **options)]
    assembler.finish()
    assert messages[:-1] == [None] * (len(messages) - 1)
    header, payload = messages[-1] or pytest.fail("no message")
    np.testing.assert_array_equal(payload, data)
    assert (header.kind, header.dims, header.session, header.step) == (
        FrameKind.GRAD,
        (7, 8),
        session,
        step,
    )


@given(st.binary(max_size=300))
def test_arbitrary_bytes(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse(data)
    with pytest.raises(ProtocolError):
        Assembler(refuse_large).feed(data)


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_mutated_frames(data: st.DataObject) -> None:
    frames = tensor_frames(make_h(2, 1100, WIDTH))
    assert len(frames) == 2
    assembler = Assembler(refuse_large)
    for _ in range(data.draw(st.integers(1, 3))):
        raw = bytearray(data.draw(st.sampled_from(frames)))
        for _ in range(data.draw(st.integers(0, 4))):
            raw[data.draw(st.integers(0, HEADER_BYTES + 8))] = data.draw(st.integers(0, 255))
        raw = raw[: data.draw(st.sampled_from([len(raw), HEADER_BYTES, HEADER_BYTES - 1, 100]))]
        if data.draw(st.booleans()) and len(raw) >= HEADER_BYTES:
            raw = bytearray(resealed(raw))
        try:
            assembler.feed(bytes(raw))
        except ProtocolError:
            break


@settings(deadline=None, max_examples=400)
@given(
    st.lists(st.tuples(st.integers(0, HEADER_BYTES - 5), st.integers(0, 255)), max_size=3),
    st.sampled_from([None, HOSTED, ZEROTH]),
    st.sampled_from([FrameKind.ENCODE, FrameKind.BACKPROP, FrameKind.PROBE, FrameKind.SCORE]),
    st.booleans(),
)
def test_mutated_headers_never_get_past_the_rules(
    changes: list[tuple[int, int]], training: EncoderTraining | None, kind: FrameKind, greeted: bool
) -> None:
    rules = Rules(Limits(max_message_bytes=CAP))
    if greeted:
        hello = Hello(
            protocol=VERSION,
            fedsplit_version="0.1.0",
            backbone_sha256="ab" * 32,
            a=2,
            b=10,
            version="v0",
            codec="fp32",
        )
        what = make_grant(training=training)
        rules.welcome(
            agree(hello, what, FakeHost().capabilities(), Limits(), 1), find_codec("fp32")
        )
        rules.keep(2, (2, 3, WIDTH), (2, 3, WIDTH), 1)
        rules.await_losses(2)
    raw = bytearray(
        tensor_frames(np.ones(3, np.float32) if kind is FrameKind.SCORE else make_h())[0]
    )
    raw[5] = kind
    for at, value in changes:
        raw[at] = value
    try:
        message = Assembler(rules.admit).feed(resealed(raw))
    except EncoderError:
        return
    if message is not None:
        kind = message.header.kind
        assert (kind is FrameKind.HELLO) != greeted
        assert kind not in (FrameKind.PROBE, FrameKind.SCORE) or training is ZEROTH
        assert not (message.header.flags & Flag.KEEP and training is ZEROTH)
        assert not (message.header.flags & Flag.QUIET and training is None)
        assert kind is not FrameKind.SCORE or message.header.dims == (3,)
        assert message.payload.nbytes <= CAP
        assert message.header.total <= 4 * 4 * 6 * WIDTH or message.header.kind is FrameKind.HELLO


def test_nothing_is_allocated_for_what_is_refused() -> None:
    raw = bytearray(tensor_frames(make_h(2, 1100, WIDTH))[0])
    struct.pack_into("<I", raw, 44, 0xFFFFFFFF)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="too large"):
            Assembler(refuse_large).feed(resealed(raw))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=4096) | st.text(max_size=1000).map(str.encode))
def test_hello_of_anything(data: bytes) -> None:
    header = Header(
        FrameKind.HELLO, Dtype.BYTES, CodecId.RAW, Flag.NONE, (), 0, 0, len(data), 0, len(data)
    )
    with pytest.raises(ProtocolError, match="HELLO is malformed"):
        read_body(Hello, Message(header, np.frombuffer(data, np.uint8)))


_VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=80)
    | st.lists(st.integers())
)


@given(
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(Hello.model_fields, _VALUES) | {"more": _VALUES}
    )
)
def test_hello_of_wrong_values(fields: dict[str, object]) -> None:
    right = {
        "protocol": VERSION, "fedsplit_version": "0.1.0", "backbone_sha256": "ab" * 32, "a": 2, "b": 10, "version": "v0",
        "codec": "fp32",
    }  # fmt: skip

    data = json.dumps(right | fields).encode()
    header = Header(
        FrameKind.HELLO, Dtype.BYTES, CodecId.RAW, Flag.NONE, (), 0, 0, len(data), 0, len(data)
    )
    try:
        hello = read_body(Hello, Message(header, np.frombuffer(data, np.uint8)))
        agree(hello, make_grant(), FakeHost().capabilities(), Limits(), 1)
    except (ProtocolError, RefusedError):
        return
    assert hello.model_dump() == right


@pytest.mark.parametrize("name", CODECS)
def test_codecs_keep_their_word(name: str) -> None:
    codec = find_codec(name)
    for array in (make_h(3, 5, 7), make_h(3, 5, 7).transpose(2, 0, 1), make_h(1)):
        dtype, dims, data = codec.encode(array)
        low, high = codec.payload_range(dims)
        assert (dtype, dims) == (codec.dtype, array.shape)
        assert low <= len(data) <= high
        back = codec.decode(dims, np.frombuffer(bytearray(data), np.uint8))
        assert back.dtype == np.float32
        assert back.flags.writeable
        np.testing.assert_allclose(back, array, rtol=1e-3, atol=1e-3)
    assert [c.id for c in CODECS.values()] == sorted({c.id for c in CODECS.values()})


def test_fp32_does_not_copy() -> None:
    array = make_h()
    payload = find_codec("fp32").encode(array).data
    assert np.shares_memory(np.frombuffer(payload, np.float32), array)


def test_unknown_codec_and_non_finite_values() -> None:
    with pytest.raises(ConfigError, match="one of fp32, fp16"):
        find_codec("zip")
    with pytest.raises(ProtocolError, match="1 of 2 values"):
        check_range(np.array([1, np.nan], np.float32), "x")


def test_what_a_peer_writes_is_shown_on_one_line() -> None:
    text = b'{"\\u001b[2J\\n": 1}'
    header = Header(
        FrameKind.HELLO, Dtype.BYTES, CodecId.RAW, Flag.NONE, (), 0, 0, len(text), 0, len(text)
    )
    with pytest.raises(ProtocolError) as caught:
        read_body(Hello, Message(header, np.frombuffer(text, np.uint8)))
    body = ErrorBody(code="internal", message="\x1b[31mred\nline")
    for shown in (str(caught.value), str(error_of(body, "h:1"))):
        assert shown.isprintable()

"""One test per malformation: the sender reads a typed error, the server stays unharmed."""

from __future__ import annotations

import re
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fedsplit.transport.codec import CodecId, Dtype, Encoded
from fedsplit.transport.frames import (
    HEADER_BYTES,
    VERSION,
    Flag,
    FrameKind,
    checksum,
    frames_of,
    json_frame,
)
from fedsplit.transport.server import EncoderServer, Limits
from tests.transport.conftest import (
    HOSTED,
    KEY,
    WIDTH,
    FakeHost,
    RawClient,
    Sends,
    connect,
    eventually,
    make_grant,
    make_h,
)

pytestmark = pytest.mark.usefixtures("unharmed")

_AT = {
    "magic": 0,
    "version": 4,
    "kind": 5,
    "dtype": 6,
    "codec": 7,
    "ndim": 8,
    "flags": 9,
    "reserved": 10,
}
_WORDS = {"dim0": 12, "dim3": 24, "total": 44, "offset": 48, "length": 52, "checksum": 56}


def patched(frame: bytes, **fields: int) -> bytes:
    """The frame with other header fields and, unless it is the thing to break, a right header checksum."""
    raw = bytearray(frame)
    for name, value in fields.items():
        if name in _AT:
            raw[_AT[name]] = value
        else:
            struct.pack_into("<I", raw, _WORDS[name], value)
    struct.pack_into("<I", raw, HEADER_BYTES - 4, zlib.crc32(raw[: HEADER_BYTES - 4]))
    return bytes(raw)


HEADERS = {
    "magic": ({"magic": 0}, "begins with"),
    "version": ({"version": 9}, f"protocol version 9, this side {VERSION}"),
    "kind": ({"kind": 77}, "unknown kind"),
    "kind of the encoder's": ({"kind": FrameKind.GRAD}, "not a site's to send"),
    "dtype": ({"dtype": 99}, "unknown kind, dtype"),
    "other dtype": ({"dtype": Dtype.INT8}, "was agreed"),
    "codec": ({"codec": 99}, "unknown kind, dtype"),
    "other codec": ({"codec": CodecId.FP16, "dtype": Dtype.FLOAT16}, "was agreed"),
    "ndim": ({"ndim": 5}, "malformed"),
    "ndim 255": ({"ndim": 255}, "malformed"),
    "fewer dims": ({"ndim": 2}, "malformed"),
    "dims beyond ndim": ({"dim3": 1}, "malformed"),
    "flags": ({"flags": 0x80}, "unknown flags"),
    "flag of another kind": ({"flags": 4}, "not for its kind"),
    "reserved": ({"reserved": 1}, "malformed"),
    "huge dims": ({"dim0": 0xFFFFFFFF}, "the token allows"),
    "zero dim": ({"dim0": 0}, "is wanted"),
    "total too large": ({"total": 0xFFFFFFFF}, "fewer|out of order|hold|wanted"),
    "total too small": ({"total": 4}, "does not fit"),
    "length": ({"length": 4}, "brings"),
    "chunk offset": ({"offset": 4}, "does not fit"),
    "checksum": ({"checksum": 1}, "payload fails its checksum"),
}


@pytest.mark.parametrize(("fields", "says"), HEADERS.values(), ids=HEADERS.keys())
def test_header(server: EncoderServer, fields: dict[str, int], says: str) -> None:
    with RawClient(server.address) as raw:
        raw.greet()
        (frame,) = raw.tensor(FrameKind.ENCODE, make_h())
        raw.send(patched(frame, **fields))
        error = raw.error()
    assert error.code in ("protocol", "refused")
    assert re.search(says, error.message), error.message
    assert server.stats().refused == {error.code: 1}


def _flip(frame: bytes, at: int) -> bytes:
    raw = bytearray(frame)
    raw[at] ^= 1
    return bytes(raw)


def _nan(raw: RawClient, value: float) -> list[bytes]:
    h_BTD = make_h()
    h_BTD[1, 2, 3] = value
    return raw.tensor(FrameKind.ENCODE, h_BTD)


def _masked(raw: RawClient, step: int = 0) -> list[bytes]:
    return raw.tensor(FrameKind.ENCODE, make_h(), step, Flag.MASK)


def _cut_off(raw: RawClient) -> list[bytes]:
    return [raw.tensor(FrameKind.ENCODE, make_h())[0][: HEADER_BYTES + 8]]


SESSIONS: dict[str, tuple[Sends, str]] = {
    "no frame at all": (lambda raw: [b"hello"], "truncated"),
    "empty": (lambda raw: [b""], "truncated"),
    "truncated": (_cut_off, "brings 8"),
    "longer than it says": (
        lambda raw: [raw.tensor(FrameKind.ENCODE, make_h())[0] + b"x"],
        "brings",
    ),
    "header damaged": (
        lambda raw: [_flip(raw.tensor(FrameKind.ENCODE, make_h())[0], 37)],
        "header fails",
    ),
    "payload damaged": (
        lambda raw: [_flip(raw.tensor(FrameKind.ENCODE, make_h())[0], 99)],
        "payload fails",
    ),
    "tiny chunks": (
        lambda raw: raw.tensor(FrameKind.ENCODE, make_h(), chunk_bytes=16),
        "all but the last",
    ),
    "NaN": (lambda raw: _nan(raw, np.nan), "NaN, infinite or beyond"),
    "3e38": (lambda raw: _nan(raw, 3e38), "NaN, infinite or beyond"),
    "infinite": (lambda raw: _nan(raw, -np.inf), "NaN, infinite or beyond"),
    "wrong width": (lambda raw: raw.tensor(FrameKind.ENCODE, make_h(2, 3, WIDTH + 1)), "is wanted"),
    "two dims": (lambda raw: raw.tensor(FrameKind.ENCODE, make_h(2, WIDTH)), "is wanted"),
    "too many samples": (
        lambda raw: raw.tensor(FrameKind.ENCODE, make_h(5, 3, WIDTH)),
        "the token allows 4",
    ),
    "too many tokens": (lambda raw: raw.tensor(FrameKind.ENCODE, make_h(2, 7, WIDTH)), "6 tokens"),
    "another session": (
        lambda raw: raw.tensor(FrameKind.ENCODE, make_h(), session=1),
        "this is another one",
    ),
    "step twice": (lambda raw: 2 * raw.tensor(FrameKind.ENCODE, make_h(), 5), "steps increase"),
    "step backwards": (
        lambda raw: (
            raw.tensor(FrameKind.ENCODE, make_h(), 5) + raw.tensor(FrameKind.ENCODE, make_h(), 4)
        ),
        "steps increase",
    ),
    "second HELLO": (lambda raw: [raw.hello()], "second HELLO"),
    "unknown step": (lambda raw: raw.tensor(FrameKind.BACKPROP, make_h(), 3), "not kept"),
    "step that was not kept": (
        lambda raw: (
            raw.tensor(FrameKind.ENCODE, make_h(), 3) + raw.tensor(FrameKind.BACKPROP, make_h(), 3)
        ),
        "not kept",
    ),
    "mask without its ENCODE": (
        lambda raw: raw.mask(2, 3) + raw.tensor(FrameKind.BACKPROP, make_h()),
        "between MASK",
    ),
    "mask twice": (lambda raw: 2 * raw.mask(2, 3), "between MASK"),
    "mask not announced": (
        lambda raw: raw.mask(2, 3) + raw.tensor(FrameKind.ENCODE, make_h()),
        "its mask",
    ),
    "mask missing": (_masked, "its mask"),
    "mask of another shape": (lambda raw: raw.mask(2, 2) + _masked(raw), "its mask"),
    "mask of another step": (lambda raw: raw.mask(2, 3, step=1) + _masked(raw, 2), "its mask"),
    "mask of floats": (lambda raw: raw.mask(2, 3, dtype=Dtype.FLOAT32), "must be BOOL"),
    "mask of three dims": (lambda raw: raw.mask(2, 3, 1), "must be BOOL"),
    "mask with too few bytes": (lambda raw: raw.mask(2, 3, dims=(2, 4)), "payload bytes"),
    "mask of huge dims": (lambda raw: raw.mask(1, dims=(1, 1 << 31)), "the token allows"),
    "mask of twos": (lambda raw: raw.mask(2, 3, fill=2) + _masked(raw), "other than 0 and 1"),
}


@pytest.mark.parametrize(("sends", "says"), SESSIONS.values(), ids=SESSIONS.keys())
def test_session(server: EncoderServer, sends: Sends, says: str) -> None:
    with RawClient(server.address) as raw:
        raw.greet()
        raw.send(*sends(raw))
        while (message := raw.receive()).header.kind is not FrameKind.ERROR:
            pass
        text = message.payload.tobytes().decode()
    assert says in text
    assert sum(server.stats().refused.values()) == 1


def test_backprop_twice(server: EncoderServer) -> None:
    with RawClient(server.address) as raw:
        raw.greet()
        raw.send(*raw.tensor(FrameKind.ENCODE, make_h(), 0, Flag.KEEP))
        assert raw.receive().header.kind is FrameKind.ENCODED
        raw.send(*raw.tensor(FrameKind.BACKPROP, make_h(), 0))
        assert raw.receive().header.kind is FrameKind.GRAD
        raw.send(*raw.tensor(FrameKind.BACKPROP, make_h(), 0))
        assert "already taken" in raw.error().message


def test_backprop_of_the_wrong_shape(server: EncoderServer) -> None:
    with RawClient(server.address) as raw:
        raw.greet()
        raw.send(*raw.tensor(FrameKind.ENCODE, make_h(), 0, Flag.KEEP))
        assert raw.receive().header.kind is FrameKind.ENCODED
        raw.send(*raw.tensor(FrameKind.BACKPROP, make_h(1, 3, WIDTH), 0))
        assert "is wanted" in raw.error().message


@pytest.mark.parametrize(
    ("training", "kind", "says"),
    [
        (None, FrameKind.PROBE, "zeroth-order is wanted"),
        (HOSTED, FrameKind.PROBE, "zeroth-order is wanted"),
        (None, FrameKind.BACKPROP, "nothing trains"),
    ],
)
def test_what_the_token_does_not_allow(
    server: EncoderServer, training: object, kind: FrameKind, says: str
) -> None:
    with RawClient(server.address, make_grant(training=training)) as raw:
        raw.greet()
        raw.send(*raw.tensor(FrameKind.ENCODE, make_h(), 0, Flag.KEEP))
        assert raw.receive().header.kind is FrameKind.ENCODED
        step, flags = (1, Flag.NONE) if kind is FrameKind.PROBE else (0, Flag.QUIET)
        raw.send(*raw.tensor(kind, make_h(), step, flags))
        error = raw.error()
    assert error.code == "refused"
    assert says in error.message


def test_too_many_kept_steps(server: EncoderServer) -> None:
    with RawClient(server.address) as raw:
        raw.greet()
        for step in range(8):
            raw.send(*raw.tensor(FrameKind.ENCODE, make_h(), step, Flag.KEEP))
            raw.receive()
        assert server.stats().kept_steps == 8
        raw.send(*raw.tensor(FrameKind.ENCODE, make_h(), 8, Flag.KEEP))
        error = raw.error()
    assert error.code == "refused"
    assert "8 steps" in error.message


def test_graphs_of_all_sessions_share_one_bound() -> None:
    """The fake's graphs take 1000 bytes a token: 6000 a step."""
    limits = Limits(max_kept_bytes=13_000, room_timeout_s=0.2)
    with (
        EncoderServer(FakeHost(), key=KEY, limits=limits) as server,
        RawClient(server.address) as raw,
        RawClient(server.address, make_grant(site="site-2")) as other,
    ):
        raw.greet()
        for step in range(2):
            raw.send(*raw.tensor(FrameKind.ENCODE, make_h(), step, Flag.KEEP))
            raw.receive()
        assert server.stats().kept_bytes == 12_000
        other.greet()
        other.send(*other.tensor(FrameKind.ENCODE, make_h(), 0, Flag.KEEP))
        error = other.error()
        assert error.code == "overloaded"
        assert "12000 of 13000 bytes" in error.message
        # Who holds graphs does not wait for room that itself takes up.
        raw.send(*raw.tensor(FrameKind.ENCODE, make_h(), 2, Flag.KEEP))
        assert raw.error().code == "overloaded"
    assert server.stats().kept_bytes == 0


def test_a_step_waits_for_the_room_that_another_gives_back() -> None:
    limits = Limits(max_kept_bytes=6000)
    h_BTD = make_h()
    with (
        EncoderServer(FakeHost(), key=KEY, limits=limits) as server,
        connect(server.address) as first,
        connect(server.address, make_grant(site="site-2")) as second,
        ThreadPoolExecutor(1) as pool,
    ):
        first.encode(0, h_BTD, want="gradient")
        waiting = pool.submit(second.encode, 0, h_BTD, want="gradient")
        assert server.stats().kept_bytes == 6000
        assert not waiting.done()
        first.settle(0, h_BTD)
        np.testing.assert_array_equal(waiting.result(20), 2 * h_BTD + 1)
        second.settle(0, h_BTD)
        eventually(lambda: server.stats().kept_bytes == 0)


def test_a_step_that_never_fits_is_refused() -> None:
    with (
        EncoderServer(FakeHost(), key=KEY, limits=Limits(max_kept_bytes=5000)) as server,
        RawClient(server.address) as raw,
    ):
        raw.greet()
        raw.send(*raw.tensor(FrameKind.ENCODE, make_h(), 0, Flag.KEEP))
        error = raw.error()
    assert error.code == "refused"
    assert "6000 bytes" in error.message
    assert "smaller batch-size" in error.message


def test_chunks_out_of_order_and_a_message_cut_in_two() -> None:
    host, grant = FakeHost(width=1024), make_grant(max_tokens=64)
    with EncoderServer(host, key=KEY, limits=Limits(max_sessions=2)) as server:
        for order, says in (
            ((1, 0, 2), "out of order"),
            ((0, 2), "out of order"),
            ((0, 0), "out of order"),
        ):
            with RawClient(server.address, grant) as raw:
                raw.greet()
                chunks = raw.tensor(FrameKind.ENCODE, make_h(4, 64, 1024), chunk_bytes=400_000)
                assert len(chunks) == 3
                raw.send(*(chunks[n] for n in order))
                assert says in raw.error().message
            eventually(lambda: server.stats().live_sessions == 0)
        with RawClient(server.address, grant) as raw:
            raw.greet()
            raw.send(chunks[0])  # of a session that is over
            assert "another one" in raw.error().message
        eventually(lambda: server.stats().live_sessions == 0)
        with RawClient(server.address, grant) as raw:
            raw.greet()
            raw.send(raw.tensor(FrameKind.ENCODE, make_h(4, 64, 1024), chunk_bytes=400_000)[0])
            raw.end()
            assert "into a message" in raw.error().message
        eventually(lambda: server.stats().live_sessions == 0)
        with RawClient(server.address, grant) as raw:  # another step's frame between two chunks
            raw.greet()
            chunks = raw.tensor(FrameKind.ENCODE, make_h(4, 64, 1024), chunk_bytes=400_000)
            other = raw.tensor(FrameKind.ENCODE, make_h(4, 64, 1024), 1, chunk_bytes=400_000)
            raw.send(chunks[0], other[1])
            assert "out of order" in raw.error().message
        eventually(lambda: server.stats().live_sessions == 0)
        connect(server.address, grant).close()


def test_more_bytes_than_the_encoder_takes() -> None:
    with EncoderServer(FakeHost(), key=KEY, limits=Limits(max_message_bytes=1024)) as server:
        grant = make_grant(max_batch=10**6, max_tokens=10**6)
        with RawClient(server.address, grant) as raw:
            raw.greet()
            (frame,) = raw.tensor(FrameKind.ENCODE, make_h(8, 8, WIDTH))
            raw.send(frame)
            assert "1024 are allowed" in raw.error().message


HELLOS = {
    "ENCODE first": (
        lambda raw: raw.tensor(FrameKind.ENCODE, make_h()),
        "protocol",
        "before the session was opened",
    ),
    "garbage": (lambda raw: [json_frame(FrameKind.HELLO, "{]")], "protocol", "HELLO is malformed"),
    "a list": (lambda raw: [json_frame(FrameKind.HELLO, "[1]")], "protocol", "HELLO is malformed"),
    "deep": (
        lambda raw: [json_frame(FrameKind.HELLO, "[" * 4000)],
        "protocol",
        "HELLO is malformed",
    ),
    "missing fields": (
        lambda raw: [json_frame(FrameKind.HELLO, "{}")],
        "protocol",
        "codec: Field required",
    ),
    "not UTF-8": (lambda raw: [_raw_hello(b"\xff\xfe")], "protocol", "HELLO is malformed"),
    "oversize": (lambda raw: [json_frame(FrameKind.HELLO, " " * 4097)], "protocol", "at most 4096"),
    "with dims": (lambda raw: [patched(raw.hello(), ndim=1, dim0=3)], "protocol", "must be JSON"),
    "twice at once": (lambda raw: [raw.hello(), raw.hello()], "protocol", "second HELLO"),
    "protocol version": (
        lambda raw: [raw.hello(protocol=VERSION + 1)],
        "refused",
        f"protocol version is {VERSION + 1}, the encoder's is {VERSION}",
    ),
    "fedsplit version": (
        lambda raw: [raw.hello(fedsplit_version="9.9")],
        "refused",
        "fedsplit version is 9.9, the encoder's is 0.1.0",
    ),
    "backbone": (
        lambda raw: [raw.hello(backbone_sha256="cd" * 32)],
        "refused",
        f"{'cd' * 32}, the encoder's is abab",
    ),
    "cut": (lambda raw: [raw.hello(a=0)], "refused", "cut is 0,10, the token's is 2,10"),
    "version": (lambda raw: [raw.hello(version="v7")], "refused", "'v7', the token's is 'v0'"),
    "codec": (lambda raw: [raw.hello(codec="pickle")], "refused", "codec 'pickle' is unknown"),
}


def _raw_hello(data: bytes) -> bytes:
    return next(frames_of(FrameKind.HELLO, Encoded(Dtype.BYTES, (), memoryview(data))))


@pytest.mark.parametrize(("sends", "code", "says"), HELLOS.values(), ids=HELLOS.keys())
def test_hello(server: EncoderServer, sends: Sends, code: str, says: str) -> None:
    with RawClient(server.address) as raw:
        raw.send(*sends(raw))
        message = raw.receive()
        if message.header.kind is FrameKind.WELCOME:
            message = raw.receive()
        text = message.payload.tobytes().decode()
    assert message.header.kind is FrameKind.ERROR
    assert f'"code":"{code}"' in text
    assert says in text


@pytest.mark.parametrize(("a", "b"), [(3, 3), (2, 13)])
def test_a_cut_that_the_encoder_cannot_run(server: EncoderServer, a: int, b: int) -> None:
    with RawClient(server.address, make_grant(a=a, b=b)) as raw:
        raw.send(raw.hello())
        assert "leaves the encoder nothing" in raw.error().message


def test_a_message_beyond_grpcs_limit_ends_only_its_stream(server: EncoderServer) -> None:
    with connect(server.address) as bystander:
        with RawClient(server.address) as raw:
            raw.greet()
            raw.send(bytes(5 << 20))
            with pytest.raises(Exception, match=r"larger than max|CANCELLED|RESOURCE_EXHAUSTED"):
                raw.receive()
        bystander.encode(0, make_h())


def test_the_checksum_sees_every_single_flip() -> None:
    data = bytearray(make_h(1, 1, 20).tobytes() + b"tail")
    right = checksum(memoryview(data))
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        assert checksum(memoryview(data)) != right
        data[bit // 8] ^= 1 << bit % 8

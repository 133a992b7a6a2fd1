"""One test per malformation of a zeroth-order session: probes and the losses that answer them."""

from __future__ import annotations

import numpy as np
import pytest

from fedsplit.transport.codec import CodecId, Dtype
from fedsplit.transport.frames import Flag, FrameKind
from fedsplit.transport.server import EncoderServer, Limits
from tests.transport.conftest import (
    KEY,
    WIDTH,
    ZEROTH,
    FakeHost,
    RawClient,
    Sends,
    make_grant,
    make_h,
)

pytestmark = pytest.mark.usefixtures("unharmed")


def _losses(raw: RawClient, count: int = 3, step: int = 0, **changes: object) -> list[bytes]:
    return raw.tensor(FrameKind.SCORE, np.ones(count, np.float32), step, **changes)


def _probe(raw: RawClient, step: int = 0, **changes: object) -> list[bytes]:
    return raw.tensor(FrameKind.PROBE, make_h(), step, **changes)


ZEROTH_ORDER: dict[str, tuple[Sends, str]] = {
    "gradient wanted": (
        lambda raw: raw.tensor(FrameKind.ENCODE, make_h(), 0, Flag.KEEP),
        "takes no gradient",
    ),
    "gradient": (lambda raw: _probe(raw) + raw.tensor(FrameKind.BACKPROP, make_h()), "not kept"),
    "probe with KEEP": (lambda raw: _probe(raw, flags=Flag.KEEP), "not for its kind"),
    "probe with QUIET": (lambda raw: _probe(raw, flags=Flag.QUIET), "not for its kind"),
    "probe twice": (lambda raw: 2 * _probe(raw), "steps increase"),
    "probe of two dims": (
        lambda raw: raw.tensor(FrameKind.PROBE, make_h(2, WIDTH)),
        "is wanted",
    ),
    "probe of too many samples": (
        lambda raw: raw.tensor(FrameKind.PROBE, make_h(5, 3, WIDTH)),
        "the token allows 4",
    ),
    "probe without its mask": (lambda raw: _probe(raw, flags=Flag.MASK), "its mask"),
    "mask, then losses": (
        lambda raw: _probe(raw) + raw.mask(2, 3, step=1) + _losses(raw),
        "between MASK",
    ),
    "losses of no probe": (_losses, "not probed"),
    "losses of an encode": (
        lambda raw: raw.tensor(FrameKind.ENCODE, make_h()) + _losses(raw),
        "not probed",
    ),
    "too few losses": (lambda raw: _probe(raw) + _losses(raw, 2), "(3,) is wanted"),
    "too many losses": (lambda raw: _probe(raw) + _losses(raw, 4), "(3,) is wanted"),
    "losses in two dims": (
        lambda raw: _probe(raw) + _losses(raw, dims=(3, 1)),
        "(3,) is wanted",
    ),
    "a whole h as losses": (
        lambda raw: _probe(raw) + raw.tensor(FrameKind.SCORE, make_h()),
        "(3,) is wanted",
    ),
    "losses with too few bytes": (
        lambda raw: _probe(raw) + _losses(raw, 2, dims=(3,)),
        "payload bytes",
    ),
    "losses as fp16": (
        lambda raw: _probe(raw) + _losses(raw, codec=CodecId.FP16, dtype=Dtype.FLOAT16),
        "was agreed",
    ),
    "losses with flags": (
        lambda raw: _probe(raw) + _losses(raw, flags=Flag.MASK),
        "not for its kind",
    ),
    "losses that are not finite": (
        lambda raw: _probe(raw) + raw.tensor(FrameKind.SCORE, np.array([1, np.nan, 1], np.float32)),
        "NaN, infinite or beyond",
    ),
    "answer of the encoder's": (lambda raw: raw.tensor(FrameKind.PROBED, make_h()), "not a site's"),
    "acknowledgement": (lambda raw: raw.tensor(FrameKind.ACK, make_h()), "not a site's"),
}


def _last_error(raw: RawClient) -> str:
    while (message := raw.receive()).header.kind is not FrameKind.ERROR:
        pass
    return message.payload.tobytes().decode()


@pytest.mark.parametrize(("sends", "says"), ZEROTH_ORDER.values(), ids=ZEROTH_ORDER.keys())
def test_zeroth_order_session(server: EncoderServer, sends: Sends, says: str) -> None:
    with RawClient(server.address, make_grant(training=ZEROTH)) as raw:
        welcome = raw.greet()
        assert (welcome.training, welcome.probes) == ("zeroth-order", 3)
        # One at a time, for SCORE may come when PROBED has gone; the last one is the bad one.
        frames = sends(raw)
        for frame in frames[:-1]:
            raw.send(frame)
            if frame[5] != FrameKind.MASK:
                assert raw.receive().header.kind in (FrameKind.PROBED, FrameKind.ENCODED)
        raw.send(frames[-1])
        assert says in _last_error(raw)


def test_losses_twice(server: EncoderServer) -> None:
    with RawClient(server.address, make_grant(training=ZEROTH)) as raw:
        raw.greet()
        raw.send(*_probe(raw))
        assert raw.receive().header.dims == (3, 2, 3, WIDTH)
        raw.send(*_losses(raw))
        message = raw.receive()
        assert (message.header.kind, message.header.total) == (FrameKind.ACK, 1)
        raw.send(*_losses(raw))
        assert "already taken" in raw.error().message


def test_too_many_probes_wait_for_their_losses(server: EncoderServer) -> None:
    with RawClient(server.address, make_grant(training=ZEROTH)) as raw:
        raw.greet()
        for step in range(8):
            raw.send(*_probe(raw, step))
            assert raw.receive().header.kind is FrameKind.PROBED
        raw.send(*_probe(raw, 8))
        assert "8 steps wait for their losses" in raw.error().message


def test_a_probe_whose_answer_would_be_too_large() -> None:
    limits = Limits(max_message_bytes=2048)
    with (
        EncoderServer(FakeHost(), key=KEY, limits=limits) as server,
        RawClient(server.address, make_grant(training=ZEROTH)) as raw,
    ):
        raw.greet()
        raw.send(*raw.tensor(FrameKind.PROBE, make_h(4, 6, WIDTH)))  # of 768 bytes, thrice
        assert "lower zo-queries or batch-size" in raw.error().message

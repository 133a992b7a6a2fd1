"""A numpy fake of the encoder's host, tokens for it, and a raw client that can say wrong things."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
import pytest

import fedsplit
from fedsplit.core.directions import points
from fedsplit.core.encoder import Array, Capabilities, EncoderTraining, Grant, Mask, Want
from fedsplit.core.errors import ProtocolError, RefusedError
from fedsplit.transport.client import StreamEncoder
from fedsplit.transport.codec import CodecId, Dtype, Encoded
from fedsplit.transport.frames import (
    VERSION,
    Assembler,
    Flag,
    FrameKind,
    Message,
    frames_of,
    json_frame,
)
from fedsplit.transport.messages import ErrorBody, Hello, Welcome, read_body
from fedsplit.transport.server import EncoderServer, Limits
from fedsplit.transport.tokens import sign
from fedsplit.transport.wiring import STEPS

KEY = b"a key for tests, of 32 bytes or more"
DIGEST = "ab" * 32
BLOCKS, WIDTH, POOLED = 12, 8, 5


class FakeEncoder:
    """z = 2 h + 1 (masked tokens 0), dh = 3 dz; pooled: the mean over tokens of the first P columns.

    Of probes the k-th output is k more.
    """

    def __init__(self, host: FakeHost, grant: Grant) -> None:
        self.host, self.pooled = host, grant.cut.pooled(BLOCKS)
        training = grant.training
        self.trains = training is not None and training.mode in ("hosted", "shared")
        self.probes = (
            len(points(training.estimator, training.queries)) if training and not self.trains else 0
        )
        self.kept: dict[int, tuple[int, ...]] = {}
        self.closed = 0
        self.last = -1

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, want: Want = "output"
    ) -> Array:
        assert step > self.last
        assert h_BTD.flags.writeable
        self.last = step
        self.host.before_encode(step)
        if want == "gradient":
            self.kept[step] = h_BTD.shape
        z_BTD = 2 * h_BTD + 1
        if mask_BT is not None:
            z_BTD *= mask_BT[..., None]
        z = z_BTD.mean(axis=1)[:, :POOLED] if self.pooled else z_BTD
        return np.stack([z + k for k in range(self.probes)]) if want == "probes" else z

    def graph_bytes(self, batch: int, tokens: int) -> int:
        return 1000 * batch * tokens

    def settle(self, step: int, answer: Array, *, quiet: bool = False) -> Array | None:
        if self.probes:
            self.host.scored.append((step, answer.tolist()))
            return None
        shape = self.kept.pop(step)
        if quiet:
            self.host.learned.append((shape, float(answer.sum())))
            return None
        return np.full(shape, 3, np.float32) * answer.sum() if self.pooled else 3 * answer

    def close(self) -> None:
        self.closed += 1


class FakeHost:
    """An EncoderHost; `before_encode` can be replaced to wait or fail."""

    def __init__(self, width: int = WIDTH) -> None:
        self.width = width
        self.encoders: list[FakeEncoder] = []
        self.published: dict[str, bytes] = {"v0": b""}
        self.trained: dict[str, dict[str, dict[str, Array]]] = {}
        self.learned: list[tuple[tuple[int, ...], float]] = []
        self.scored: list[tuple[int, list[float]]] = []
        self.before_encode: Callable[[int], None] = lambda step: None

    def capabilities(self) -> Capabilities:
        return Capabilities(
            fedsplit_version=fedsplit.__version__,
            backbone="fake",
            backbone_sha256=DIGEST,
            blocks=BLOCKS,
            width=self.width,
            pooled_width=POOLED,
            versions=tuple(self.published),
        )

    def open(self, grant: Grant) -> FakeEncoder:
        if grant.version not in self.published:
            raise RefusedError(f"module version {grant.version} is not published")
        self.encoders.append(FakeEncoder(self, grant))
        return self.encoders[-1]

    def publish(self, version: str, tensors: bytes) -> None:
        if not tensors:
            raise ProtocolError("no safetensors file")
        self.published[version] = tensors

    def collect(self, version: str) -> dict[str, dict[str, Array]]:
        if version not in self.published:
            raise RefusedError(f"module version {version} is not published")
        return self.trained.pop(version, {})


def make_grant(**changes: Any) -> Grant:
    fields: dict[str, Any] = {
        "run": "run", "site": "site-1", "task": "digits", "round": 1, "a": 2, "b": 10, "version": "v0",
        "backbone_sha256": DIGEST, "fedsplit_version": fedsplit.__version__, "max_batch": 4, "max_tokens": 6,
        "max_steps": 1000,
    }  # fmt: skip
    return Grant(**fields | changes)


HOSTED = EncoderTraining(mode="hosted", learning_rate=0.1)
ZEROTH = EncoderTraining(mode="zeroth-order", learning_rate=0.1, estimator="forward", queries=2)
"""Three forwards a step."""


def token_for(grant: Grant) -> str:
    return sign(grant, KEY, 600)


def connect(address: str, grant: Grant | None = None, **options: Any) -> StreamEncoder:
    grant = grant or make_grant()
    return StreamEncoder(address, token_for(grant), grant, **options)


def make_h(*dims: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(dims or (2, 3, WIDTH), dtype=np.float32)


def eventually(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


class RawClient:
    """One Steps call whose frames the test writes itself. `errors` is what the encoder ended it with."""

    def __init__(self, address: str, grant: Grant | None = None) -> None:
        self.grant = grant or make_grant()
        self.session = 0
        self._out: SimpleQueue[bytes | None] = SimpleQueue()
        self._channel = grpc.insecure_channel(address)
        self._call = self._channel.stream_stream(STEPS)(
            iter(self._out.get, None),
            metadata=(("authorization", f"Bearer {token_for(self.grant)}"),),
        )
        self._assembler = Assembler(lambda header: None)

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.put(None)
        self._call.cancel()
        self._channel.close()

    def send(self, *frames: bytes) -> None:
        for frame in frames:
            self._out.put(frame)

    def end(self) -> None:
        self._out.put(None)

    def receive(self) -> Message:
        for frame in self._call:
            if (message := self._assembler.feed(frame)) is not None:
                return message
        raise EOFError

    def hello(self, **changes: Any) -> bytes:
        g = self.grant
        body = {
            "protocol": VERSION, "fedsplit_version": fedsplit.__version__, "backbone_sha256": DIGEST,
            "a": g.a, "b": g.b, "version": g.version, "codec": "fp32",
        }  # fmt: skip
        return json_frame(FrameKind.HELLO, Hello(**body | changes).model_dump_json())

    def greet(self) -> Welcome:
        self.send(self.hello())
        welcome = read_body(Welcome, self.receive())
        self.session = welcome.session
        return welcome

    def error(self) -> ErrorBody:
        """The ERROR frame that must come next, and then the end with status OK."""
        message = self.receive()
        assert message.header.kind is FrameKind.ERROR
        with pytest.raises(EOFError):
            self.receive()
        assert self._call.code() is grpc.StatusCode.OK
        return read_body(ErrorBody, message)

    def tensor(
        self, kind: FrameKind, array: Array, step: int = 0, flags: Flag = Flag.NONE, **changes: Any
    ) -> list[bytes]:
        data = memoryview(np.ascontiguousarray(array).reshape(-1)).cast("B")
        body = Encoded(changes.pop("dtype", Dtype.FLOAT32), changes.pop("dims", array.shape), data)
        options = {"codec": CodecId.FP32, "flags": flags, "session": self.session, "step": step}
        return list(frames_of(kind, body, **options | changes))

    def mask(self, *dims: int, fill: int = 1, step: int = 0, **changes: Any) -> list[bytes]:
        raw = {"dtype": Dtype.BOOL, "codec": CodecId.RAW}
        return self.tensor(FrameKind.MASK, np.full(dims, fill, np.uint8), step, **raw | changes)


Sends = Callable[[RawClient], list[bytes]]
"""What a test sends."""


@pytest.fixture
def host() -> FakeHost:
    return FakeHost()


@pytest.fixture
def server(host: FakeHost) -> Iterator[EncoderServer]:
    with EncoderServer(
        host, key=KEY, limits=Limits(max_sessions=16, max_sessions_per_site=8)
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """No thread of ours outlives a test."""
    yield
    eventually(lambda: not [t.name for t in threading.enumerate() if t.name.startswith("fedsplit")])


@pytest.fixture
def unharmed(server: EncoderServer, host: FakeHost) -> Iterator[None]:
    """After the test the server answers a healthy session, and holds nothing."""
    yield
    eventually(lambda: server.stats().live_sessions == 0)
    with connect(server.address) as stream:
        h_BTD = make_h()
        np.testing.assert_array_equal(stream.encode(0, h_BTD, want="gradient"), 2 * h_BTD + 1)
        stream.settle(0, h_BTD)
    eventually(lambda: server.stats().live_sessions == 0)
    assert server.stats().kept_steps == 0
    assert all(encoder.closed == 1 for encoder in host.encoders)

"""Zeroth order at the server: the estimates are right, and no gradient crosses the wire, which the frames show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from fedsplit.core import directions
from fedsplit.core.cut import Cut
from fedsplit.core.encoder import EncoderTraining
from fedsplit.core.errors import ProtocolError, RefusedError
from fedsplit.model import module, seam
from fedsplit.model.backbone import Backbone
from fedsplit.model.local_encoder import LocalEncoder
from fedsplit.model.split import SplitModel, server_part
from fedsplit.transport import client
from fedsplit.transport.client import collect
from fedsplit.transport.frames import HEADER_BYTES, FrameKind, Header, parse
from fedsplit.transport.server import EncoderServer
from fedsplit.trunk.host import BackboneHost
from tests.model.whole import SPEC, make_batch, split_model, trained_start
from tests.trunk.wire import dial, grant, packed, publisher, serving

PLACE = Cut(1, 3)
B, T, D = 5, 17, 24
ZO = EncoderTraining(
    mode="zeroth-order", optimizer="sgd", learning_rate=0.05, epsilon=1e-2, seed=11, queries=2
)


@pytest.fixture(scope="module")
def backbone(tiny: dict[str, Path]) -> Backbone:
    return Backbone.find(str(tiny["vit"]))


@pytest.fixture(scope="module")
def server(backbone: Backbone) -> Iterator[EncoderServer]:
    with serving(backbone) as running:
        yield running


@pytest.fixture(scope="module")
def host(backbone: Backbone) -> BackboneHost:
    host = BackboneHost(backbone)
    host.publish("v", packed(backbone))
    return host


@pytest.fixture(scope="module")
def device(host: BackboneHost) -> SplitModel:
    session = host.open(grant(host.backbone, PLACE))
    return split_model(host.backbone, PLACE, trained_start(host.backbone), session)


@pytest.fixture(scope="module")
def tail(device: SplitModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """z [B, T, D] -> the loss of the test batch."""
    labels = make_batch("vit")[2]
    return lambda z: torch.nn.functional.cross_entropy(device.tail(z, None), labels)


@pytest.fixture(scope="module", name="h_BTD")
def activations(device: SplitModel) -> torch.Tensor:
    return device.head(make_batch("vit")[0], None).detach()


def one_step(encoder: Any, step: int, h_BTD: torch.Tensor, tail: Any) -> torch.Tensor:
    """What a site does: send h, get K outputs, send K losses."""
    with torch.no_grad():
        z_KBTD = seam.probe(h_BTD, None, encoder, step)
        losses_K = torch.stack([tail(z) for z in z_KBTD])
    seam.settle(losses_K, encoder, step)
    return losses_K


@pytest.mark.parametrize("kind", ["gaussian", "sphere"])
@pytest.mark.parametrize("estimator", ["forward", "central", "one-point"])
def test_the_server_does_what_the_formulas_say(
    estimator: Any, kind: Any, backbone: Backbone, server: EncoderServer, h_BTD: Any, tail: Any
) -> None:
    """Three steps over the wire against numpy arithmetic and plain encoders at the perturbed weights."""
    rate = 0.001 if estimator == "one-point" else 0.05
    training = ZO.model_copy(
        update={"estimator": estimator, "directions": kind, "learning_rate": rate}
    )
    with dial(server, grant(backbone, PLACE, training=training)) as stream:
        for step in range(3):
            one_step(stream, 10 + 2 * step, h_BTD, tail)
            stream.encode(11 + 2 * step, h_BTD.numpy())  # evaluation does not shift directions
    delta = collect(server.address, publisher(), "v")["s"]

    start = trained_start(backbone)
    names = module.server_names(backbone, SPEC, PLACE)
    now = {n: start[n].copy() for n in names}
    shapes = {n: v.shape for n, v in now.items()}
    part = server_part(backbone, SPEC)

    def loss_at(weights: dict[str, Any]) -> float:
        module.load(part, {**start, **weights})
        z = LocalEncoder(part, PLACE).encode(0, h_BTD.numpy())
        with torch.no_grad():
            return float(tail(torch.from_numpy(z)))

    dim = sum(math.prod(s) for s in shapes.values())
    for step in range(3):
        us = [directions.direction(11, step, j, shapes, kind) for j in range(2)]

        def moved(u: dict[str, Any], by: float, now: Any = now) -> dict[str, Any]:
            return {n: (now[n] + np.float32(by) * u[n]).astype(np.float32) for n in now}

        slopes = []
        for u in us:
            up, eps = loss_at(moved(u, 1e-2)), 1e-2
            if estimator == "forward":
                slopes.append((up - loss_at(now)) / eps)
            elif estimator == "central":
                slopes.append((up - loss_at(moved(u, -1e-2))) / (2 * eps))
            else:
                slopes.append(up / eps)
        factor = dim if kind == "sphere" else 1
        for n in now:
            g = sum(factor * s * u[n] for s, u in zip(slopes, us, strict=True)) / 2
            now[n] = (now[n] - rate * g).astype(np.float32)
    assert delta.keys() == names
    for name in names:
        np.testing.assert_allclose(
            start[name] + delta[name], now[name], rtol=1e-4, atol=2e-5, err_msg=name
        )


def gradient_of(host: BackboneHost, h_BTD: Any, tail: Any, training: EncoderTraining) -> np.ndarray:
    """One SGD step with rate 1: the estimate (or gradient) is minus the delta."""
    session = host.open(grant(host.backbone, PLACE, training=training))
    if training.mode == "hosted":
        h = h_BTD.clone().requires_grad_()
        tail(seam.cross(h, None, session, 0)).backward()
    else:
        one_step(session, 0, h_BTD, tail)
    session.close()
    delta = host.collect("v")["s"]
    return -np.concatenate([delta[n].ravel() for n in sorted(delta)])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_the_estimate_nears_the_true_gradient(host: BackboneHost, h_BTD: Any, tail: Any) -> None:
    exact = gradient_of(
        host, h_BTD, tail, EncoderTraining(mode="hosted", optimizer="sgd", learning_rate=1.0)
    )
    d, found = len(exact), {}
    for kind in ("gaussian", "sphere"):
        for queries in (5, 200):
            # A unit direction is shorter than a Gaussian one by sqrt(d): the same length of move for both.
            eps = 1e-3 * (math.sqrt(d) if kind == "sphere" else 1)
            training = ZO.model_copy(
                update={
                    "learning_rate": 1.0,
                    "queries": queries,
                    "directions": kind,
                    "epsilon": eps,
                }
            )
            found[kind, queries] = gradient_of(host, h_BTD, tail, training)
    for kind in ("gaussian", "sphere"):
        near, far = cosine(found[kind, 200], exact), cosine(found[kind, 5], exact)
        # E cos ~ sqrt(q / (q + d))
        assert near > 0.8 * math.sqrt(200 / (200 + d))
        assert near > far + 0.1
        # unbiased: the part along the gradient has the gradient's length
        along = float(found[kind, 200] @ exact / (exact @ exact))
        assert along == pytest.approx(1.0, abs=0.35)
    assert cosine(found["gaussian", 200], found["sphere", 200]) > 0.99
    ratio = np.linalg.norm(found["gaussian", 200]) / np.linalg.norm(found["sphere", 200])
    assert ratio == pytest.approx(1.0, abs=0.05)


def test_the_loss_falls(host: BackboneHost, h_BTD: Any, tail: Any) -> None:
    training = ZO.model_copy(update={"queries": 8, "optimizer": "adamw", "learning_rate": 0.02})
    session = host.open(grant(host.backbone, PLACE, training=training))
    losses = [float(one_step(session, i, h_BTD, tail).mean()) for i in range(30)]
    session.close()
    assert losses[-1] < losses[0] - 0.02
    assert host.collect("v").keys() == {"s"}


class Tap(grpc.StreamStreamClientInterceptor):
    """Keeps every gRPC message of the streams that pass it."""

    def __init__(self) -> None:
        self.up: list[bytes] = []
        self.down: list[bytes] = []

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        call = continuation(details, self._noted(requests))
        return _Tapped(call, self.down)

    def _noted(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        for frame in requests:
            self.up.append(frame)
            yield frame


class _Tapped:
    def __init__(self, call: Any, seen: list[bytes]) -> None:
        self._call, self._seen = call, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def __iter__(self) -> Iterator[bytes]:
        for frame in self._call:
            self._seen.append(frame)
            yield frame


@pytest.mark.parametrize("estimator", ["forward", "central", "one-point"])
def test_no_gradient_crosses_in_either_direction(
    estimator: Any,
    backbone: Backbone,
    server: EncoderServer,
    h_BTD: Any,
    tail: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tap, open_channel = Tap(), client.open_channel
    monkeypatch.setattr(
        client,
        "open_channel",
        lambda *a, **k: grpc.intercept_channel(open_channel(*a, **k), tap),
    )
    training, steps = ZO.model_copy(update={"estimator": estimator, "queries": 3}), 4
    many = {"forward": 4, "central": 6, "one-point": 3}[estimator]
    with dial(server, grant(backbone, PLACE, training=training)) as stream:
        for step in range(steps):
            one_step(stream, step, h_BTD, tail)
        stream.encode(99, h_BTD.numpy())
        traffic = stream.traffic()
    assert collect(server.address, publisher(), "v")["s"]

    up, down = [parse(f)[0] for f in tap.up], [parse(f)[0] for f in tap.down]
    names = [h.kind.name for h in up], [h.kind.name for h in down]
    assert names[0] == ["HELLO", *(["PROBE", "SCORE"] * steps), "ENCODE"]
    assert names[1] == ["WELCOME", *(["PROBED", "ACK"] * steps), "ENCODED"]

    def of(headers: list[Header], *kinds: FrameKind) -> list[Header]:
        return [h for h in headers if h.kind in kinds]

    # Up: h, then K floats. Down: K outputs, then one byte.
    assert {h.dims for h in of(up, FrameKind.PROBE, FrameKind.ENCODE)} == {(B, T, D)}
    assert {(h.dims, h.total) for h in of(up, FrameKind.SCORE)} == {((many,), 4 * many)}
    assert {h.dims for h in of(down, FrameKind.PROBED)} == {(many, B, T, D)}
    assert {h.total for h in of(down, FrameKind.ACK)} == {1}
    extra = sum(len(f) for f in tap.up) - sum(
        h.length for h in of(up, FrameKind.PROBE, FrameKind.ENCODE)
    )
    hello = of(up, FrameKind.HELLO)[0].length
    assert extra - hello == len(tap.up) * HEADER_BYTES + steps * 4 * many
    assert traffic.bytes_up == sum(map(len, tap.up))
    assert traffic.bytes_down == sum(map(len, tap.down))


def test_a_zeroth_order_session_takes_no_gradient(
    backbone: Backbone, server: EncoderServer, h_BTD: Any
) -> None:
    h = h_BTD.numpy()
    with (
        pytest.raises(RefusedError, match="takes no gradient"),
        dial(server, grant(backbone, PLACE, training=ZO)) as stream,
    ):
        stream.encode(0, h, want="gradient")
    host = BackboneHost(backbone)
    host.publish("v", packed(backbone))
    session = host.open(grant(backbone, PLACE, training=ZO))
    with pytest.raises(RefusedError, match="keeps no graph"):
        session.encode(0, h, want="gradient")
    with pytest.raises(ProtocolError, match="has losses of shape"):
        session.settle(0, h)
    assert not session.trains


def test_losses_come_once_and_are_as_many_as_the_forwards(
    backbone: Backbone, server: EncoderServer, h_BTD: Any
) -> None:
    with dial(server, grant(backbone, PLACE, training=ZO)) as stream:
        z = stream.encode(0, h_BTD.numpy(), want="probes")
        assert z.shape == (4, B, T, D)
        with pytest.raises(ProtocolError, match=r"\(4,\) is wanted"):
            stream.settle(0, np.zeros(3, np.float32))
        with pytest.raises(ProtocolError, match="NaN"):
            stream.settle(0, np.full(4, np.nan, np.float32))
        with pytest.raises(ProtocolError, match=r"\(4,\) is wanted"):
            stream.settle(0, z[0])
        with pytest.raises(ProtocolError, match="already kept"):
            stream.encode(0, h_BTD.numpy(), want="probes")
        stream.settle(0, np.zeros(4, np.float32))
        with pytest.raises(ProtocolError, match="settle it once"):
            stream.settle(0, np.zeros(4, np.float32))


def test_an_answer_beyond_one_message_is_refused_before_it_is_computed(
    backbone: Backbone, server: EncoderServer, h_BTD: Any
) -> None:
    huge = ZO.model_copy(update={"queries": 1024})
    with dial(server, grant(backbone, PLACE, training=huge, max_tokens=400)) as stream:
        wide = np.zeros((8, 400, D), np.float32)
        with pytest.raises(ProtocolError, match="lower zo-queries or batch-size"):
            stream.encode(0, wide, want="probes")


def test_pooled_probes_and_masks(tiny: dict[str, Path]) -> None:
    """A text with padding at a cut that ends at the last block: K pooled outputs, of masked activations."""
    backbone, place = Backbone.find(str(tiny["bert"])), Cut(1, 4)
    host = BackboneHost(backbone)
    host.publish("v", packed(backbone))
    training = ZO.model_copy(update={"estimator": "forward"})
    session = host.open(grant(backbone, place, training=training))
    inputs, mask, _ = make_batch("bert")
    model = split_model(backbone, place, trained_start(backbone), session)
    h = model.head(inputs, mask).detach()
    plain = host.open(grant(backbone, place)).encode(0, h.numpy(), mask.numpy())
    z_KBP = seam.probe(h, mask, session, 0)
    assert z_KBP.shape == (3, *plain.shape)
    np.testing.assert_array_equal(z_KBP[0].numpy(), plain)
    assert not torch.equal(z_KBP[1], z_KBP[0])
    np.testing.assert_array_equal(session.encode(1, h.numpy(), mask.numpy()), plain)

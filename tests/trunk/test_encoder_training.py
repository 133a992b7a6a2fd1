"""Training at the encoder over the real stream: hosted equals the whole model, shared with one site too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsplit.core.cut import Cut
from fedsplit.core.encoder import EncoderTraining
from fedsplit.core.errors import RefusedError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.split import SplitModel
from fedsplit.transport.client import StreamEncoder, collect
from fedsplit.transport.server import EncoderServer
from tests.model.whole import SPEC, make_batch, split_model, trained_start, whole_model
from tests.trunk.wire import dial, grant, publisher, serving

FAMILIES = ["vit", "bert"]
RATE = 0.01
SGD = EncoderTraining(mode="hosted", optimizer="sgd", learning_rate=RATE)
ADAMW = EncoderTraining(mode="hosted", learning_rate=RATE, weight_decay=0.1)


@pytest.fixture(scope="module")
def backbones(tiny: dict[str, Path]) -> dict[str, Backbone]:
    return {family: Backbone.find(str(tiny[family])) for family in FAMILIES}


@pytest.fixture(scope="module")
def servers(backbones: dict[str, Backbone]) -> Iterator[dict[str, EncoderServer]]:
    with serving(backbones["vit"]) as vit, serving(backbones["bert"]) as bert:
        yield {"vit": vit, "bert": bert}


def make_optimizer(parameters: Any, training: EncoderTraining) -> torch.optim.Optimizer:
    kind = torch.optim.SGD if training.optimizer == "sgd" else torch.optim.AdamW
    return kind(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)


def steps_of(family: str, steps: int) -> list[tuple[dict[str, Any], Any, torch.Tensor]]:
    """The test batch, its samples turned by one for each step."""
    inputs, mask, labels = make_batch(family)

    def turned(value: Any, by: int) -> Any:
        return None if value is None else value.roll(by, 0)

    return [
        ({n: turned(v, i) for n, v in inputs.items()}, turned(mask, i), labels.roll(2 * i))
        for i in range(steps)
    ]


@dataclass
class Trained:
    logits: list[torch.Tensor]
    weights: dict[str, torch.Tensor]


def train_whole(
    backbone: Backbone,
    folder: Path,
    training: EncoderTraining,
    steps: int,
    frozen: tuple[str, ...] = (),
) -> Trained:
    """transformers' own model in one process, by the module's names."""
    whole = whole_model(backbone, trained_start(backbone), folder)
    trainable = {
        n.removeprefix("base_model.model.")
        .replace(".default", "")
        .replace(".modules_to_save", ""): p
        for n, p in whole.named_parameters()
        if p.requires_grad
    }
    if frozen:
        trainable = {n: p for n, p in trainable.items() if not n.startswith(frozen)}
    optimizer = make_optimizer(trainable.values(), training)
    seen = []
    for inputs, _, labels in steps_of(backbone.config.model_type, steps):
        logits = whole(**inputs).logits
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        seen.append(logits.detach())
    return Trained(seen, {n: p.detach().clone() for n, p in trainable.items()})


def train_split(model: SplitModel, family: str, training: EncoderTraining, steps: int) -> Trained:
    """The device's loop: what round.py does, without its options."""
    trainable = {n: p for n, p in module.parameters(model.part).items() if p.requires_grad}
    optimizer = make_optimizer(trainable.values(), training)
    seen = []
    for inputs, mask, labels in steps_of(family, steps):
        h = model.head(inputs, mask)
        h = h if h.requires_grad else h.detach().requires_grad_()
        logits = model.tail(model.encode(h, mask), mask)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        seen.append(logits.detach())
    return Trained(seen, {n: p.detach().clone() for n, p in trainable.items()})


def assert_equal(split: Trained, whole: Trained, delta: Any, start: Any) -> None:
    """Logits of every step and the device's weights bit for bit; the server's but for the delta's rounding."""
    for got, wanted in zip(split.logits, whole.logits, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    for name, value in split.weights.items():
        torch.testing.assert_close(value, whole.weights[name], rtol=0, atol=0)
    assert split.weights.keys() | delta.keys() == whole.weights.keys()
    assert not split.weights.keys() & delta.keys()
    assert max(np.abs(change).max() for change in delta.values()) > 1e-5
    for name, change in delta.items():
        np.testing.assert_allclose(start[name] + change, whole.weights[name].numpy(), atol=1e-6)


@pytest.mark.parametrize("training", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("cut", ["0,4", "1,3", "2,4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hosted_equals_whole(
    family: str,
    cut: str,
    training: EncoderTraining,
    backbones: dict[str, Backbone],
    servers: dict[str, EncoderServer],
    tmp_path: Path,
) -> None:
    backbone, server, place = backbones[family], servers[family], Cut.parse(cut)
    whole = train_whole(backbone, tmp_path, training, steps=4)
    with dial(server, grant(backbone, place, training=training)) as stream:
        assert stream.trains
        model = split_model(backbone, place, trained_start(backbone), stream)
        split = train_split(model, family, training, steps=4)
    collected = collect(server.address, publisher(), "v")
    assert collected.keys() == {"s"}
    assert collected["s"].keys() == module.server_names(backbone, SPEC, place)
    assert_equal(split, whole, collected["s"], trained_start(backbone))
    assert collect(server.address, publisher(), "v") == {}


def test_a_frozen_head_gets_nothing_back(
    backbones: dict[str, Backbone], servers: dict[str, EncoderServer], tmp_path: Path
) -> None:
    backbone, server, place = backbones["vit"], servers["vit"], Cut(1, 3)
    whole = train_whole(backbone, tmp_path, SGD, steps=3, frozen=("vit.layers.0.",))
    with dial(server, grant(backbone, place, training=SGD)) as stream:
        model = split_model(backbone, place, trained_start(backbone), stream)
        module.freeze_head(model.part, place.a)
        split = train_split(model, "vit", SGD, steps=3)
        traffic = stream.traffic()
    delta = collect(server.address, publisher(), "v")["s"]
    assert_equal(split, whole, delta, trained_start(backbone))
    h_bytes = 4 * 5 * 17 * 24
    assert traffic.payload_up == 3 * 2 * h_bytes  # h and dz
    assert traffic.payload_down == 3 * h_bytes  # z alone
    assert traffic.bytes_down < 3 * h_bytes + 2000


def test_shared_with_one_site_equals_hosted(
    backbones: dict[str, Backbone], servers: dict[str, EncoderServer]
) -> None:
    backbone, server, place = backbones["vit"], servers["vit"], Cut(1, 3)
    found = {}
    for mode in ("hosted", "shared"):
        training = ADAMW.model_copy(update={"mode": mode})
        with dial(server, grant(backbone, place, training=training)) as stream:
            model = split_model(backbone, place, trained_start(backbone), stream)
            trained = train_split(model, "vit", training, steps=3)
        ((who, delta),) = collect(server.address, publisher(), "v").items()
        assert who == {"hosted": "s", "shared": ""}[mode]
        assert delta.keys() == module.server_names(backbone, SPEC, place)
        found[mode] = trained, delta
    (hosted, own), (shared, common) = found["hosted"], found["shared"]
    assert own.keys() == common.keys()
    for name in own:
        np.testing.assert_array_equal(own[name], common[name])
    for name in hosted.weights:
        torch.testing.assert_close(hosted.weights[name], shared.weights[name], rtol=0, atol=0)


def make_h(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 5, 24), dtype=np.float32)


def test_the_client_refuses_before_it_sends(
    backbones: dict[str, Backbone], servers: dict[str, EncoderServer]
) -> None:
    with dial(servers["vit"], grant(backbones["vit"], Cut(1, 3))) as stream:
        typed: StreamEncoder = stream
        assert not typed.trains
        typed.encode(0, make_h(), want="gradient")
        for call in (
            lambda: typed.settle(0, make_h(), quiet=True),
            lambda: typed.encode(1, make_h(), want="probes"),
        ):
            with pytest.raises(RefusedError, match="frozen"):
                call()
        typed.settle(0, make_h())

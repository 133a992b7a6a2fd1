"""What a site may set for its training, each against the arithmetic it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.errors import ConfigError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleTensors
from fedsplit.model.trunk import autocast
from fedsplit.training import pipeline
from fedsplit.training.data import Batch
from fedsplit.training.round import evaluate, train
from tests.training.small import (
    BARE,
    BATCHES,
    LORA,
    assert_same_bits,
    every_epoch,
    local,
    make_batches,
    same_bits,
    settings,
)

ALL: dict[str, Any] = {
    "loss": "balanced-softmax",
    "class_counts": (14, 13),
    "label_smoothing": 0.1,
    "clip_norm": 0.05,
    "accumulate": 2,
    "proximal_mu": 0.1,
    "precision": "bf16",
    "augmentation": "crop+flip",
    "augmentation_key": "0/site-1/3",
    "schedule": (1.0, 0.5),
    "lora_learning_rate": 0.002,
    "weight_decay": 0.01,
}


def trained(
    backbone: Backbone, spec: Any = LORA, batches: Any = every_epoch, **chosen: Any
) -> ModuleTensors:
    frozen = chosen.pop("frozen_head", False)
    model, _ = local(backbone, spec, frozen_head=frozen)
    train(model, batches, settings(**chosen))
    return module.read(model.part)


@pytest.fixture(scope="module")
def plain(vit: Backbone) -> ModuleTensors:
    """What the defaults come to."""
    return trained(vit)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_defaults_are_plain_torch_to_the_bit(optimizer: str, vit: Backbone) -> None:
    chosen = {"optimizer": optimizer, "lora_learning_rate": 0.003, "weight_decay": 0.02}
    schedule = (1.0, 0.25)
    model, _ = local(vit, LORA)
    own = module.parameters(model.part)
    groups = [
        {"params": [p for n, p in own.items() if (".lora_" in n) == lora], "lr": rate}
        for lora, rate in ((True, 0.003), (False, 0.01))
    ]
    kind = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    plain = kind(groups, weight_decay=0.02)
    for factor in schedule:
        for group, rate in zip(plain.param_groups, (0.003, 0.01), strict=True):
            group["lr"] = rate * factor
        for b in BATCHES:
            loss = torch.nn.functional.cross_entropy(model(b.inputs, b.mask), b.labels)
            plain.zero_grad()
            loss.backward()
            plain.step()
    assert_same_bits(trained(vit, **chosen, schedule=schedule), module.read(model.part))


@pytest.mark.parametrize("frozen_head", [False, True])
def test_everything_at_once_is_reproduced_to_the_bit(frozen_head: bool, vit: Backbone) -> None:
    first, second = (trained(vit, frozen_head=frozen_head, **ALL) for _ in range(2))
    assert_same_bits(first, second)
    assert all(np.isfinite(t).all() for t in first.values())


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("class_counts", "augmentation_key")])
def test_every_option_does_something(name: str, plain: ModuleTensors, vit: Backbone) -> None:
    extra = {"class_counts": (20, 7)} if name == "loss" else {}
    assert not same_bits(trained(vit, **{name: ALL[name]} | extra), plain)


# Accumulation.


def one_batch(batches: list[Batch]) -> Batch:
    pixels = torch.cat([b.inputs["pixel_values"] for b in batches])
    labels = torch.cat([b.labels for b in batches])
    return Batch({"pixel_values": pixels}, labels, None, np.arange(len(labels)))


@pytest.mark.parametrize("sizes", [[4, 4], [8, 3], [5, 5, 1]])
def test_accumulated_batches_are_one_large_batch(sizes: list[int], vit: Backbone) -> None:
    """Weights by samples: a smaller last batch counts for less."""
    batches = make_batches(sizes)
    chosen = {"optimizer": "sgd", "learning_rate": 0.5, "epochs": 1}
    small = trained(vit, batches=lambda _: batches, accumulate=len(sizes), **chosen)
    large = trained(vit, batches=lambda _: [one_batch(batches)], **chosen)
    for name, tensor in large.items():
        np.testing.assert_allclose(small[name], tensor, rtol=1e-5, atol=1e-6, err_msg=name)


def test_what_is_left_at_the_end_of_an_epoch_is_a_step(vit: Backbone) -> None:
    """27 samples in 4 batches, 3 a step: the fourth batch steps by itself."""
    chosen = {"optimizer": "sgd", "epochs": 1}
    grouped = [one_batch(BATCHES[:3]), BATCHES[3]]
    small = trained(vit, accumulate=3, **chosen)
    large = trained(vit, batches=lambda _: grouped, **chosen)
    for name, tensor in large.items():
        np.testing.assert_allclose(small[name], tensor, rtol=1e-5, atol=1e-6, err_msg=name)


# Clipping.


def test_a_clipped_step_is_as_long_as_allowed(vit: Backbone) -> None:
    chosen = {"optimizer": "sgd", "learning_rate": 1.0, "epochs": 1}
    start = trained(vit, batches=lambda _: [])
    after = trained(vit, batches=lambda _: BATCHES[:1], clip_norm=0.01, **chosen)
    moved = np.sqrt(sum(np.sum((after[n] - start[n]) ** 2, dtype="f8") for n in start))
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_a_short_gradient_is_not_touched(plain: ModuleTensors, vit: Backbone) -> None:
    assert_same_bits(trained(vit, clip_norm=1e6), plain)


# The proximal term.


def test_the_proximal_gradient_is_that_of_the_term(vit: Backbone) -> None:
    """Two SGD steps by autograd on the written-out objective."""
    mu, rate = 0.7, 0.2
    model, _ = local(vit, LORA)
    own = module.parameters(model.part)
    received = {n: p.detach().clone() for n, p in own.items()}
    plain = torch.optim.SGD(own.values(), lr=rate)
    for b in BATCHES[:2]:
        loss = torch.nn.functional.cross_entropy(model(b.inputs, b.mask), b.labels)
        loss = loss + mu / 2 * sum(((p - received[n]) ** 2).sum() for n, p in own.items())
        plain.zero_grad()
        loss.backward()
        plain.step()
    got = trained(
        vit,
        batches=lambda _: BATCHES[:2],
        epochs=1,
        optimizer="sgd",
        learning_rate=rate,
        proximal_mu=mu,
    )
    for name, parameter in own.items():
        np.testing.assert_allclose(got[name], parameter.detach(), rtol=1e-5, atol=1e-7)


def test_a_strong_pull_stays_near(vit: Backbone) -> None:
    start = trained(vit, batches=lambda _: [])

    def far(mu: float) -> float:
        after = trained(vit, optimizer="sgd", learning_rate=0.05, epochs=3, proximal_mu=mu)
        return float(sum(np.sum((after[n] - start[n]) ** 2) for n in start))

    assert far(10.0) < 0.3 * far(0.0)


def test_an_anchor_elsewhere_pulls_there(vit: Backbone) -> None:
    model, _ = local(vit, BARE)
    anchor = {n: np.full_like(t, 0.5) for n, t in module.read(model.part).items()}
    chosen = settings(optimizer="sgd", learning_rate=0.01, proximal_mu=50.0, epochs=4)
    train(model, every_epoch, chosen, anchor=anchor)
    for tensor in module.read(model.part).values():
        np.testing.assert_allclose(tensor, 0.5, atol=0.2)


def test_the_loss_is_of_the_data_alone(vit: Backbone) -> None:
    model, _ = local(vit, BARE)
    far = {n: np.full_like(t, 9.0) for n, t in module.read(model.part).items()}
    chosen = settings(proximal_mu=1.0, learning_rate=1e-9, epochs=1)
    assert train(model, every_epoch, chosen, anchor=far) == pytest.approx(np.log(2), rel=1e-5)


# Precision.


@pytest.mark.parametrize("cut", ["1,3", "2,2"])
def test_bf16_trains_and_stays_near_fp32(cut: str, vit: Backbone) -> None:
    scores = {}
    for precision in ("fp32", "bf16"):
        model, _ = local(vit, LORA, Cut.parse(cut))
        loss = train(model, every_epoch, settings(precision=precision, epochs=4))
        scores[precision] = loss, evaluate(model, BATCHES, precision=precision).sums["correct"]
        assert {p.dtype for p in module.parameters(model.part).values()} == {torch.float32}
    assert scores["bf16"][0] == pytest.approx(scores["fp32"][0], abs=0.1)
    assert scores["bf16"][1] >= 25


def test_what_crosses_the_seam_is_fp32(vit: Backbone) -> None:
    model, _ = local(vit, LORA)
    h = pipeline.head(model, BATCHES[0], "bf16")
    assert h.dtype == torch.float32
    assert not torch.equal(h, pipeline.head(model, BATCHES[0]))


def test_hardware_without_bf16_is_named(tiny: dict[str, Path]) -> None:
    model, _ = local(Backbone.find(str(tiny["vit"])), BARE)
    with pytest.raises(ConfigError, match=r"precision=bf16 .* 'mps'; use precision=fp32"):
        autocast(torch.device("mps"), "bf16")
    with autocast(model.part.device, "bf16"):
        assert torch.is_autocast_enabled("cpu")


# Settings that make no sense.


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"label_smoothing": 1.0}, "label-smoothing=1.0"),
        ({"clip_norm": -1.0}, "clip-norm=-1.0"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"proximal_mu": -0.1}, "proximal-mu=-0.1"),
        ({"rank_penalty": -1.0}, "rank-penalty=-1.0"),
        ({"accumulate": 0, "clip_norm": -1.0}, r"(?s)clip-norm.*accumulate"),
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        RunConfig.of(**wrong)


def test_a_schedule_has_a_factor_an_epoch() -> None:
    with pytest.raises(ConfigError, match=r"schedule=\(1.0,\)"):
        settings(schedule=(1.0,))

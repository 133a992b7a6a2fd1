"""Personal models: what they learn, what they leave alone, and what they gain where sites differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedsplit.core.cut import Cut
from fedsplit.core.errors import UpdateError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.training.activation_cache import ActivationCache
from fedsplit.training.data import Batch
from fedsplit.training.personal import (
    ROD_BIAS,
    ROD_WEIGHT,
    PersonalClassifier,
    holding,
    train_ditto,
    train_fed_rod,
)
from fedsplit.training.round import evaluate, train
from tests.training.small import (
    BARE,
    BATCHES,
    LORA,
    Wrapped,
    assert_same_bits,
    every_epoch,
    local,
    rewired,
    same_bits,
    settings,
    text_batches,
)

BALANCED = {"loss": "balanced-softmax", "class_counts": (14, 13)}
# A site that calls dark what the others call light.
CONTRARY = [Batch(b.inputs, 1 - b.labels, None, b.keys) for b in BATCHES]
Epoch = Callable[[int], list[Batch]]


def ditto(model: Any, received: Any, saved: Any = None, *, pull: float = 0.1, **chosen: Any) -> Any:
    batches = chosen.pop("batches", every_epoch)
    return train_ditto(
        model, batches, settings(**chosen), received=received, saved=saved or {}, ditto_lambda=pull
    )


# Ditto.


@pytest.mark.parametrize("frozen_head", [False, True])
def test_ditto_leaves_the_global_model_as_it_is(frozen_head: bool, vit: Backbone) -> None:
    model, _ = local(vit, LORA, frozen_head=frozen_head)
    received = module.read(model.part)
    train(model, every_epoch, settings())
    trained = module.read(model.part)
    state = ditto(model, received)
    assert_same_bits(module.read(model.part), trained)
    names = {n for n, p in module.parameters(model.part).items() if p.requires_grad}
    assert state.tensors.keys() == names
    assert any(not np.array_equal(state.tensors[n], received[n]) for n in names)


def test_ditto_without_a_pull_is_training_from_what_came(vit: Backbone) -> None:
    model, _ = local(vit, LORA)
    received = module.read(model.part)
    state = ditto(model, received, pull=0.0)
    loss = train(model, every_epoch, settings())
    assert_same_bits(state.tensors, module.read(model.part))
    assert state.loss == loss


def test_ditto_goes_on_from_what_the_site_saved(vit: Backbone) -> None:
    model, _ = local(vit, BARE)
    received = module.read(model.part)
    first = ditto(model, received)
    second = ditto(model, received, first.tensors)
    assert second.loss < first.loss
    assert not same_bits(first.tensors, second.tensors)


def test_dittos_pull_is_to_the_received_weights(vit: Backbone) -> None:
    """One SGD step of v by autograd on the objective of the paper."""
    model, _ = local(vit, BARE)
    received = module.read(model.part)
    saved = {n: t + 0.3 for n, t in received.items()}
    state = ditto(
        model, received, saved, pull=2.0, epochs=1, optimizer="sgd", batches=lambda _: BATCHES[:1]
    )
    with holding(model.part, saved):
        own = module.parameters(model.part)
        loss = torch.nn.functional.cross_entropy(model(BATCHES[0].inputs, None), BATCHES[0].labels)
        grads = torch.autograd.grad(loss, list(own.values()))
        for (name, value), grad in zip(own.items(), grads, strict=True):
            wanted = value.detach() - 0.01 * (grad + 2.0 * 0.3)
            np.testing.assert_allclose(state.tensors[name], wanted, rtol=1e-5, atol=1e-6)


def test_a_site_that_differs_is_right_by_its_own_copy(vit: Backbone) -> None:
    model, _ = local(vit, BARE)
    train(model, every_epoch, settings(epochs=4))
    received = module.read(model.part)
    assert evaluate(model, CONTRARY).sums["correct"] == 0
    contrary: Epoch = lambda _: CONTRARY  # noqa: E731
    state = ditto(model, received, pull=0.01, batches=contrary, learning_rate=0.05, epochs=8)
    with holding(model.part, state.tensors):
        assert evaluate(model, CONTRARY).sums["correct"] == 27
    assert evaluate(model, CONTRARY).sums["correct"] == 0
    held = ditto(model, received, pull=100.0, batches=contrary, optimizer="sgd", epochs=4)
    with holding(model.part, held.tensors):
        assert evaluate(model, CONTRARY).sums["correct"] == 0


def test_ditto_is_reproduced_to_the_bit(vit: Backbone) -> None:
    states = []
    for _ in range(2):
        model, _ = local(vit, LORA)
        states.append(ditto(model, module.read(model.part)))
    assert_same_bits(states[0].tensors, states[1].tensors)


def test_the_cache_serves_the_personal_copy_too(vit: Backbone) -> None:
    model, _ = local(vit, BARE, Cut(0, 4))
    model, encoder = rewired(model, Wrapped)
    cache = ActivationCache().at(model.cut, "v")
    received = module.read(model.part)
    train(model, every_epoch, settings(), cache=cache)
    state = train_ditto(
        model, every_epoch, settings(), received=received, saved={}, ditto_lambda=0.1, cache=cache
    )
    with holding(model.part, state.tensors):
        evaluate(model, BATCHES, cache=cache)
    assert encoder.samples == 27


@pytest.mark.parametrize("wrong", [{"classifier.bias": np.zeros(3, "f4")}])
def test_ditto_state_of_another_run_is_refused(wrong: Any, vit: Backbone) -> None:
    model, _ = local(vit, BARE)
    with pytest.raises(UpdateError, match=r"classifier.bias has shape \(3,\), \(2,\) is wanted"):
        ditto(model, module.read(model.part), wrong)


def test_an_error_gives_the_model_its_own_weights_back(vit: Backbone) -> None:
    model, _ = local(vit, BARE)
    before = module.read(model.part)

    def train_badly() -> None:
        with holding(model.part, {n: t + 1 for n, t in before.items()}):
            assert not same_bits(module.read(model.part), before)
            raise UpdateError("stop")

    with pytest.raises(UpdateError, match="stop"):
        train_badly()
    assert_same_bits(module.read(model.part), before)


# Fed-RoD.


def rod(model: Any, saved: Any = None, **chosen: Any) -> Any:
    batches = chosen.pop("batches", every_epoch)
    return train_fed_rod(model, batches, settings(**BALANCED | chosen), saved=saved or {})


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_the_generic_model_trains_as_if_alone(family: str, vit: Backbone, bert: Backbone) -> None:
    backbone = {"vit": vit, "bert": bert}[family]
    texts = text_batches()
    batches: Epoch = every_epoch if family == "vit" else lambda _: texts
    model, _ = local(backbone, LORA)
    loss, state = rod(model, batches=batches)
    alone, _ = local(backbone, LORA)
    assert train(alone, batches, settings(**BALANCED)) == loss
    assert_same_bits(module.read(model.part), module.read(alone.part))
    assert {n: t.shape for n, t in state.tensors.items()} == {ROD_WEIGHT: (2, 24), ROD_BIAS: (2,)}
    assert all(np.any(t) for t in state.tensors.values())


def test_the_personal_classifier_sees_features_and_generic_logits(vit: Backbone) -> None:
    """Two SGD steps written out, on a generic model that stands still."""
    model, _ = local(vit, BARE)
    train(model, every_epoch, settings(epochs=1))
    layer = torch.nn.Linear(24, 2)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    plain = torch.optim.SGD(layer.parameters(), lr=0.1)
    with torch.no_grad():
        seen = [model.encode(model.head(b.inputs, None), None) for b in BATCHES[:2]]
        pooled = [model.part.ends.pool(model.part.trunk.run(z, None, 3, 4), None) for z in seen]
        generic = [model.part.ends.classify(p) for p in pooled]
    for batch, features, logits in zip(BATCHES, pooled, generic, strict=False):
        loss = torch.nn.functional.cross_entropy(logits + layer(features), batch.labels)
        plain.zero_grad()
        loss.backward()
        plain.step()
    for parameter in model.part.model.parameters():
        parameter.requires_grad_(False)
    model.part.model.classifier.bias.requires_grad_(True)
    chosen = {
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "epochs": 1,
        "batches": lambda _: BATCHES[:2],
    }
    before = model.part.model.classifier.bias.detach().clone()
    # A schedule of 0 holds the generic model; the personal classifier keeps its rate.
    _, state = rod(model, **chosen, schedule=(0.0,))
    assert torch.equal(before, model.part.model.classifier.bias)
    wanted = {ROD_WEIGHT: layer.weight, ROD_BIAS: layer.bias}
    for name, value in wanted.items():
        np.testing.assert_allclose(state.tensors[name], value.detach(), rtol=1e-5, atol=1e-7)


def test_a_contrary_site_is_right_by_its_own_classifier(vit: Backbone) -> None:
    model, _ = local(vit, BARE)
    train(model, every_epoch, settings(epochs=6))
    generic = module.read(model.part)
    _, state = rod(model, batches=lambda _: CONTRARY, learning_rate=0.05, epochs=6)
    # The round's average is the other sites' again, the personal classifier is not.
    module.load(model.part, generic)
    assert evaluate(model, CONTRARY).sums["correct"] == 0
    _, state = rod(model, state.tensors, batches=lambda _: CONTRARY, learning_rate=0.05, epochs=6)
    module.load(model.part, generic)
    with PersonalClassifier(model.part, state.tensors, None) as own:
        assert evaluate(model, CONTRARY, adjust=own.logits).sums["correct"] > 20
    with PersonalClassifier(model.part, {}, None) as own:
        assert evaluate(model, BATCHES, adjust=own.logits) == evaluate(model, BATCHES)


def test_no_hook_stays(vit: Backbone) -> None:
    model, _ = local(vit, BARE)
    rod(model)
    with PersonalClassifier(model.part, {}, None) as own:
        evaluate(model, BATCHES, adjust=own.logits)
    assert not model.part.model.classifier._forward_pre_hooks


def test_the_personal_classifier_draws_nothing_at_random(vit: Backbone) -> None:
    model, _ = local(vit, BARE)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    rod(model, epochs=1)
    assert torch.equal(before, torch.get_rng_state())


def test_rod_state_of_another_run_is_refused(vit: Backbone) -> None:
    model, _ = local(vit, BARE)
    for wrong in ({ROD_BIAS: np.zeros(5, "f4")}, {"classifier.bias": np.zeros(2, "f4")}):
        with pytest.raises(UpdateError, match="remove the saved state"):
            rod(model, wrong)

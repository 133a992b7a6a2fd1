"""Training by forwards alone: it learns, it leaves no trace of its moves, and seeds and scalars retell it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedsplit.core import directions
from fedsplit.core.cut import Cut
from fedsplit.core.encoder import EncoderTraining
from fedsplit.core.errors import ConfigError, FederationError, ProtocolError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.probing_encoder import ProbingEncoder
from fedsplit.model.split import SplitModel, device_part, server_part
from fedsplit.model.trained_tensors import TrainedTensors, trained_at
from fedsplit.model.training_encoder import TrainingEncoder
from fedsplit.training.activation_cache import ActivationCache
from fedsplit.training.data import Batch
from fedsplit.training.optimise import learning_rates
from fedsplit.training.round import evaluate, train
from fedsplit.training.zeroth_order import ZerothOrder, replay, train_zeroth_order
from tests.training.small import (
    BARE,
    BATCHES,
    LORA,
    PLACE,
    Wrapped,
    assert_same_bits,
    every_epoch,
    local,
    rewired,
    same_bits,
    settings,
)

SEED = 2**40 + 5
CHOSEN = {"learning_rate": 0.02, "lora_learning_rate": 0.003}


def zeroth(**other: Any) -> ZerothOrder:
    return ZerothOrder(**({"seed": SEED} | other))


@pytest.mark.parametrize(
    ("estimator", "queries", "rate", "kind"),
    [
        ("central", 2, 0.3, "gaussian"),
        ("forward", 2, 0.3, "gaussian"),
        ("central", 2, 0.3, "sphere"),
        ("one-point", 8, 1e-4, "gaussian"),
    ],
)
def test_it_learns(estimator: str, queries: int, rate: float, kind: str, vit: Backbone) -> None:
    model, _ = local(vit, BARE, Cut(0, 4))
    zo = zeroth(estimator=estimator, queries=queries, directions=kind)
    cache = ActivationCache().at(model.cut, "v")
    chosen = settings(epochs=12, learning_rate=rate)
    first, _ = train_zeroth_order(
        model, lambda _: BATCHES, settings(epochs=1, learning_rate=1e-9), zo
    )
    _, scalars = train_zeroth_order(model, every_epoch, chosen, zo, cache=cache)
    assert scalars.shape == (48, queries)
    assert scalars.dtype == np.float32
    after, _ = train_zeroth_order(model, every_epoch, settings(epochs=1, learning_rate=1e-9), zo)
    if estimator == "one-point":
        # Its variance is what it is known for; that it moves is all that can be asked of so few steps.
        assert after != first
        return
    assert after < 0.7 * first
    assert evaluate(model, BATCHES).sums["correct"] >= 25


@pytest.mark.parametrize("estimator", ["forward", "central", "one-point"])
@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("kind", ["gaussian", "sphere"])
def test_seed_and_scalars_retell_a_round_to_the_bit(
    estimator: str, frozen_head: bool, kind: str, vit: Backbone
) -> None:
    model, _ = local(vit, LORA, frozen_head=frozen_head)
    start, rates = module.read(model.part), {}
    chosen = settings(**CHOSEN, weight_decay=0.1, schedule=(1.0, 0.3), optimizer="sgd")
    zo = zeroth(estimator=estimator, queries=2, directions=kind)
    rates = learning_rates(model.part, chosen)
    _, scalars = train_zeroth_order(model, lambda _: BATCHES[:2], chosen, zo)
    again = replay(start, scalars, zo, rates, factors=[1.0, 1.0, 0.3, 0.3], weight_decay=0.1)
    assert_same_bits(again, module.read(model.part))
    assert not same_bits(again, start)
    assert {n for n in start if np.array_equal(start[n], again[n])} == start.keys() - rates.keys()


def test_two_runs_are_one(vit: Backbone) -> None:
    results = []
    for _ in range(2):
        model, _ = local(vit, LORA)
        results.append((train_zeroth_order(model, every_epoch, settings(), zeroth()), model))
    (loss, scalars), (loss_again, scalars_again) = results[0][0], results[1][0]
    assert loss == loss_again
    assert np.array_equal(scalars, scalars_again)
    assert_same_bits(*(module.read(m.part) for _, m in results))


def test_moving_leaves_no_trace(vit: Backbone) -> None:
    model, _ = local(vit, LORA)
    start = module.read(model.part)
    none = settings(learning_rate=0.0, lora_learning_rate=0.0)
    train_zeroth_order(model, every_epoch, none, zeroth(epsilon=0.3, queries=3))
    assert_same_bits(start, module.read(model.part))
    assert all(p.grad is None for p in model.part.model.parameters())


def test_the_estimate_is_the_gradient_on_average(vit: Backbone) -> None:
    """A classifier of few numbers and many queries: the step points where autograd's does."""
    model, _ = local(vit, BARE, Cut(0, 4))
    own = module.parameters(model.part)
    batch = BATCHES[0]
    loss = torch.nn.functional.cross_entropy(model(batch.inputs, None), batch.labels)
    exact = torch.autograd.grad(loss, list(own.values()))
    start = module.read(model.part)
    chosen = settings(epochs=1, learning_rate=1.0)
    train_zeroth_order(model, lambda _: [batch], chosen, zeroth(queries=600, epsilon=1e-3))
    after = module.read(model.part)
    found = np.concatenate([(start[n] - after[n]).ravel() for n in own])
    wanted = np.concatenate([g.numpy().ravel() for g in exact])
    assert found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted) > 0.9
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(wanted), rel=0.2)


@pytest.mark.parametrize(("frozen_head", "times"), [(True, 1), (False, 3)])
def test_activations_are_fetched_once_where_only_the_tail_trains(
    frozen_head: bool, times: int, vit: Backbone
) -> None:
    model, _ = local(vit, LORA, frozen_head=frozen_head)
    model, encoder = rewired(model, Wrapped)
    zo = zeroth(estimator="forward", queries=2)
    train_zeroth_order(model, every_epoch, settings(epochs=1), zo)
    assert encoder.samples == 27 * times
    assert encoder.backprops == 0
    assert {want for _, want in encoder.encoded} == {"output"}


def test_a_loss_that_is_no_number_ends_it_with_the_weights_unmoved(vit: Backbone) -> None:
    model, _ = local(vit, BARE)
    pixels = torch.full((2, 3, 16, 16), float("nan"))
    broken = Batch({"pixel_values": pixels}, torch.tensor([0, 1]), None, np.arange(2))
    start = module.read(model.part)
    with pytest.raises(FederationError, match="loss became nan in epoch 1; lower learning-rate"):
        train_zeroth_order(model, lambda _: [broken], settings(), zeroth())
    assert_same_bits(start, module.read(model.part))


def test_nothing_to_train_on(vit: Backbone) -> None:
    model, _ = local(vit, BARE)
    loss, scalars = train_zeroth_order(model, lambda _: [], settings(), zeroth(queries=3))
    assert (loss, scalars.shape) == (0.0, (0, 3))
    start = module.read(model.part)
    assert_same_bits(replay(start, scalars, zeroth(queries=3), {"classifier.bias": 1.0}), start)


def test_settings_that_need_a_gradient_are_all_named(vit: Backbone) -> None:
    model, _ = local(vit, BARE)
    wrong = settings(clip_norm=1.0, accumulate=2, proximal_mu=0.1, server_mode="hosted")
    with pytest.raises(ConfigError, match=r"clip_norm.*accumulate.*proximal_mu.*hosted"):
        train_zeroth_order(model, every_epoch, wrong, zeroth())


@pytest.mark.parametrize(
    ("scalars", "factors", "fault"),
    [
        (np.zeros((2, 3), "f4"), (), "float32 .steps, 1. is wanted"),
        (np.zeros(2, "f4"), (), "is wanted"),
        (np.zeros((2, 1)), (), "float64"),
        (np.full((2, 1), np.nan, "f4"), (), "not finite"),
        (np.zeros((2, 1), "f4"), (1.0,), "2 steps of scalars, 1 are wanted"),
    ],
)
def test_scalars_that_nobody_sends(scalars: Any, factors: Any, fault: str) -> None:
    tensors = {"w": np.zeros(3, "f4")}
    with pytest.raises(ProtocolError, match=fault):
        replay(tensors, scalars, zeroth(), {"w": 0.1}, factors=factors)


# Zeroth order and exact gradients at the server.


def device_and_tensors(
    backbone: Backbone, training: EncoderTraining, *, frozen_head: bool = True
) -> tuple[SplitModel, Wrapped, TrainedTensors]:
    start = module.initial(backbone, LORA, seed=0)
    device, server = device_part(backbone, PLACE, LORA), server_part(backbone, LORA)
    module.load(device, start)
    module.load(server, start)
    if frozen_head:
        module.freeze_head(device, PLACE.a)
    tensors = TrainedTensors(trained_at(server, PLACE), training)
    kind = ProbingEncoder if training.mode == "zeroth-order" else TrainingEncoder
    encoder = Wrapped(kind(server, PLACE, tensors))
    return SplitModel(device, PLACE, encoder), encoder, tensors


def test_the_server_learns_from_losses_and_the_tail_from_their_mean(vit: Backbone) -> None:
    training = EncoderTraining(
        mode="zeroth-order", optimizer="sgd", learning_rate=1e-3, queries=2, seed=3
    )
    model, encoder, tensors = device_and_tensors(vit, training)
    chosen = settings(epochs=1, server_mode="zeroth-order", optimizer="sgd", learning_rate=0.3)
    start = module.read(model.part)
    losses = [train(model, every_epoch, chosen) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert tensors.steps == 20
    # Every sample went up once, not a gradient either way, and both sides have moved.
    assert {want for _, want in encoder.encoded} == {"probes"}
    assert encoder.backprops == 0
    assert any(np.any(d) for d in tensors.delta().values())
    moved = {n for n, t in module.read(model.part).items() if not np.array_equal(t, start[n])}
    assert "classifier.weight" in moved
    assert moved <= module.trained_names(vit, LORA, PLACE, head=False)


def test_the_tails_gradient_is_that_of_the_mean_loss(vit: Backbone) -> None:
    training = EncoderTraining(
        mode="zeroth-order", optimizer="sgd", learning_rate=1e-3, epsilon=0.5
    )
    model, _, tensors = device_and_tensors(vit, training)
    own = {n: p for n, p in module.parameters(model.part).items() if p.requires_grad}
    snapshot, batch = tensors.snapshot(), BATCHES[0]
    shapes = tensors.shapes
    u = directions.direction(0, 0, 0, shapes)
    h = model.head(batch.inputs, None)
    server = server_part(vit, LORA)
    losses = []
    for sign in (1, -1):
        moved = {
            n: (p.detach() + sign * 0.5 * torch.from_numpy(u[n])).numpy()
            for n, p in snapshot.items()
        }
        module.load(server, module.initial(vit, LORA, seed=0) | moved)
        z = server.trunk.run(h, None, PLACE.a, PLACE.b)
        losses.append(torch.nn.functional.cross_entropy(model.tail(z, None), batch.labels))
    mean = sum(losses) / 2
    grads = torch.autograd.grad(mean, list(own.values()))
    wanted = {n: (p - 0.1 * g).detach() for (n, p), g in zip(own.items(), grads, strict=True)}
    chosen = settings(epochs=1, learning_rate=0.1, optimizer="sgd", server_mode="zeroth-order")
    assert train(model, lambda _: [batch], chosen) == pytest.approx(float(mean.detach()), rel=1e-5)
    after = module.read(model.part)
    for name, value in wanted.items():
        np.testing.assert_allclose(after[name], value, rtol=1e-4, atol=1e-6)


def test_a_bad_loss_is_never_scored(vit: Backbone) -> None:
    training = EncoderTraining(mode="zeroth-order", learning_rate=1e-3)
    model, _, tensors = device_and_tensors(vit, training)
    pixels = torch.full((2, 3, 16, 16), float("nan"))
    broken = Batch({"pixel_values": pixels}, torch.tensor([0, 1]), None, np.arange(2))
    with pytest.raises(FederationError, match="lower learning-rate"):
        train(model, lambda _: [broken], settings(server_mode="zeroth-order"))
    assert tensors.steps == 0


def test_a_head_cannot_train_by_what_never_comes(vit: Backbone) -> None:
    training = EncoderTraining(mode="zeroth-order", learning_rate=1e-3)
    model, _, _ = device_and_tensors(vit, training, frozen_head=False)
    with pytest.raises(ConfigError, match="use device-training=tail"):
        train(model, every_epoch, settings(server_mode="zeroth-order"))


@pytest.mark.parametrize("mode", ["hosted", "shared"])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_a_servers_exact_training_is_the_whole_models(
    mode: str, frozen_head: bool, vit: Backbone
) -> None:
    """Device and server together take the steps of a model that trains its middle and tail in one place."""
    training = EncoderTraining(mode=mode, optimizer="sgd", learning_rate=0.1)
    model, encoder, tensors = device_and_tensors(vit, training, frozen_head=frozen_head)
    chosen = {"optimizer": "sgd", "learning_rate": 0.1}
    loss = train(model, every_epoch, settings(**chosen, server_mode=mode))
    assert tensors.steps == 8
    assert encoder.backprops == (0 if frozen_head else 8)
    whole, _ = local(vit, LORA, Cut(0, 0))
    if frozen_head:
        module.freeze_head(whole.part, PLACE.a)
    start = module.initial(vit, LORA, seed=0)
    assert train(whole, every_epoch, settings(**chosen)) == pytest.approx(loss, rel=1e-5)
    after = module.read(whole.part)
    for name, delta in tensors.delta().items():
        np.testing.assert_allclose(start[name] + delta, after[name], rtol=1e-4, atol=1e-6)
    for name, value in module.read(model.part).items():
        np.testing.assert_allclose(value, after[name], rtol=1e-4, atol=1e-6)


def test_a_device_with_everything_needs_no_server_mode(vit: Backbone) -> None:
    results = []
    for mode in ("frozen", "hosted", "zeroth-order"):
        model, _ = local(vit, LORA, Cut(2, 2))
        train(model, every_epoch, settings(server_mode=mode))
        results.append(module.read(model.part))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])

"""A site's round: it learns, it overlaps steps where it may, and neither changes the outcome."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np
import pytest
import torch

from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Array, Encoder, Mask, Want
from fedsplit.core.errors import FederationError, UnreachableError
from fedsplit.core.scores import CLASS_SCORES, Tally
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.local_encoder import LocalEncoder
from fedsplit.model.module import ModuleSpec
from fedsplit.model.split import SplitModel, device_part, server_part
from fedsplit.training.data import Batch
from fedsplit.training.round import evaluate, train
from tests.training.small import (
    BARE,
    BATCHES,
    LORA,
    PLACE,
    WAIT_S,
    Failing,
    Wrapped,
    assert_same_bits,
    every_epoch,
    local,
    make_batches,
    rewired,
    settings,
)

# Evaluation.


@pytest.mark.parametrize("in_flight", [1, 2, 8])
@pytest.mark.parametrize("cut", ["0,4", "1,3", "2,2", "4,4"])
def test_right_answers_are_counted(cut: str, in_flight: int, vit: Backbone) -> None:
    model, encoder = local(vit, LORA, Cut.parse(cut))
    # A classifier of constants: everything is "light".
    module.load(
        model.part,
        module.read(model.part) | {"classifier.bias": np.array([0, 1], dtype="f4")},
    )
    light = sum(int(b.labels.sum()) for b in BATCHES)
    assert evaluate(model, BATCHES, in_flight=in_flight) == Tally(
        sums={"correct": light}, samples=27
    )
    assert encoder.kept_steps == 0


def test_evaluation_counts_what_the_logits_say(vit: Backbone) -> None:
    model, _ = local(vit, LORA)
    train(model, every_epoch, settings())
    with torch.no_grad():
        right = sum(int((model(b.inputs, b.mask).argmax(1) == b.labels).sum()) for b in BATCHES)
    assert evaluate(model, BATCHES, in_flight=3) == Tally(sums={"correct": right}, samples=27)


def test_evaluation_of_nothing(vit: Backbone) -> None:
    model, _ = local(vit, LORA)
    assert evaluate(model, []) == CLASS_SCORES.nothing


def test_evaluation_changes_nothing_and_asks_for_no_graph(vit: Backbone) -> None:
    model, _ = local(vit, LORA)
    model, encoder = rewired(model, Wrapped)
    before = module.read(model.part)
    evaluate(model, BATCHES)
    assert_same_bits(before, module.read(model.part))
    assert [want for _, want in encoder.encoded] == ["output"] * len(BATCHES)


# Training.


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize(
    ("spec", "optimizer", "rate"),
    [(LORA, "adamw", 0.02), (LORA, "sgd", 0.5), (BARE, "adamw", 0.02)],
)
def test_training_lowers_the_loss(
    spec: ModuleSpec, optimizer: str, rate: float, frozen_head: bool, vit: Backbone
) -> None:
    model, encoder = local(vit, spec, frozen_head=frozen_head)
    chosen = settings(epochs=1, optimizer=optimizer, learning_rate=rate)
    losses = [train(model, every_epoch, chosen) for _ in range(8)]
    assert losses[0] > losses[-1]
    assert losses[-1] < 0.5
    score = evaluate(model, BATCHES)
    assert score.sums["correct"] >= 25
    assert encoder.kept_steps == 0


def test_the_loss_is_the_mean_over_samples(vit: Backbone) -> None:
    model, _ = local(vit, BARE)
    # Logits start at zero and the rate is too small to move them: every sample costs log 2.
    loss = train(model, every_epoch, settings(epochs=3, learning_rate=1e-12, optimizer="sgd"))
    assert loss == pytest.approx(np.log(2), rel=1e-6)


def test_no_batch_no_loss(vit: Backbone) -> None:
    model, _ = local(vit, BARE)
    assert train(model, lambda _: [], settings()) == 0.0


def test_every_epoch_asks_for_its_own_batches(vit: Backbone) -> None:
    model, _ = local(vit, BARE)
    asked: list[int] = []

    def batches(epoch: int) -> list[Batch]:
        asked.append(epoch)
        return BATCHES[:1]

    train(model, batches, settings(epochs=3))
    assert asked == [0, 1, 2]


def test_a_training_head_takes_its_steps_one_by_one(vit: Backbone) -> None:
    model, _ = local(vit, LORA)
    model, encoder = rewired(model, Wrapped)
    train(model, every_epoch, settings(in_flight=4))
    assert encoder.encoded == [(i, "gradient") for i in range(1, 9)]
    assert encoder.backprops == 8
    assert encoder.threads == {threading.get_ident()}


def test_a_frozen_head_sends_no_gradient(vit: Backbone) -> None:
    model, _ = local(vit, LORA, frozen_head=True)
    model, encoder = rewired(model, Wrapped)
    before = module.read(model.part)
    train(model, every_epoch, settings(in_flight=2))
    assert encoder.backprops == 0
    assert {want for _, want in encoder.encoded} == {"output"}
    assert sorted(step for step, _ in encoder.encoded) == list(range(1, 9))
    after = module.read(model.part)
    moved = {n for n in before if not np.array_equal(before[n], after[n])}
    assert moved == module.trained_names(vit, LORA, PLACE, head=False)


@pytest.mark.parametrize("spec", [LORA, BARE], ids=["lora", "classifier"])
def test_steps_in_flight_change_no_bit(spec: ModuleSpec, vit: Backbone) -> None:
    results = []
    for in_flight in (1, 4):
        model, _ = local(vit, spec, frozen_head=True)
        loss = train(model, every_epoch, settings(in_flight=in_flight))
        results.append((loss, module.read(model.part)))
    assert results[0][0] == results[1][0]
    assert_same_bits(results[0][1], results[1][1])


@pytest.mark.parametrize("cut", ["2,2", "0,4", "4,4", "0,0", "2,4"])
def test_placement_does_not_change_a_classifiers_training(cut: str, vit: Backbone) -> None:
    outcomes = []
    for place in (PLACE, Cut.parse(cut)):
        model, _ = local(vit, BARE, place)
        outcomes.append((train(model, every_epoch, settings()), module.read(model.part)))
    assert outcomes[0][0] == outcomes[1][0]
    assert_same_bits(outcomes[0][1], outcomes[1][1])


def test_a_local_device_needs_no_encoder(vit: Backbone) -> None:
    start = module.initial(vit, LORA, seed=0)
    results = []
    for with_encoder in (False, True):
        part = device_part(vit, Cut(2, 2), LORA)
        module.load(part, start)
        encoder = LocalEncoder(server_part(vit, LORA), Cut(2, 2)) if with_encoder else None
        model = SplitModel(part, Cut(2, 2), encoder)
        loss = train(model, every_epoch, settings())
        assert evaluate(model, BATCHES).samples == 27
        results.append((loss, module.read(part)))
    assert results[0][0] == results[1][0]
    assert_same_bits(results[0][1], results[1][1])


def test_a_loss_that_is_no_number_ends_the_round(vit: Backbone) -> None:
    model, encoder = local(vit, LORA)
    pixels = torch.full((2, 3, 16, 16), float("nan"))
    broken = Batch({"pixel_values": pixels}, torch.tensor([0, 1]), None, np.arange(2))
    with pytest.raises(
        FederationError, match=r"loss became nan in epoch 2; lower learning-rate .*0\.01"
    ):
        train(model, lambda epoch: [broken] if epoch else BATCHES, settings())
    assert encoder.kept_steps == 0


@pytest.mark.parametrize("frozen_head", [False, True])
def test_a_rate_that_is_too_high_is_named(frozen_head: bool, vit: Backbone) -> None:
    model, _ = local(vit, LORA, frozen_head=frozen_head)
    # What was learnt with such steps is wrong the next time, by more than floats can say.
    other_way = [Batch(b.inputs, 1 - b.labels, None, b.keys) for b in BATCHES]
    fast = settings(learning_rate=1e20, optimizer="sgd", epochs=4)
    with pytest.raises(FederationError, match=r"lower learning-rate \(now 1e\+20\)"):
        train(model, lambda epoch: other_way if epoch % 2 else BATCHES, fast)


# Steps in flight.


class Gathering(Wrapped):
    """Answers only when `together` calls are inside at once, so that nothing less can finish."""

    def __init__(self, encoder: Encoder, together: int) -> None:
        super().__init__(encoder)
        self._barrier = threading.Barrier(together, timeout=WAIT_S)

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, want: Want = "output"
    ) -> Array:
        self._barrier.wait()
        return super().encode(step, h_BTD, mask_BT, want=want)


@pytest.mark.parametrize("in_flight", [2, 4])
def test_several_steps_are_at_the_encoder_at_once(in_flight: int, vit: Backbone) -> None:
    batches = make_batches([4] * (2 * in_flight))
    model, _ = local(vit, LORA, frozen_head=True)
    model, _ = rewired(model, lambda e: Gathering(e, in_flight))
    assert evaluate(model, batches, in_flight=in_flight).samples == 8 * in_flight
    train(model, lambda _: batches, settings(epochs=1, in_flight=in_flight))


class Counting(Wrapped):
    """Notes the most calls inside at once; each stays until it is sure that no more come."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.inside = self.most = 0
        self._changed = threading.Condition()

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, want: Want = "output"
    ) -> Array:
        with self._changed:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.inside > 3, timeout=0.05)
        z = super().encode(step, h_BTD, mask_BT, want=want)
        with self._changed:
            self.inside -= 1
        return z


@pytest.mark.parametrize("in_flight", [1, 3])
def test_no_more_steps_than_allowed(in_flight: int, vit: Backbone) -> None:
    model, _ = local(vit, BARE, frozen_head=True)
    model, encoder = rewired(model, Counting)
    evaluate(model, make_batches([2] * 6), in_flight=in_flight)
    assert encoder.most == in_flight


def test_batches_are_made_as_they_are_needed(vit: Backbone) -> None:
    """At most `in_flight` batches lie in memory before the first one is used."""
    model, _ = local(vit, BARE)
    made, used = [], []

    def batches() -> Iterable[Batch]:
        for i, batch in enumerate(make_batches([2] * 6)):
            assert i - len(used) < 3
            made.append(i)
            yield batch

    tail = model.tail
    model.tail = lambda z, mask: (used.append(1), tail(z, mask))[1]  # type: ignore[method-assign]
    evaluate(model, batches(), in_flight=3)
    assert (len(made), len(used)) == (6, 6)


@pytest.mark.parametrize("at", [1, 3, 8])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_an_encoders_error_comes_through(at: int, frozen_head: bool, vit: Backbone) -> None:
    model, _ = local(vit, LORA, frozen_head=frozen_head)
    model, _ = rewired(model, lambda e: Failing(e, at))
    threads = threading.active_count()
    with pytest.raises(UnreachableError, match="went away"):
        train(model, every_epoch, settings(in_flight=4))
    with pytest.raises(UnreachableError, match="went away"):
        evaluate(model, BATCHES * 3, in_flight=2)
    assert threading.active_count() == threads


def test_a_fault_in_the_data_comes_through(vit: Backbone) -> None:
    model, _ = local(vit, BARE)

    def batches(_: int) -> Iterable[Batch]:
        yield BATCHES[0]
        raise FederationError("sample 9 cannot be read")

    with pytest.raises(FederationError, match="sample 9"):
        train(model, batches, settings(in_flight=3))


def test_a_round_that_fails_leaves_no_thread(vit: Backbone) -> None:
    model, _ = local(vit, BARE)
    pixels = torch.full((2, 3, 16, 16), float("nan"))
    broken = Batch({"pixel_values": pixels}, torch.tensor([0, 1]), None, np.arange(2))
    threads = threading.active_count()
    with pytest.raises(FederationError, match="learning-rate"):
        train(model, lambda _: [broken, *BATCHES], settings(in_flight=4))
    assert threading.active_count() == threads

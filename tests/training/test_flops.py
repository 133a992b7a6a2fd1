"""Operations of a round, against counting by hand."""

from __future__ import annotations

import pytest

from fedsplit.core.cut import Cut
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.training import flops
from fedsplit.training.flops import DeviceFlops
from tests.training.small import BARE, BATCHES, LORA, local, same_bits, text_batches

FLOPS = DeviceFlops()
# Tiny ViT: 16 patches and one more token, width 24, mlp 48, patches of 4 x 4 x 3.
T, D, M = 17, 24, 48
EMBED = 2 * 16 * D * 48
ATTENTION = 2 * 2 * T * T * D
BLOCK = 2 * T * (4 * D * D + 2 * D * M) + ATTENTION
CLASSIFIER = 2 * D * 2
LORA_FORWARD = 2 * (2 * T * (D * 2 + 2 * D))


@pytest.mark.parametrize("cut", ["0,4", "1,3", "2,2", "4,4"])
def test_a_classifier_is_counted_as_by_hand(cut: str, vit: Backbone) -> None:
    place = Cut.parse(cut)
    model, _ = local(vit, BARE, place)
    found = FLOPS.of_sample(model, BATCHES[0])
    assert found.head == EMBED + place.a * BLOCK
    assert found.tail == (4 - place.b) * BLOCK + CLASSIFIER
    assert found.head_step == found.head
    # The gradient of the classifier's weight alone; nothing goes down to the frozen blocks.
    assert found.tail_step == found.tail + CLASSIFIER


def test_lora_is_counted_as_by_hand(vit: Backbone) -> None:
    model, _ = local(vit, LORA, Cut(1, 3), frozen_head=True)
    found = FLOPS.of_sample(model, BATCHES[0])
    assert found.head == EMBED + BLOCK + LORA_FORWARD
    assert found.tail == BLOCK + LORA_FORWARD + CLASSIFIER
    assert 1.5 * found.tail < found.tail_step < 3 * found.tail


def test_a_training_head_costs_its_backward(vit: Backbone) -> None:
    model, _ = local(vit, LORA, Cut(1, 3))
    frozen, _ = local(vit, LORA, Cut(1, 3), frozen_head=True)
    trains, still = FLOPS.of_sample(model, BATCHES[0]), FLOPS.of_sample(frozen, BATCHES[0])
    assert still.head_step == still.head
    assert trains.head_step > 1.4 * trains.head
    # The tail's backward then goes on to the seam: through the query and value of its first block too.
    assert trains.tail_step > still.tail_step
    sent_up = FLOPS.of_sample(frozen, BATCHES[0], server_trains=True)
    assert sent_up.tail_step == trains.tail_step


def test_a_round_adds_up(vit: Backbone) -> None:
    model, _ = local(vit, LORA, Cut(1, 3))
    one = FLOPS.of_sample(model, BATCHES[0])

    def total(**how: object) -> int:
        given = {"train_samples": 10, "eval_samples": 4} | how
        return FLOPS.of_round(model, BATCHES[0], **given)  # type: ignore[arg-type]

    tests = 4 * (one.head + one.tail)
    assert total() == 10 * (one.head_step + one.tail_step) + tests
    assert total(train_samples=0) == tests
    # Forwards alone: here the head trains, so every forward is one of the whole.
    assert total(estimator="central", queries=3) == 60 * (one.head + one.tail) + tests
    assert total(estimator="forward", queries=3) == 40 * (one.head + one.tail) + tests
    frozen, _ = local(vit, LORA, Cut(1, 3), frozen_head=True)
    still = FLOPS.of_sample(frozen, BATCHES[0])
    found = FLOPS.of_round(
        frozen, BATCHES[0], train_samples=10, eval_samples=0, estimator="central", queries=3
    )
    assert found == 10 * (still.head + 6 * still.tail)
    probed = FLOPS.of_round(frozen, BATCHES[0], train_samples=10, eval_samples=0, server_probes=4)
    assert probed == 10 * (still.head + 4 * still.tail_step)
    cached = FLOPS.of_round(frozen, BATCHES[0], train_samples=10, eval_samples=4, cached_samples=14)
    assert cached == 10 * still.tail_step + 4 * still.tail


def test_measuring_leaves_no_trace_and_happens_once(
    vit: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, encoder = local(vit, LORA)
    before = module.read(model.part)
    fresh = DeviceFlops()
    first = fresh.of_sample(model, BATCHES[0])
    assert same_bits(before, module.read(model.part))
    assert all(p.grad is None for p in module.parameters(model.part).values())
    assert encoder.kept_steps == 0
    monkeypatch.setattr(flops, "_measure", None)
    assert fresh.of_sample(model, BATCHES[3]) == first
    again, _ = local(vit, LORA)
    assert fresh.of_sample(again, BATCHES[1]) == first


def test_longer_texts_cost_more(bert: Backbone) -> None:
    model, _ = local(bert, LORA)
    batches = sorted(text_batches((1, 1, 1, 1)), key=lambda b: b.inputs["input_ids"].shape[1])
    assert FLOPS.of_sample(model, batches[-1]).head > FLOPS.of_sample(model, batches[0]).head

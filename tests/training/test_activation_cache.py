"""The activation cache: what it saves, how equal its answers are, and how little memory it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedsplit.core.cut import Cut
from fedsplit.core.errors import ConfigError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec
from fedsplit.training.activation_cache import ActivationCache, version_of
from fedsplit.training.closed_form import collect
from fedsplit.training.data import Batch
from fedsplit.training.pipeline import Flow, ahead
from fedsplit.training.round import evaluate, train
from tests.training.small import (
    BARE,
    BATCHES,
    LORA,
    Wrapped,
    assert_same_bits,
    every_epoch,
    local,
    regrouped,
    rewired,
    settings,
    text_batches,
    texts,
)

SHUFFLED = regrouped(BATCHES, list(np.random.default_rng(3).permutation(27)), 6)


def counted(backbone: Backbone, cut: str = "1,3", spec: Any = LORA) -> tuple[Any, Wrapped]:
    model, _ = local(backbone, spec, Cut.parse(cut), frozen_head=True)
    return rewired(model, Wrapped)


@pytest.mark.parametrize("cut", ["1,3", "0,4", "0,2"])
def test_a_second_epoch_and_a_second_evaluation_cost_no_traffic(cut: str, vit: Backbone) -> None:
    model, encoder = counted(vit, cut)
    cache = ActivationCache()
    place = cache.at(model.cut, "v1")
    train(model, lambda e: SHUFFLED if e else BATCHES, settings(epochs=3), cache=place)
    assert encoder.samples == 27
    evaluate(model, BATCHES, cache=place)
    evaluate(model, SHUFFLED, cache=place)
    collect(model, SHUFFLED, Flow(cache=place))
    assert encoder.samples == 27
    assert (cache.hits, cache.misses) == (place.hits, place.misses) == (27 * 5, 27)


@pytest.mark.parametrize("in_flight", [1, 3])
@pytest.mark.parametrize("cut", ["1,3", "0,4", "2,2"])
def test_images_grouped_alike_are_bit_equal(cut: str, in_flight: int, vit: Backbone) -> None:
    """The same batches each epoch, whatever their order: not a bit differs from training without a cache."""
    results = []
    for cached in (False, True):
        model, _ = counted(vit, cut)
        place = ActivationCache().at(model.cut, "v") if cached else None
        chosen = settings(epochs=3, in_flight=in_flight)
        loss = train(model, lambda e: BATCHES[:: -1 if e else 1], chosen, cache=place)
        results.append((loss, module.read(model.part), evaluate(model, BATCHES, cache=place)))
    assert results[0][0] == results[1][0]
    assert results[0][2] == results[1][2]
    assert_same_bits(results[0][1], results[1][1])


def test_images_grouped_anew_are_equal_to_a_millionth(vit: Backbone) -> None:
    results = []
    for cached in (False, True):
        model, _ = counted(vit)
        place = ActivationCache().at(model.cut, "v") if cached else None
        chosen = settings(epochs=3, optimizer="sgd")
        train(model, lambda e: SHUFFLED if e else BATCHES, chosen, cache=place)
        results.append(module.read(model.part))
    for name, tensor in results[0].items():
        np.testing.assert_allclose(results[1][name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["prompt", "lora"])
@pytest.mark.parametrize("cut", ["1,3", "0,4"])
def test_padding_does_not_matter_to_texts(cut: str, kind: str, bert: Backbone) -> None:
    """Rows computed beside long texts serve beside short ones: equal within 1e-5, prompt or not."""
    spec = ModuleSpec(classes=("a", "b"), kind=kind, prompt_tokens=3)
    model, encoder = counted(bert, cut, spec)
    rng = np.random.default_rng(1)
    samples = [rng.integers(3, 50, length) for length in (11, 3, 5, 4, 9, 4)]

    def batch(*chosen: int) -> Batch:
        return texts([samples[i] for i in chosen], keys=np.array(chosen))

    place = ActivationCache().at(model.cut, "v")
    first = [batch(0, 1, 2), batch(3, 4)]
    # One is known wholly, one in part, one has no padding left, one is new.
    second = [batch(1, 3), batch(2, 5, 0), batch(4), batch(3, 5)]
    with torch.no_grad():
        for batches in (first, second):
            plain = [model.tail(z, b.mask) for b, z in ahead(model, batches, Flow())]
            before = encoder.samples
            kept = [model.tail(z, b.mask) for b, z in ahead(model, batches, Flow(cache=place))]
            for one, other in zip(kept, plain, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert encoder.samples - before == 1  # text 5, once


def test_only_what_is_missing_goes_out(vit: Backbone) -> None:
    model, encoder = counted(vit)
    place = ActivationCache().at(model.cut, "v")
    evaluate(model, BATCHES[:2], cache=place)
    assert encoder.samples == 16
    evaluate(model, regrouped(BATCHES, [0, 20, 5, 21, 9], 5), cache=place)
    assert encoder.samples == 18


def test_the_sub_batch_of_texts_is_no_longer_than_it_needs(bert: Backbone) -> None:
    model, _ = counted(bert)
    place = ActivationCache().at(model.cut, "v")
    long, short = np.full(12, 7), np.full(4, 8)
    evaluate(model, [texts([long], keys=np.array([0]))], cache=place)
    found = place.look_up(texts([long, short], keys=np.array([0, 1])))
    assert found.missing is not None
    assert found.missing.inputs["input_ids"].shape == (1, 4)
    assert found.missing.mask is None


def test_another_version_or_cut_is_another_place(vit: Backbone) -> None:
    model, encoder = counted(vit)
    cache = ActivationCache()
    for cut, version in ((model.cut, "1"), (model.cut, "2"), (Cut(0, 3), "1"), (model.cut, "1")):
        evaluate(model, BATCHES, cache=cache.at(cut, version))
    assert encoder.samples == 3 * 27


def rows(place: Any, keys: list[int], width: int = 4) -> None:
    batch = Batch({"x": torch.zeros(len(keys), 1)}, torch.zeros(len(keys)), None, np.array(keys))
    found = place.look_up(batch)
    if found.missing is not None:
        place.complete(found, torch.ones(len(found.missing.keys), width))


def known(place: Any, keys: list[int]) -> int:
    batch = Batch({"x": torch.zeros(len(keys), 1)}, torch.zeros(len(keys)), None, np.array(keys))
    return sum(row is not None for row in place.look_up(batch).known)


def test_memory_is_bounded() -> None:
    cache = ActivationCache(max_bytes=16 * 5)
    place = cache.at(Cut(0, 1), "v")
    rows(place, list(range(8)))
    assert known(place, list(range(8))) == 5
    # The oldest rows are as good as the newest, so they stay.
    rows(place, [8])
    assert known(place, [0, 1, 2, 3, 4]) == 5


def test_the_place_of_longest_ago_makes_room() -> None:
    cache = ActivationCache(max_bytes=16 * 6)
    old, mid, new = (cache.at(Cut(0, 1), str(i)) for i in range(3))
    rows(old, [1, 2, 3])
    rows(mid, [1, 2, 3])
    cache.at(Cut(0, 1), "0")
    rows(new, [1, 2])
    assert (known(old, [1, 2, 3]), known(mid, [1, 2, 3]), known(new, [1, 2])) == (3, 0, 2)
    rows(mid, [7])
    assert known(mid, [7]) == 1


def test_a_row_larger_than_all_is_not_kept() -> None:
    place = ActivationCache(max_bytes=10).at(Cut(0, 1), "v")
    rows(place, [1])
    assert known(place, [1]) == 0


def test_what_is_kept_is_not_the_callers_memory() -> None:
    place = ActivationCache().at(Cut(0, 1), "v")
    batch = Batch({"x": torch.zeros(2, 1)}, torch.zeros(2), None, np.array([1, 2]))
    z = torch.ones(2, 4)
    place.complete(place.look_up(batch), z)
    z.zero_()
    again = place.complete(place.look_up(batch), None)
    assert torch.equal(again, torch.ones(2, 4))
    again.zero_()
    assert torch.equal(place.complete(place.look_up(batch), None), torch.ones(2, 4))


@pytest.mark.parametrize(
    ("frozen", "chosen", "fault"),
    [
        (True, {"augmentation": "flip"}, "augmentation=flip makes every epoch's images new"),
        (False, {}, "activations change while the head or the server trains"),
        (True, {"server_mode": "hosted"}, "activations change while the head or the server trains"),
    ],
)
def test_activations_that_change_are_refused(
    frozen: bool, chosen: Any, fault: str, vit: Backbone
) -> None:
    model, _ = local(vit, LORA, frozen_head=frozen)
    with pytest.raises(ConfigError, match=fault):
        train(model, every_epoch, settings(**chosen), cache=ActivationCache().at(model.cut, "v"))


def test_a_version_is_its_tensors() -> None:
    tensors = {"a": np.arange(6, dtype="f4").reshape(2, 3), "b": np.zeros(2, "f4")}
    version = version_of(tensors)
    assert version == version_of(dict(reversed(tensors.items())))
    others: list[Callable[[], dict[str, np.ndarray]]] = [
        lambda: tensors | {"a": tensors["a"] + 1},
        lambda: tensors | {"a": tensors["a"].T},
        lambda: {"a": tensors["a"]},
        lambda: {"a": tensors["a"], "c": tensors["b"]},
    ]
    assert version not in {version_of(other()) for other in others}


def test_bare_evaluation_needs_no_cache(bert: Backbone) -> None:
    model, encoder = counted(bert, spec=BARE)
    batches = text_batches()
    assert evaluate(model, batches) == evaluate(model, batches)
    assert encoder.samples == 22

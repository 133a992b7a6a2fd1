"""Flips and crops: each sample its own, alike wherever it stands."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsplit.core.errors import ConfigError
from fedsplit.model.backbone import Backbone
from fedsplit.training.augment import augment
from fedsplit.training.data import Batch
from fedsplit.training.round import train
from tests.training.small import LORA, local, settings, text_batches


def images(count: int, side: tuple[int, int] = (16, 16)) -> Batch:
    pixels = torch.randn(count, 3, *side, generator=torch.Generator().manual_seed(0))
    return Batch({"pixel_values": pixels}, torch.zeros(count).long(), None, np.arange(count) * 7)


def pixels(batch: Batch) -> torch.Tensor:
    return batch.inputs["pixel_values"]


def test_none_is_the_batch_itself() -> None:
    batch = images(3)
    assert augment(batch, "none", "key") is batch


def test_a_flip_is_a_flip_of_about_half() -> None:
    batch = images(400)
    flipped = pixels(augment(batch, "flip", "0/a/1/0"))
    same = (flipped == pixels(batch)).all(dim=(1, 2, 3))
    mirrored = (flipped == pixels(batch).flip(3)).all(dim=(1, 2, 3))
    assert bool((same ^ mirrored).all())
    assert 150 < int(mirrored.sum()) < 250


def test_a_crop_is_a_window_of_the_reflected_image() -> None:
    batch = images(60, (16, 24))
    done = augment(batch, "crop+flip", "0/a/1/0")
    assert pixels(done).shape == (60, 3, 16, 24)
    seen = set()
    for before, after in zip(pixels(batch).numpy(), pixels(done).numpy(), strict=True):
        padded = np.pad(before, ((0, 0), (2, 2), (3, 3)), mode="reflect")
        found = [
            (y, x, flip)
            for y in range(5)
            for x in range(7)
            for flip in (False, True)
            if np.array_equal(padded[:, y : y + 16, x : x + 24][:, :, :: -1 if flip else 1], after)
        ]
        assert found
        seen.add(found[0])
    assert {y for y, _, _ in seen} == set(range(5))
    assert {x for _, x, _ in seen} == set(range(7))


@pytest.mark.parametrize("kind", ["flip", "crop+flip"])
def test_company_does_not_matter(kind: str) -> None:
    whole = images(12)
    together = pixels(augment(whole, kind, "k"))
    order = [5, 0, 11]
    few = Batch(
        {"pixel_values": pixels(whole)[order]}, whole.labels[order], None, whole.keys[order]
    )
    assert torch.equal(pixels(augment(few, kind, "k")), together[order])
    assert torch.equal(pixels(augment(whole, kind, "k")), together)


def test_another_epoch_is_another_draw() -> None:
    batch = images(30)
    assert not torch.equal(
        pixels(augment(batch, "flip", "0/a/1/0")), pixels(augment(batch, "flip", "0/a/1/1"))
    )


def test_the_input_is_left_alone_and_small_images_do() -> None:
    batch = images(4, (1, 2))
    before = pixels(batch).clone()
    assert pixels(augment(batch, "crop+flip", "k")).shape == (4, 3, 1, 2)
    assert torch.equal(pixels(batch), before)


def test_texts_are_refused(bert: Backbone) -> None:
    model, _ = local(bert, LORA, frozen_head=True)
    with pytest.raises(ConfigError, match=r"augmentation=flip is for images .* reads texts"):
        train(model, lambda _: text_batches(), settings(augmentation="flip"))

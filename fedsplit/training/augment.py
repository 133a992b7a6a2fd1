"""Random flips and crops of image batches.

What happens to a sample hangs on the run's seed, the site, the round, the epoch and the sample's key alone:
not on its batch, nor on how many were drawn before it. Shapes: B batch, H W pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedsplit.core.config.train import Augmentation
from fedsplit.core.errors import ConfigError
from fedsplit.training.data import Batch

_PART_OF_SIDE = 8
"""Padding of the random crop: 4 pixels of 32, the usual one of CIFAR."""


def check(kind: Augmentation, backbone_kind: str) -> None:
    """Raise ConfigError where there is nothing to flip or crop."""
    if kind != "none" and backbone_kind != "image":
        raise ConfigError(
            f"augmentation={kind} is for images and this backbone reads {backbone_kind}s; "
            f"use augmentation=none"
        )


def augment(batch: Batch, kind: Augmentation, key: str) -> Batch:
    """The batch with each image flipped at random and, with crop+flip, moved by up to an eighth of its side.

    `key` names everything but the sample: seed, site, round and epoch.
    """
    if kind == "none":
        return batch
    pixels_BCHW = batch.inputs["pixel_values"]
    drawn = [_draw(key, int(sample)) for sample in batch.keys]
    if kind == "crop+flip":
        pixels_BCHW = _crop(pixels_BCHW, [(top, left) for _, top, left in drawn])
    flip_B = torch.tensor([flip for flip, _, _ in drawn], dtype=torch.bool)
    pixels_BCHW = torch.where(flip_B[:, None, None, None], pixels_BCHW.flip(3), pixels_BCHW)
    return replace(batch, inputs=batch.inputs | {"pixel_values": pixels_BCHW})


def _draw(key: str, sample: int) -> tuple[bool, float, float]:
    """(flip, top, left) of a sample, the last two evenly from [0, 1)."""
    digest = hashlib.blake2b(f"{key}/{sample}".encode(), digest_size=9).digest()
    top, left = (int.from_bytes(digest[i : i + 4], "little") / 2**32 for i in (1, 5))
    return bool(digest[0] & 1), top, left


def _crop(pixels_BCHW: Tensor, places: list[tuple[float, float]]) -> Tensor:
    height, width = pixels_BCHW.shape[2:]
    # Reflection cannot reach further than the image itself.
    down, right = (min(max(1, side // _PART_OF_SIDE), side - 1) for side in (height, width))
    padded = nn.functional.pad(pixels_BCHW, (right, right, down, down), mode="reflect")
    rows = []
    for image, (top, left) in zip(padded, places, strict=True):
        y, x = int(top * (2 * down + 1)), int(left * (2 * right + 1))
        rows.append(image[:, y : y + height, x : x + width])
    return torch.stack(rows)

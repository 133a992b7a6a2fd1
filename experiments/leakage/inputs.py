"""Attacks on images: the patch embedding turned round, and linear decoders learned from public images.

Shapes: N images, T patches, D width, p the side of a patch. Pixels are 0 .. 1 here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from experiments.leakage.scene import Images, Scene
from experiments.leakage.wire import Recorder
from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Array
from fedsplit.model import module
from fedsplit.model.local_encoder import LocalEncoder
from fedsplit.model.module import ModuleSpec
from fedsplit.model.split import SplitModel, device_part, server_part

Pixels = NDArray[np.float64]
Decoder = Callable[[Array], Pixels]
_SPECIAL = 1
"""CLS comes first and shows no pixels."""
_RIDGE = 1e-4


class Uplink:
    """Images -> h [N, T+1, D] as it arrives at the encoder, through the split model with the start's module."""

    def __init__(self, scene: Scene, a: int, codec: str) -> None:
        spec = ModuleSpec(classes=scene.site.classes)
        start = module.initial(scene.backbone, spec, seed=0)
        cut = Cut(a, scene.backbone.blocks)
        device, server = device_part(scene.backbone, cut, spec), server_part(scene.backbone, spec)
        for part in (device, server):
            module.load(part, start)
        self.part = device
        self._scene = scene
        self._wire = Recorder(LocalEncoder(server, cut), codec)
        self._model = SplitModel(device, cut, self._wire)

    def __call__(self, images: Images) -> Array:
        """What crosses for these images."""
        self._wire.seen.clear()
        with torch.no_grad():
            for i in range(0, len(images), 64):
                inputs, _ = self._scene.transform.assemble(list(images[i : i + 64]))
                self._model(inputs, None)
        return np.concatenate(self._wire.seen["h"])


def pseudo_inverse(scene: Scene, *, grey: bool) -> Decoder:
    """The patch embedding turned round, for a = 0: public weights, no training.

    It is exact where a patch has no more unknown values than the embedding is wide; `grey` says that the three
    channels are equal, a third of the unknowns. Otherwise it is the shortest of all patches that fit.
    """
    up = Uplink(scene, 0, "fp32")
    side = scene.transform.settings.output[0]
    weight_DP = _patch_weight(up)
    patch = int(np.sqrt(weight_DP.shape[1] // 3))
    # Embedding is linear in the normalised pixels: what a picture of zeros gives is the constant part.
    zeros = torch.zeros(1, 3, side, side)
    with torch.no_grad():
        constant = (
            up.part.ends.embed({"pixel_values": zeros}).numpy()[:, _SPECIAL:].astype(np.float64)
        )
    spread = np.tile(np.eye(patch * patch), (3, 1)) if grey else np.eye(weight_DP.shape[1])
    inverse = np.linalg.pinv(weight_DP @ spread)

    def decode(h: Array) -> Pixels:
        values = (h[:, _SPECIAL:].astype(np.float64) - constant) @ inverse.T @ spread.T
        return _denormalised(scene, _from_patches(values, patch, channels_first=True))

    return decode


def linear_decoder(h: Array, images: Images, patch: int) -> Decoder:
    """Ridge regression from a token and its place to the pixels of its patch, learned from public images."""
    targets = _to_patches(images / 255.0, patch)
    tokens = h[:, _SPECIAL:].astype(np.float64)
    count = tokens.shape[1]

    def design(x: NDArray[np.float64]) -> NDArray[np.float64]:
        place = np.broadcast_to(np.eye(count), (len(x), count, count))
        return np.concatenate([(x - centre) / scale, place], axis=2).reshape(len(x) * count, -1)

    centre, scale = tokens.mean(axis=(0, 1)), tokens.std(axis=(0, 1)) + 1e-12
    a = design(tokens)
    b = targets.reshape(len(a), -1)
    gram = a.T @ a
    weights = np.linalg.solve(gram + _RIDGE * len(a) * np.eye(len(gram)), a.T @ b)

    def decode(other: Array) -> Pixels:
        x = other[:, _SPECIAL:].astype(np.float64)
        return _from_patches((design(x) @ weights).reshape(*x.shape[:2], -1), patch)

    return decode


def psnr(truth: Images, guess: Pixels) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB; pixels beyond 0 .. 1 are clipped."""
    error = ((truth / 255.0 - guess.clip(0, 1)) ** 2).mean(axis=(1, 2, 3))
    return float(np.mean(-10 * np.log10(error + 1e-12)))


def mean_colour(images: Images) -> Pixels:
    """Every image as its own mean colour: what knowing next to nothing gives."""
    means = (images / 255.0).mean(axis=(1, 2), keepdims=True)
    return np.broadcast_to(means, images.shape)


def patch_side(scene: Scene) -> int:
    """p, in pixels."""
    return int(scene.backbone.config.patch_size)


def _patch_weight(up: Uplink) -> NDArray[np.float64]:
    """[D, 3 p p], in the order channel, row, column."""
    names = dict(up.part.model.named_parameters())
    (name,) = (n for n in names if n.endswith("patch_embeddings.projection.weight"))
    weight = names[name].detach().numpy().astype(np.float64)
    flat: NDArray[np.float64] = weight.reshape(len(weight), -1)
    return flat


def _denormalised(scene: Scene, pixels: Pixels) -> Pixels:
    settings = scene.transform.settings
    scaled: Pixels = pixels * np.array(settings.std) + np.array(settings.mean)
    return scaled / (255 * settings.rescale_factor)


def _to_patches(pixels: Pixels, patch: int) -> Pixels:
    """[N, S, S, 3] -> [N, T, p p 3]."""
    n, side = len(pixels), pixels.shape[1] // patch
    tiled = pixels.reshape(n, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    patches: Pixels = tiled.reshape(n, side * side, -1)
    return patches


def _from_patches(values: Pixels, patch: int, *, channels_first: bool = False) -> Pixels:
    """The inverse of `_to_patches`; `channels_first` for patches ordered channel, row, column."""
    n, side = len(values), int(np.sqrt(values.shape[1]))
    if channels_first:
        tiled = values.reshape(n, side, side, 3, patch, patch).transpose(0, 1, 2, 4, 5, 3)
    else:
        tiled = values.reshape(n, side, side, patch, patch, 3)
    pixels: Pixels = tiled.transpose(0, 1, 3, 2, 4, 5).reshape(n, side * patch, side * patch, 3)
    return pixels

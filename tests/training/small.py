"""Small devices, batches and settings that the tests of a site's training share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from fedsplit.core.config import TrainSection
from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Array, Encoder, Mask, Want
from fedsplit.core.errors import UnreachableError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.local_encoder import LocalEncoder
from fedsplit.model.module import ModuleSpec, ModuleTensors
from fedsplit.model.split import SplitModel, device_part, server_part
from fedsplit.training.data import Batch
from fedsplit.training.round import TrainSettings

LORA = ModuleSpec(classes=("dark", "light"), rank=2, alpha=4)
BARE = ModuleSpec(classes=("dark", "light"), kind="classifier")
PLACE = Cut(1, 3)

WAIT_S = 20.0
"""What a call that waits for another one waits at the most."""


def make_batches(sizes: Iterable[int] = (8, 8, 8, 3)) -> list[Batch]:
    """Dark and light images with noise: separable by a tiny model."""
    rng = np.random.default_rng(0)
    made: list[Batch] = []
    for size in sizes:
        labels = np.arange(size) % 2
        pixels = (
            rng.standard_normal((size, 3, 16, 16)) * 0.3 + (2.0 * labels - 1)[:, None, None, None]
        )
        inputs = {"pixel_values": torch.from_numpy(pixels.astype("f4"))}
        keys = np.arange(size) + sum(len(b) for b in made)
        made.append(Batch(inputs, torch.from_numpy(labels), None, keys))
    return made


BATCHES = make_batches()


def every_epoch(_: int) -> list[Batch]:
    return BATCHES


def text_batches(sizes: Iterable[int] = (4, 4, 3), *, seed: int = 0) -> list[Batch]:
    """Texts of different lengths, each batch padded to its longest."""
    rng = np.random.default_rng(seed)
    made: list[Batch] = []
    for size in sizes:
        lengths = rng.integers(3, 12, size)
        first = sum(len(b) for b in made)
        samples = [rng.integers(3, 50, length) for length in lengths]
        made.append(texts(samples, keys=np.arange(size) + first))
    return made


def texts(samples: list[np.ndarray], *, keys: np.ndarray) -> Batch:
    longest = max(len(s) for s in samples)
    ids = np.stack([np.pad(s, (0, longest - len(s)), constant_values=1) for s in samples])
    mask = np.arange(longest) < np.array([len(s) for s in samples])[:, None]
    inputs = {
        "input_ids": torch.from_numpy(ids.astype("i8")),
        "attention_mask": torch.from_numpy(mask.astype("i8")),
    }
    shown = None if mask.all() else torch.from_numpy(mask)
    return Batch(inputs, torch.from_numpy(keys % 2), shown, keys)


def regrouped(batches: list[Batch], order: list[int], size: int) -> list[Batch]:
    """The same images in another order and grouping."""
    pixels = torch.cat([b.inputs["pixel_values"] for b in batches])
    labels = torch.cat([b.labels for b in batches])
    keys = np.concatenate([b.keys for b in batches])
    chosen = [order[i : i + size] for i in range(0, len(order), size)]
    return [Batch({"pixel_values": pixels[c]}, labels[c], None, keys[c]) for c in chosen]


def local(
    backbone: Backbone, spec: ModuleSpec, cut: Cut = PLACE, *, frozen_head: bool = False
) -> tuple[SplitModel, LocalEncoder]:
    """A device before the real encoder, both in this process."""
    device, server = device_part(backbone, cut, spec), server_part(backbone, spec)
    start = module.initial(backbone, spec, seed=0)
    module.load(device, start)
    module.load(server, start)
    if frozen_head:
        module.freeze_head(device, cut.a)
    encoder = LocalEncoder(server, cut)
    return SplitModel(device, cut, encoder), encoder


def settings(**other: Any) -> TrainSettings:
    values: dict[str, Any] = {"learning_rate": 0.01, "lora_learning_rate": 0.0} | other
    own = {name: values.pop(name) for name in {*values} - TrainSection.model_fields.keys()}
    return TrainSettings(train=TrainSection(**values), **({"epochs": 2} | own))


def same_bits(first: ModuleTensors, second: ModuleTensors) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[n], second[n]) for n in first)


def assert_same_bits(first: ModuleTensors, second: ModuleTensors) -> None:
    assert first.keys() == second.keys()
    assert not [n for n in first if not np.array_equal(first[n], second[n])]


class Wrapped:
    """An encoder whose calls a test can look at."""

    def __init__(self, encoder: Encoder) -> None:
        self.inner = encoder
        self.encoded: list[tuple[int, Want]] = []
        self.samples = 0
        self.threads: set[int] = set()
        self.backprops = 0

    @property
    def trains(self) -> bool:
        return self.inner.trains

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, want: Want = "output"
    ) -> Array:
        self.encoded.append((step, want))
        self.samples += len(h_BTD)
        self.threads.add(threading.get_ident())
        return self.inner.encode(step, h_BTD, mask_BT, want=want)

    def settle(self, step: int, answer: Array, *, quiet: bool = False) -> Array | None:
        dh = self.inner.settle(step, answer, quiet=quiet)
        self.backprops += dh is not None
        return dh

    def close(self) -> None:
        self.inner.close()


class Failing(Wrapped):
    """The peer dies at one step: that call fails, and the others in flight with it."""

    def __init__(self, encoder: Encoder, at: int) -> None:
        super().__init__(encoder)
        self._at = at
        self._dead = threading.Event()

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, want: Want = "output"
    ) -> Array:
        if step >= self._at:
            if step == self._at:
                self._dead.set()
            assert self._dead.wait(WAIT_S)
            raise UnreachableError(f"the encoder went away at step {step}")
        return super().encode(step, h_BTD, mask_BT, want=want)


def rewired(model: SplitModel, wrap: Callable[[Encoder], Any]) -> tuple[SplitModel, Any]:
    """The same device before another encoder."""
    assert model._encoder is not None
    encoder = wrap(model._encoder)
    return SplitModel(model.part, model.cut, encoder), encoder

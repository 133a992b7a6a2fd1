"""Samples -> the tensors a backbone wants, as its own files say. transformers' processors are not used for
images: they need torchvision, which a small device should not have to carry.

A transform works in two steps, so that the costly one can be cached (loader.py): `prepare` reads, resizes or
tokenises to small arrays, `assemble` makes a batch of them. Shapes: B batch, T tokens, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow

from fedsplit.model.preprocess import Preprocess, read_positions, read_preprocess
from fedsplit.model.tokenizer import read_tokenizer
from fedsplit.training.data.examples import Examples, Image, Index

Prepared = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step needs. `mask` is True on real tokens; None where every token is real, and for images."""

    inputs: dict[str, torch.Tensor]
    """pixel_values [B, 3, H, W]; or input_ids, attention_mask and maybe token_type_ids, each [B, T]."""
    labels: torch.Tensor
    """[B] int64 of classes, float64 of numbers in their own unit."""
    mask: torch.Tensor | None
    """[B, T] bool."""
    keys: Index
    """[B], `Examples.keys` of the samples: what a cache names them by."""

    def __len__(self) -> int:
        return len(self.keys)


class Transform(Protocol):
    """From samples to batches. `prepare` is the same for a sample every time."""

    def prepare(self, examples: Examples, indices: Sequence[int]) -> list[Prepared]:
        """The costly part, sample by sample. Raises DataError for one that cannot be read."""
        ...

    def assemble(self, prepared: Sequence[Prepared]) -> tuple[dict[str, torch.Tensor], Any]:
        """Inputs and mask of a batch."""
        ...

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        """Both steps and the labels."""
        ...


def collate(transform: Transform, examples: Examples, indices: Sequence[int]) -> Batch:
    """Prepare and assemble the samples at `indices` with their labels."""
    chosen = np.asarray(indices, dtype=np.int64)
    inputs, mask = transform.assemble(transform.prepare(examples, [int(i) for i in chosen]))
    told = examples.labels if examples.numbers is None else examples.numbers
    labels = torch.from_numpy(told[chosen])
    return Batch(inputs, labels, mask, examples.keys[chosen])


@dataclass(frozen=True)
class ImageTransform:
    """Resize, crop, scale and normalise, after the backbone's `preprocessor_config.json`."""

    settings: Preprocess

    @classmethod
    def from_backbone(cls, directory: Path | str, image_size: int = 0) -> ImageTransform:
        """Read the model directory; `image_size` > 0 sets another side. Raises BackboneError."""
        return cls(read_preprocess(Path(directory), image_size))

    def __call__(self, image: Image) -> torch.Tensor:
        """uint8 [H, W, 3] -> float32 [3, H, W]."""
        inputs, _ = self.assemble([self.resize(image)])
        return inputs["pixel_values"][0]

    def resize(self, image: Image) -> Image:
        """uint8 [H, W, 3] -> uint8 of the backbone's size, centre cropped where it wants that."""
        height, width = self.settings.resized(image.shape[0], image.shape[1])
        if (height, width) != image.shape[:2]:
            resample = Pillow.Resampling(self.settings.resample)
            image = np.asarray(Pillow.fromarray(image).resize((width, height), resample))
        crop_height, crop_width = self.settings.output
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
        return np.ascontiguousarray(image[top : top + crop_height, left : left + crop_width])

    def prepare(self, examples: Examples, indices: Sequence[int]) -> list[Prepared]:
        """Resized images, uint8: a quarter of what the float tensors would take in a cache."""
        return [self.resize(examples.image(i)) for i in indices]

    def assemble(self, prepared: Sequence[Prepared]) -> tuple[dict[str, torch.Tensor], None]:
        """Scale and normalise to float32 [B, 3, H, W]."""
        pixels_BHWC = torch.from_numpy(np.stack(prepared))
        pixels_BCHW = pixels_BHWC.permute(0, 3, 1, 2).to(torch.float32).contiguous()
        mean = torch.tensor(self.settings.mean).view(3, 1, 1)
        std = torch.tensor(self.settings.std).view(3, 1, 1)
        pixels_BCHW.mul_(self.settings.rescale_factor).sub_(mean).div_(std)
        return {"pixel_values": pixels_BCHW}, None

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        """A batch of the images at `indices`."""
        return collate(self, examples, indices)


@dataclass(frozen=True, eq=False)
class TextTransform:
    """Tokenise, cut at `max_length` tokens, pad each batch to its longest."""

    tokenizer: Any
    max_length: int
    pad_id: int

    @classmethod
    def from_backbone(cls, directory: Path | str, max_length: int = 128) -> TextTransform:
        """Load the directory's tokenizer; `max_length` is lowered to what the model can place."""
        where = Path(directory)
        tokenizer = read_tokenizer(where)
        longest = int(min(max_length, tokenizer.model_max_length, read_positions(where)))
        return cls(tokenizer, longest, int(tokenizer.pad_token_id))

    def __call__(self, text: str) -> dict[str, torch.Tensor]:
        """One text as a batch of one."""
        return self.assemble(self.tokens([text]))[0]

    def prepare(self, examples: Examples, indices: Sequence[int]) -> list[Prepared]:
        """Token ids, and type ids where the tokenizer gives them: int32 [1 or 2, T] a text."""
        return self.tokens([examples.text(i) for i in indices])

    def tokens(self, texts: list[str]) -> list[Prepared]:
        if not texts:
            return []
        encoded = self.tokenizer(
            texts, truncation=True, max_length=self.max_length, return_attention_mask=False
        )
        columns = [encoded["input_ids"]]
        if "token_type_ids" in encoded:
            columns.append(encoded["token_type_ids"])
        return [np.array(rows, dtype=np.int32) for rows in zip(*columns, strict=True)]

    def assemble(
        self, prepared: Sequence[Prepared]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Pad on the right; the mask is None where all texts are as long."""
        lengths = [rows.shape[1] for rows in prepared]
        tokens_BRT = np.zeros((len(prepared), prepared[0].shape[0], max(lengths)), dtype=np.int64)
        tokens_BRT[:, 0] = self.pad_id
        mask_BT = np.zeros((len(prepared), max(lengths)), dtype=np.bool_)
        for i, rows in enumerate(prepared):
            tokens_BRT[i, :, : lengths[i]] = rows
            mask_BT[i, : lengths[i]] = True
        inputs = {
            "input_ids": torch.from_numpy(tokens_BRT[:, 0].copy()),
            "attention_mask": torch.from_numpy(mask_BT.astype(np.int64)),
        }
        if tokens_BRT.shape[1] > 1:
            inputs["token_type_ids"] = torch.from_numpy(tokens_BRT[:, 1].copy())
        return inputs, None if mask_BT.all() else torch.from_numpy(mask_BT)

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        """A batch of the texts at `indices`."""
        return collate(self, examples, indices)

"""One look at a backbone before a run: does a probe input go through it, and can all its weights be used?

Holds one tensor at a time, computes nothing: the probe runs on the meta device.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fedsplit.core.errors import BackboneError
from fedsplit.model.backbone import Backbone, frozen_names, frozen_paths
from fedsplit.model.checkpoint import check_tensors
from fedsplit.model.part import Part
from fedsplit.model.preprocess import read_positions, read_preprocess
from fedsplit.model.tokenizer import read_tokenizer

_TEXT = "A text of a few words."


def check_backbone(backbone: Backbone, *, image_size: int = 0) -> None:
    """Raise BackboneError, with the reason, for a backbone that a run would fail on. `image_size` is the run's.

    Reads all weights once, and again only when the files have changed.
    """
    _check(backbone, image_size)


@lru_cache(maxsize=32)
def _check(backbone: Backbone, image_size: int) -> None:
    # A part that holds nothing: all of it is on the meta device.
    part = Part(backbone, classes=2, blocks=(), embeddings=False, pool=False)
    inputs = (
        _probe_image(backbone, image_size)
        if backbone.family.kind == "image"
        else _probe_text(backbone)
    )
    try:
        h_BTD = part.ends.embed(inputs)
        if h_BTD.shape[-1] != backbone.width:
            raise ValueError(
                f"embeddings of width {h_BTD.shape[-1]}, hidden_size is {backbone.width}"
            )
        # One block of each type: the first.
        types = part.trunk.layer_types
        for block in sorted({types.index(name) for name in types}):
            h_BTD = part.trunk.run(h_BTD, None, block, block + 1)
        part.ends.classify(part.ends.pool(h_BTD, None))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as err:
        raise BackboneError(
            f"backbone {backbone.path}: a probe {backbone.family.kind} of {_shapes(inputs)} does not go through "
            f"it ({type(err).__name__}: {str(err)[:200]}); do its config.json and the files that prepare inputs "
            f"belong together?"
        ) from err
    names = frozen_names(part.model, frozen_paths(backbone.family, range(backbone.blocks)))
    check_tensors(backbone.path, part.model, names)


def _probe_image(backbone: Backbone, image_size: int) -> dict[str, Any]:
    height, width = read_preprocess(backbone.path, image_size).output
    return {"pixel_values": torch.zeros(1, 3, height, width)}


def _probe_text(backbone: Backbone) -> dict[str, Any]:
    path: Path = backbone.path
    tokenizer = read_tokenizer(path)
    # transformers gives BERT a [MASK] even where the vocabulary has none; classification never uses it.
    used = set(tokenizer.get_vocab().values()) - {tokenizer.mask_token_id}
    known, rows = max(used) + 1, int(backbone.config.vocab_size)
    if known > rows:
        raise BackboneError(
            f"backbone {path}: its tokenizer has {known} tokens, its embeddings have {rows} rows (vocab_size); the "
            f"tokenizer belongs to another model, or tokens were added: copy the tokenizer of this checkpoint"
        )
    length = min(int(tokenizer.model_max_length), read_positions(path))
    encoded = tokenizer([_TEXT], truncation=True, max_length=length, return_tensors="pt")
    return dict(encoded)


def _shapes(inputs: dict[str, Any]) -> str:
    return ", ".join(f"{k} {tuple(v.shape)}" for k, v in inputs.items())

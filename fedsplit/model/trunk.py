"""The blocks of a part: where they compute, in which precision, and what each is given beside the hidden states.

The only owner of device, dtype and batches of blocks, at a device and at the server. What comes before the first
block and after the last one is ends.py's. Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor

from fedsplit.core.encoder import Array, Mask
from fedsplit.core.errors import ConfigError
from fedsplit.model.families import FULL, SLIDING, Family
from fedsplit.model.layers import adapted, prompted
from fedsplit.model.seam import as_tensor

# (causal, type of layer) -> the function of transformers.masking_utils that makes the mask of such blocks.
_MASKS = {
    (False, FULL): "create_bidirectional_mask",
    (False, SLIDING): "create_bidirectional_sliding_window_mask",
    (True, FULL): "create_causal_mask",
    (True, SLIDING): "create_sliding_window_causal_mask",
}


class Trunk:
    """All L blocks of a skeleton; those that its part holds can run."""

    def __init__(self, model: Any, family: Family) -> None:
        self._base = getattr(model, family.base)
        self._family = family
        if family.rotary:
            # Its tables are computed from config.json and not stored; those of a skeleton are without values.
            rotary = type(getattr(self._base, family.rotary))
            setattr(self._base, family.rotary, rotary(self._base.config))

    @property
    def blocks(self) -> Any:
        """The list of all L blocks, also those that the part does not hold."""
        return reduce(getattr, self._family.blocks.split("."), self._base)

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The type of each of the L blocks."""
        if self._family.layer_types:
            return tuple(self._base.config.layer_types)
        return (FULL,) * len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where the blocks of the part compute; meta where it holds none."""
        held = (p.device for p in self.blocks.parameters() if not p.is_meta)
        return next(held, torch.device("meta"))

    def inward(self, array: Array | Mask) -> Tensor:
        """What came over the seam, as a tensor where the blocks compute. On a CPU it lies in the array's memory."""
        return as_tensor(array).to(self.device)

    @staticmethod
    def outward(tensor: Tensor) -> Array:
        """What goes back over the seam."""
        return tensor.detach().contiguous().cpu().numpy()

    def run(self, h_BTD: Tensor, mask_BT: Tensor | None, start: int, stop: int) -> Tensor:
        """Run blocks[start:stop]: [B, T, D] -> [B, T, D], on the device of their weights.

        `mask_BT` is True on real tokens and a prompt's, None means all are.
        """
        if start == stop:
            return h_BTD
        blocks, types = self.blocks[start:stop], self.layer_types[start:stop]
        h_BTD = h_BTD.to(next(blocks.parameters()).device)
        taken = {name: self._taken(name, h_BTD, mask_BT) for name in dict.fromkeys(types)}
        for block, layer_type in zip(blocks, types, strict=True):
            h_BTD = adapted(block, block(prompted(block, h_BTD), **taken[layer_type]))
        return h_BTD

    def _taken(self, layer_type: str, h_BTD: Tensor, mask_BT: Tensor | None) -> dict[str, Any]:
        """What a block of this type takes beside the hidden states."""
        from transformers import masking_utils

        family = self._family
        make_mask = getattr(masking_utils, _MASKS[family.causal, layer_type])
        # By place: the name of the cache, which causal masks ask for, changes between versions of transformers.
        no_cache = (None,) if family.causal else ()
        mask = make_mask(self._base.config, h_BTD, mask_BT, *no_cache)
        taken = {"attention_mask": mask, **dict(family.block_kwargs)}
        if family.rotary:
            rotary = getattr(self._base, family.rotary)
            positions_1T = torch.arange(h_BTD.shape[1], device=h_BTD.device)[None]
            # Some families have tables for each type, others one for all.
            by_type = "layer_type" in signature(rotary.forward).parameters
            types = (layer_type,) if by_type else ()
            taken["position_embeddings"] = rotary(h_BTD, positions_1T, *types)
        return taken


def autocast(
    device: torch.device, precision: Literal["fp32", "bf16"]
) -> AbstractContextManager[Any]:
    """The context in which a device computes. Raises ConfigError where its hardware has no bf16."""
    if precision == "fp32":
        return nullcontext()
    kind = device.type
    if kind != "cpu" and not (kind == "cuda" and torch.cuda.is_bf16_supported()):
        raise ConfigError(
            f"precision=bf16 works on a CPU or a GPU that has it, this device computes on {kind!r}; "
            f"use precision=fp32"
        )
    return torch.autocast(kind, dtype=torch.bfloat16)

"""The blocks of a part: where they compute, in which precision, and what each is given beside the hidden states.

The only owner of device, dtype and batches of blocks, at a device and at the server. What comes before the first
block and after the last one is ends.py's. Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor

from fedsplit.core.errors import ConfigError
from fedsplit.model.families import Family
from fedsplit.model.layers import adapted, prompted


class Trunk:
    """All L blocks of a skeleton; those that its part holds can run."""

    def __init__(self, model: Any, family: Family) -> None:
        self._base = getattr(model, family.base)
        self._family = family

    @property
    def blocks(self) -> Any:
        """The list of all L blocks, also those that the part does not hold."""
        return reduce(getattr, self._family.blocks.split("."), self._base)

    def run(self, h_BTD: Tensor, mask_BT: Tensor | None, start: int, stop: int) -> Tensor:
        """Run blocks[start:stop] where their weights are: [B, T, D] -> [B, T, D].

        `mask_BT` is True on real tokens and a prompt's, None means all are.
        """
        if start == stop:
            return h_BTD
        from transformers.masking_utils import create_bidirectional_mask

        blocks = self.blocks[start:stop]
        h_BTD = h_BTD.to(next(blocks.parameters()).device)
        mask = create_bidirectional_mask(
            config=self._base.config, inputs_embeds=h_BTD, attention_mask=mask_BT
        )
        for block in blocks:
            h_BTD = adapted(block, block(prompted(block, h_BTD), mask))
        return h_BTD


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

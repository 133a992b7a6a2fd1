"""The small layers that a module puts into a part beside LoRA: prompt tokens, bottleneck adapters, merged deltas.

They hang in the whole model's tree, so their tensors have names like everyone else's. PEFT has none
of them in a form that fits a part: its prompt tuning puts tokens before a text model's own
embeddings (positions and norm would be applied to them, and image models have no `inputs_embeds`),
it has no bottleneck adapter, and its merge changes the base weight in place, which other parts
share. Shapes: B batch, T tokens, D width, P prompt tokens, m width of the bottleneck.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PROMPT, DOWN, UP, MERGED = "prompt", "adapter_down", "adapter_up", "lora_merged"


class Prompt(nn.Module):
    """Learnable tokens after the first one: VPT-shallow, or VPT-deep with some for each block (Jia et al. 2022, arXiv 2203.12119)."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(tokens, width))

    def forward(self, h_BTD: Tensor) -> Tensor:
        """Embeddings [B, T, D] -> [B, T + P, D]."""
        prompt_BPD = self.weight.expand(h_BTD.shape[0], -1, -1)
        return torch.cat([h_BTD[:, :1], prompt_BPD, h_BTD[:, 1:]], dim=1)


def add_prompt(block: nn.Module, tokens: int, width: int) -> None:
    """Give a block prompt tokens of its own, which take the places of those that come to it (VPT-deep)."""
    block.add_module(PROMPT, Prompt(tokens, width))


def prompted(block: Any, h_BTD: Tensor) -> Tensor:
    """A block's input with the block's own prompt tokens, if it has some."""
    if not hasattr(block, PROMPT):
        return h_BTD
    own: Tensor = block.prompt(without_prompt(h_BTD, len(block.prompt.weight)))
    return own


def widen_mask(mask_BT: Tensor, tokens: int) -> Tensor:
    """The mask of embeddings into which a prompt was put: prompt tokens are always real."""
    ones_BP = mask_BT.new_ones((mask_BT.shape[0], tokens))
    return torch.cat([mask_BT[:, :1], ones_BP, mask_BT[:, 1:]], dim=1)


def without_prompt(h_BTD: Tensor, tokens: int) -> Tensor:
    """Last hidden states without the prompt's: pooling sees the tokens that it was pre-trained on."""
    return torch.cat([h_BTD[:, :1], h_BTD[:, 1 + tokens :]], dim=1)


def add_adapter(block: nn.Module, bottleneck: int, width: int) -> None:
    """Give a block an adapter after its output (Houlsby et al. 2019, Pfeiffer et al. 2021)."""
    block.add_module(DOWN, nn.Linear(width, bottleneck))
    block.add_module(UP, nn.Linear(bottleneck, width))


def adapted(block: Any, h_BTD: Tensor) -> Tensor:
    """A block's output through its adapter, if it has one: h + up(gelu(down(h)))."""
    if not hasattr(block, DOWN):
        return h_BTD
    change_BTD: Tensor = block.adapter_up(nn.functional.gelu(block.adapter_down(h_BTD)))
    return h_BTD + change_BTD


class Merged(nn.Module):
    """A dense delta [out, in] over a frozen linear layer (FLoRA's merged products); it never trains."""

    frozen: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(linear.weight), requires_grad=False)
        # Not the layer's weight itself, which `apply_delta` replaces; other parts may share it.
        self.register_buffer("frozen", linear.weight.detach(), persistent=False)
        # In a tuple, so that torch does not register the layer twice.
        self._layer = (linear,)

    def apply_delta(self) -> None:
        """Let the layer run on frozen weight plus delta. From the frozen one each time, so it never adds up."""
        (linear,) = self._layer
        linear.weight = nn.Parameter(self.frozen + self.weight.detach(), requires_grad=False)

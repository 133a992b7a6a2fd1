"""The device's side of the split model: head, seam, tail. Plain PyTorch to whoever trains it."""

from __future__ import annotations

import itertools

from torch import Tensor

from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Encoder
from fedsplit.core.errors import ConfigError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone, Part
from fedsplit.model.module import ModuleSpec
from fedsplit.model.seam import cross


def device_part(backbone: Backbone, cut: Cut, spec: ModuleSpec) -> Part:
    """Head and tail of the cut with LoRA on their blocks; the server's blocks stay on meta."""
    cut.check(backbone.blocks)
    part = Part(
        backbone,
        classes=len(spec.classes),
        blocks=cut.device_blocks(backbone.blocks),
        embeddings=True,
        pool=not cut.pooled(backbone.blocks),
    )
    module.attach(part, spec)
    return part


def server_part(backbone: Backbone, spec: ModuleSpec, *, share: Part | None = None) -> Part:
    """All blocks and the pooling, for any cut, with LoRA; `share` lends its frozen tensors."""
    part = Part(
        backbone,
        classes=len(spec.classes),
        blocks=range(backbone.blocks),
        embeddings=False,
        pool=True,
        share=share,
    )
    module.attach(part, spec)
    # Nothing trains here; a LoRA that wants gradients would only make each kept graph larger.
    part.model.requires_grad_(False)
    return part


class SplitModel:
    """embeddings -> blocks[0:a] -> encoder -> blocks[b:L] -> norm, pool -> classifier.

    With `a == b` no encoder is needed: the whole model runs here.
    """

    def __init__(self, part: Part, cut: Cut, encoder: Encoder | None) -> None:
        if encoder is None and not cut.local(part.backbone.blocks):
            raise ConfigError(f"cut {cut} runs blocks on the server, so an encoder is wanted")
        self.part = part
        self.cut = cut
        self._encoder = encoder
        family = part.family
        self._blocks = f"{family.base}.{family.blocks}"
        self._steps = itertools.count(1)
        self._pooled = cut.pooled(part.backbone.blocks)

    def head_trains(self) -> bool:
        """Does anything below the seam train, so that gradients must come back through it?"""
        below = tuple(f"{self._blocks}.{i}." for i in range(self.cut.a))
        return any(
            parameter.requires_grad and name.startswith(below)
            for name, parameter in module.parameters(self.part).items()
            if below
        )

    def head(self, inputs: dict[str, Tensor], mask_BT: Tensor | None) -> Tensor:
        """Model inputs -> what crosses the wire, [B, T, D]."""
        return self.part.run(self.part.embed(inputs), mask_BT, 0, self.cut.a)

    def encode(self, h_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Through the encoder: [B, T, D] -> [B, T, D] or pooled [B, P]."""
        if self._encoder is None:
            return h_BTD
        return cross(h_BTD, mask_BT, self._encoder, next(self._steps))

    def tail(self, z: Tensor, mask_BT: Tensor | None) -> Tensor:
        """What came back -> logits [B, C]."""
        if not self._pooled:
            z = self.part.pool(self.part.run(z, mask_BT, self.cut.b, self.part.backbone.blocks))
        return self.part.classify(z)

    def __call__(self, inputs: dict[str, Tensor], mask_BT: Tensor | None) -> Tensor:
        """Model inputs -> logits [B, C]."""
        return self.tail(self.encode(self.head(inputs, mask_BT), mask_BT), mask_BT)

"""The device's side of the split model: head, seam, tail. Plain PyTorch to whoever trains it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial

from torch import Tensor

from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Encoder
from fedsplit.core.errors import ConfigError
from fedsplit.model import module, seam
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec, ModuleTensors
from fedsplit.model.part import Part, Weights


def device_part(
    backbone: Backbone, cut: Cut, spec: ModuleSpec, *, weights: Weights | None = None
) -> Part:
    """Head and tail of the cut with the module on them; the server's blocks stay on meta."""
    cut.check(backbone.blocks)
    part = Part(
        backbone,
        classes=len(spec.classes),
        blocks=cut.device_blocks(backbone.blocks),
        embeddings=True,
        pool=not cut.pooled(backbone.blocks),
        weights=weights,
    )
    module.attach(part, spec)
    return part


def server_part(
    backbone: Backbone,
    spec: ModuleSpec,
    *,
    share: Part | None = None,
    weights: Weights | None = None,
) -> Part:
    """All blocks and the pooling, for any cut, with the module; `share`, a part without one, lends its tensors."""
    part = Part(
        backbone,
        classes=len(spec.classes),
        blocks=range(backbone.blocks),
        embeddings=False,
        pool=True,
        share=share,
        weights=weights,
    )
    module.attach(part, spec)
    # Nothing trains unless asked to; a module that wants gradients would only make each kept graph larger.
    part.model.requires_grad_(False)
    return part


class SplitModel:
    """embeddings -> blocks[0:a] -> encoder -> blocks[b:L] -> norm, pool -> classifier.

    With `a == b` no encoder is needed: the whole model runs here. A `shortcut` has none either, and no blocks in its place.
    """

    def __init__(self, part: Part, cut: Cut, encoder: Encoder | None) -> None:
        if encoder is None and not cut.local(part.backbone.blocks):
            raise ConfigError(f"cut {cut} runs blocks on the server, so an encoder is wanted")
        self.part = part
        self.cut = cut
        self._encoder = encoder
        self._steps = itertools.count(1)
        self._server_pools = cut.pooled(part.backbone.blocks)

    def shortcut(self) -> SplitModel:
        """Head joined to tail over the same tensors, blocks[a:b] left out. Raises ConfigError where the server pools."""
        if self._server_pools:
            raise ConfigError(
                f"cut {self.cut} leaves norm and pooling to the server, so head and tail make no model of their own; "
                f"use local-loss-epochs=0, or a cut that ends before the last block"
            )
        joined = copy.copy(self)
        joined._encoder = None
        return joined

    def head_trains(self) -> bool:
        """Does anything below the seam train, so that gradients must come back through it?"""
        return any(
            parameter.requires_grad and module.depth(self.part.backbone, name) < self.cut.a
            for name, parameter in module.parameters(self.part).items()
        )

    def head(self, inputs: dict[str, Tensor], mask_BT: Tensor | None) -> Tensor:
        """Model inputs -> what crosses the wire, [B, T, D]; with a prompt T counts its tokens.

        `mask_BT` is the inputs' own here and in what follows.
        """
        h_BTD = self.part.ends.embed(inputs)
        return self.part.trunk.run(h_BTD, self.part.ends.mask(mask_BT), 0, self.cut.a)

    def encode(self, h_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Through the encoder: [B, T, D] -> [B, T, D] or pooled [B, P]."""
        if self._encoder is None:
            return h_BTD
        return seam.cross(h_BTD, self.part.ends.mask(mask_BT), self._encoder, next(self._steps))

    def probe(
        self, h_BTD: Tensor, mask_BT: Tensor | None
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        """What K perturbed encoders make of [B, T, D]: [K, B, T, D] or [K, B, P], and where their K losses go."""
        assert self._encoder is not None, "a cut with blocks on the server has an encoder"
        step = next(self._steps)
        z_K = seam.probe(h_BTD, self.part.ends.mask(mask_BT), self._encoder, step)
        return z_K, partial(seam.settle, encoder=self._encoder, step=step)

    def tail(self, z: Tensor, mask_BT: Tensor | None) -> Tensor:
        """What came back -> logits [B, C]."""
        return self.part.ends.classify(self.pooled(z, mask_BT))

    def pooled(self, z: Tensor, mask_BT: Tensor | None) -> Tensor:
        """What came back -> pooled features [B, P], as `Ends.features` and `Ends.classify` take them."""
        if self._server_pools:
            return z
        mask_BT = self.part.ends.mask(mask_BT)
        z = self.part.trunk.run(z, mask_BT, self.cut.b, self.part.backbone.blocks)
        return self.part.ends.pool(z, mask_BT)

    def __call__(self, inputs: dict[str, Tensor], mask_BT: Tensor | None) -> Tensor:
        """Model inputs -> logits [B, C]."""
        return self.tail(self.encode(self.head(inputs, mask_BT), mask_BT), mask_BT)


def whole_model(backbone: Backbone, spec: ModuleSpec, tensors: ModuleTensors) -> SplitModel:
    """The whole model with a trained module, all of it here: `model(inputs, mask)` gives logits [B, C].

    `inputs` are those of transformers' own model; `mask` is a text's attention mask, None where nothing is padded.
    """
    local = Cut(backbone.blocks, backbone.blocks)
    part = device_part(backbone, local, spec)
    module.load(part, tensors)
    return SplitModel(part, local, None)

"""Some of a backbone's blocks and ends, held in memory.

A `Part` is the whole model's skeleton on the meta device. Only the tensors that it needs have values. So every
name is the whole model's name: PEFT attaches to it, aggregation matches by name, and the exported module loads on
the whole backbone. `part.trunk` runs its blocks, `part.ends` what comes before and after them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.core.errors import BackboneError
from fedsplit.model.backbone import Backbone, frozen_names, frozen_paths
from fedsplit.model.checkpoint import load_tensors
from fedsplit.model.ends import Ends
from fedsplit.model.trunk import Trunk

Weights = Callable[[nn.Module, set[str]], Mapping[str, Tensor]]
"""(skeleton, names) -> frozen tensors of these names, which the part shares and never alters."""


class Part:
    """Some of a backbone's blocks, and with them embeddings, pooling and classifier where wanted."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        classes: int,
        blocks: Sequence[int],
        embeddings: bool,
        pool: bool,
        share: Part | None = None,
        weights: Weights | None = None,
    ) -> None:
        """Materialise `blocks` (and the ends asked for) from disk, or with the tensors of `share` or `weights`.

        The classifier of a part with embeddings is materialised as zeros: its values come with the module.
        """
        self.backbone = backbone
        self.family = backbone.family
        self.model: Any = backbone.skeleton(classes)
        self.trunk = Trunk(self.model, self.family)
        self.ends = Ends(self.model, self.family)
        self.held = tuple(blocks)
        self.embeddings = embeddings
        # What the module makes of this part; `module.attach` sets them.
        self.full_from: int | None = None
        self.module_parameters: dict[str, nn.Parameter] | None = None
        paths = frozen_paths(self.family, self.held, embeddings=embeddings, pool=pool)
        self._materialise(paths, share, weights)
        if embeddings:
            for name in self.family.classifier:
                getattr(self.model, name).to_empty(device="cpu").requires_grad_(True)
                for parameter in getattr(self.model, name).parameters():
                    nn.init.zeros_(parameter)

    def _materialise(self, paths: list[str], share: Part | None, weights: Weights | None) -> None:
        modules = [self.model.get_submodule(path) for path in paths]
        names = frozen_names(self.model, paths)
        tensors: Mapping[str, Tensor]
        if share is not None:
            tensors = {n: p for n, p in share.model.named_parameters() if n in names}
        elif weights is not None:
            tensors = weights(self.model, names)
        else:
            tensors = load_tensors(self.backbone.path, self.model, names)
        for path, module in zip(paths, modules, strict=True):
            _restore_buffers(module)
            own = {n: tensors[f"{path}.{n}"] for n, _ in module.named_parameters()}
            module.load_state_dict(own, strict=False, assign=True)
            module.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where this part computes; meta where it holds no tensor."""
        held = (p.device for p in self.model.parameters() if not p.is_meta)
        return next(held, torch.device("meta"))


def _restore_buffers(module: nn.Module) -> None:
    """Give position ids and token types, which are computed and not stored, their values again."""
    for child in module.modules():
        for name, buffer in child.named_buffers(recurse=False):
            if not buffer.is_meta:
                continue
            if name == "position_ids":
                value = torch.arange(buffer.shape[-1]).expand(buffer.shape).clone()
            elif name == "token_type_ids":
                value = torch.zeros(buffer.shape, dtype=torch.long)
            else:
                raise BackboneError(f"buffer {name!r} of {type(child).__name__} cannot be restored")
            setattr(child, name, value)

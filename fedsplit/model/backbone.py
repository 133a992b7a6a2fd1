"""A backbone on disk and the parts of it that are held in memory.

A `Part` is the whole model's skeleton on the meta device with only the tensors it needs materialised, so
every name is the whole model's name: PEFT attaches to it, aggregation matches by name and the exported
module loads on the whole backbone. Called by `split.py` (device) and `encoder.py` (server).
Shapes: B batch, T tokens, D width, P pooled width, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.core.cut import Cut
from fedsplit.core.errors import BackboneError
from fedsplit.model.checkpoint import digest, find_backbone, load_tensors, weight_files
from fedsplit.model.families import Family, family_of

# What transformers raises for a config.json that is not what it expects.
_BAD_CONFIG = (ValueError, KeyError, TypeError)
_OLD_LABELS = ("id2label", "label2id", "num_labels")


@dataclass(frozen=True)
class Backbone:
    """A model directory: what it is, not its weights."""

    name: str
    path: Path
    family: Family
    config: Any = field(compare=False)

    @classmethod
    def find(cls, name: str) -> Backbone:
        """Locate and describe a backbone by directory, hub id or bundled name. Raises BackboneError."""
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        path = find_backbone(name)
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
        except (*_BAD_CONFIG, OSError, RecursionError, StrictDataclassError) as err:
            reason = " ".join(str(err).split())[:300]
            raise BackboneError(
                f"backbone {path} has no usable config.json ({reason}); give a directory in Hugging "
                f"Face format"
            ) from err
        family = family_of(config.model_type, where=str(path))
        weight_files(path)
        return cls(name, path, family, config)

    @property
    def blocks(self) -> int:
        """L, the number of transformer blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def width(self) -> int:
        """D."""
        return int(self.config.hidden_size)

    @property
    def pooled_width(self) -> int:
        """P."""
        return self.width * self.family.pool_factor

    @property
    def sha256(self) -> str:
        """Digest of configuration and weights."""
        return digest(self.path)

    def check_cuts(self, cuts: Iterable[Cut]) -> None:
        """Raise ConfigError unless every cut fits this backbone."""
        for cut in cuts:
            cut.check(self.blocks)

    def max_tokens(self, image_size: int, max_length: int) -> int:
        """Most tokens of a sample: patches and special tokens of an image, `max_length` of a text."""
        if self.family.kind == "text":
            return min(max_length, int(self.config.max_position_embeddings))
        height, width = _sides(image_size or self.config.image_size)
        patch_height, patch_width = _sides(self.config.patch_size)
        return (height // patch_height) * (width // patch_width) + 2

    def weight_bytes(self) -> int:
        """Bytes of all weights in fp32: what full-model averaging would move one way."""
        skeleton = self.skeleton(1)
        return 4 * sum(p.numel() for p in skeleton.parameters())

    def skeleton(self, classes: int) -> nn.Module:
        """The whole classification model on the meta device: names and shapes, no memory."""
        import transformers

        # The old task's label names would contradict the new number of classes.
        own = {k: v for k, v in self.config.to_dict().items() if k not in _OLD_LABELS}
        config = type(self.config).from_dict(own | {"num_labels": classes})
        model_class = getattr(transformers, self.family.model_class)
        try:
            with torch.device("meta"):
                model: nn.Module = model_class._from_config(config, dtype=torch.float32)
        except (*_BAD_CONFIG, ZeroDivisionError, RuntimeError) as err:
            raise BackboneError(
                f"backbone {self.path}: no {self.family.model_class} can be made of its config.json "
                f"({type(err).__name__}: {str(err)[:200]}); correct it"
            ) from err
        # Frozen and without dropout for life: placement must not change the function.
        return model.eval().requires_grad_(False)


def _sides(size: Any) -> tuple[int, int]:
    """(height, width) of a config's size, which is one number or two."""
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


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
    ) -> None:
        """Materialise `blocks` (and the ends asked for) from disk, or share the tensors of `share`.

        The classifier of a part with embeddings is materialised as zeros: its values come with the module.
        """
        self.backbone = backbone
        self.family = backbone.family
        self.model: Any = backbone.skeleton(classes)
        self._base: Any = getattr(self.model, self.family.base)
        self.held = tuple(blocks)
        paths = [f"{self.family.base}.{self.family.blocks}.{i}" for i in self.held]
        if embeddings:
            paths.append(f"{self.family.base}.{self.family.embeddings}")
        if pool:
            paths += [f"{self.family.base}.{name}" for name in self.family.pool_modules]
        self._materialise(paths, share)
        if embeddings:
            for name in self.family.classifier:
                getattr(self.model, name).to_empty(device="cpu").requires_grad_(True)
                for parameter in getattr(self.model, name).parameters():
                    nn.init.zeros_(parameter)

    def _materialise(self, paths: list[str], share: Part | None) -> None:
        modules = [self.model.get_submodule(path) for path in paths]
        names = {
            f"{path}.{name}"
            for path, module in zip(paths, modules, strict=True)
            for name, _ in module.named_parameters()
        }
        if share is None:
            tensors = load_tensors(self.backbone.path, self.model, names)
        else:
            tensors = {n: p for n, p in share.model.named_parameters() if n in names}
        for path, module in zip(paths, modules, strict=True):
            _restore_buffers(module)
            own = {n: tensors[f"{path}.{n}"] for n, _ in module.named_parameters()}
            module.load_state_dict(own, strict=False, assign=True)
            module.requires_grad_(False)

    def embed(self, inputs: dict[str, Tensor]) -> Tensor:
        """Model inputs -> embeddings [B, T, D]. The attention mask is not an input of this."""
        embeddings = getattr(self._base, self.family.embeddings)
        known = {k: v for k, v in inputs.items() if k != "attention_mask"}
        if self.family.kind == "image":
            out: Tensor = embeddings(known["pixel_values"], **dict(self.family.embed_kwargs))
        else:
            out = embeddings(**known, **dict(self.family.embed_kwargs))
        return out

    def run(self, h_BTD: Tensor, mask_BT: Tensor | None, start: int, stop: int) -> Tensor:
        """Run blocks[start:stop]; `mask_BT` is True on real tokens, None means all are."""
        if start == stop:
            return h_BTD
        from transformers.masking_utils import create_bidirectional_mask

        mask = create_bidirectional_mask(
            config=self.model.config, inputs_embeds=h_BTD, attention_mask=mask_BT
        )
        blocks = reduce(getattr, self.family.blocks.split("."), self._base)
        for block in blocks[start:stop]:
            h_BTD = block(h_BTD, mask)
        return h_BTD

    def pool(self, h_BTD: Tensor) -> Tensor:
        """Final norm and pooling: [B, T, D] -> [B, P]."""
        return self.family.pool(self._base, h_BTD)

    def classify(self, pooled_BP: Tensor) -> Tensor:
        """Pooled features [B, P] -> logits [B, C]."""
        return self.family.classify(self.model, pooled_BP)


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

"""A backbone on disk: where it lies, what its config.json says, its skeleton without weights, its digest.

The parts of it that are held in memory are part.py's. Shapes: D width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedsplit.core.errors import BackboneError
from fedsplit.model.digest import difference, digest, manifest_of
from fedsplit.model.families import LAYER_TYPES, Family, family_of
from fedsplit.model.files import Stamp, find_backbone, refuse_pointers, stamp
from fedsplit.model.manifest import Manifest
from fedsplit.model.preprocess import read_preprocess
from fedsplit.model.tokenizer import padding_notes

# What transformers raises for a config.json that is not what it expects.
_BAD_CONFIG = (ValueError, KeyError, TypeError)
# Kinds of rotary positions whose tables change with the texts that went through before.
_BY_LENGTH = {"dynamic", "longrope"}
_OLD_LABELS = ("id2label", "label2id", "num_labels")


@dataclass(frozen=True)
class Backbone:
    """A model directory in the state that it was found in: what it is, not its weights.

    Two are equal as long as no file has changed between their finding, so one is a key for what is kept of its files.
    """

    name: str
    path: Path
    family: Family
    config: Any = field(compare=False)
    state: Stamp = ()
    """Of its files, when it was found."""

    @classmethod
    def find(cls, name: str) -> Backbone:
        """Locate and describe a backbone by directory, hub id or bundled name. Raises BackboneError."""
        path = find_backbone(name)
        refuse_pointers(path)
        return _found(name, path, stamp(path))

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

    @cached_property
    def config_json(self) -> str:
        """The configuration as text, for keys of caches: one path may hold another model later."""
        return str(self.config.to_json_string())

    @property
    def sha256(self) -> str:
        """Digest of configuration, weights and what its files make of an input; see digest.py."""
        return digest(self.path, self.family.kind)

    @property
    def manifest(self) -> Manifest:
        """Its tensors and small files, each with its digest."""
        return manifest_of(self.path, self.family.kind)

    def differs(self, sha256: str) -> str:
        """In words what of this backbone differs from that with the other digest; empty where nothing does."""
        return difference(self.sha256, sha256, self.family.kind)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was guessed of its input or is not followed, a sentence each. Raises BackboneError."""
        if self.family.kind == "image":
            return read_preprocess(self.path).notes
        return padding_notes(self.path, self.config.pad_token_id) if self.family.causal else ()

    def max_tokens(self, image_size: int, max_length: int, prompt_tokens: int = 0) -> int:
        """Most tokens of a sample: patches and special tokens of an image, `max_length` of a text; a prompt's too.

        A prompt goes in after the position embeddings, so it takes no place of a text's.
        """
        if self.family.kind == "text":
            return min(max_length, int(self.config.max_position_embeddings)) + prompt_tokens
        height, width = sides(image_size or self.config.image_size)
        patch_height, patch_width = sides(self.config.patch_size)
        return (height // patch_height) * (width // patch_width) + 2 + prompt_tokens

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


def sides(size: Any) -> tuple[int, int]:
    """(height, width) of a config's size, which is one number or two."""
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


@lru_cache(maxsize=8)
def _found(name: str, path: Path, state: Stamp) -> Backbone:
    """The backbone, described once for each state of its files: a site asks in every round."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (*_BAD_CONFIG, OSError, RecursionError, StrictDataclassError) as err:
        reason = " ".join(str(err).split())[:300]
        raise BackboneError(
            f"backbone {path} has no usable config.json ({reason}); give a directory in Hugging "
            f"Face format, of a model that transformers has itself: fedsplit never runs code from a backbone's folder"
        ) from err
    family = family_of(config.model_type, where=str(path))
    if problem := _refusal(config, family):
        raise BackboneError(f"backbone {path}: {problem}")
    return Backbone(name, path, family, config, state)


def _refusal(config: Any, family: Family) -> str:
    """Why a backbone of a known family is of no use here all the same; empty for most."""
    if getattr(config, "quantization_config", None):
        return (
            "its config.json has a quantization_config; gradients through quantised weights are not exact: use the "
            "checkpoint that it was made from, in float16, bfloat16 or float32"
        )
    decoder = getattr(config, "is_decoder", False) and not family.causal
    if decoder or getattr(config, "add_cross_attention", False):
        return (
            f"its config.json says is_decoder or add_cross_attention; fedsplit splits models of family "
            f"{family.model_type!r} only as encoders with attention to both sides: use a checkpoint of an encoder"
        )
    if family.layer_types and (odd := sorted(set(config.layer_types) - set(LAYER_TYPES))):
        return f"its layer_types include {odd[0]!r}; fedsplit runs blocks of the types {', '.join(LAYER_TYPES)}"
    if lengths := sorted(_rope_types(config) & _BY_LENGTH):
        return (
            f"its rope_type is {lengths[0]!r}, whose positions depend on the longest text so far, so head, encoder and "
            f"tail would differ; use a checkpoint with another one, such as default, linear, yarn or llama3"
        )
    positions = getattr(config, "position_embedding_type", None)
    if positions not in (None, "absolute"):
        # transformers 5 reads such a config and then leaves the relative part out.
        return (
            f"its position_embedding_type is {positions!r}, which transformers no longer computes; use a checkpoint "
            f"with absolute positions"
        )
    channels = getattr(config, "num_channels", 3)
    if family.kind == "image" and channels != 3:
        return f"it reads pictures of {channels} channels (num_channels), fedsplit gives it 3: use one for RGB"
    return ""


def _rope_types(config: Any) -> set[str]:
    """The kinds of rotary positions: one for the model, or one for each type of layer."""
    said = getattr(config, "rope_parameters", None) or {}
    tables = [said] if "rope_type" in said else [t for t in said.values() if isinstance(t, dict)]
    return {str(table.get("rope_type")) for table in tables}


def frozen_paths(
    family: Family, blocks: Sequence[int], *, embeddings: bool = True, pool: bool = True
) -> list[str]:
    """Paths of the submodules of the whole model that these blocks and ends are."""
    paths = [f"{family.base}.{family.blocks}.{i}" for i in blocks]
    if embeddings:
        paths.append(f"{family.base}.{family.embeddings}")
    if pool:
        paths += [f"{family.base}.{name}" for name in family.pool_modules]
    return paths


def frozen_names(model: nn.Module, paths: Sequence[str]) -> set[str]:
    """Names of the parameters of the whole model below these paths."""
    return {
        f"{path}.{name}"
        for path in paths
        for name, _ in model.get_submodule(path).named_parameters()
    }

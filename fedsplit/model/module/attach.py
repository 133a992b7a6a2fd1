"""The module in a part: put it on, move its values in and out, say which of its tensors train."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedsplit.core.errors import BackboneError
from fedsplit.model.layers import DOWN, MERGED, PROMPT, UP, Merged, add_adapter, add_prompt
from fedsplit.model.module import lora
from fedsplit.model.module.names import (
    check_spec,
    depth,
    full_from,
    module_blocks,
    prompted_blocks,
    trains,
)
from fedsplit.model.module.spec import ModuleSpec, ModuleTensors
from fedsplit.model.part import Part

_MARKS = tuple(f".{part}." for part in ("lora_A", "lora_B", MERGED, PROMPT, DOWN, UP))


def attach(part: Part, spec: ModuleSpec) -> None:
    """Put the module on the part's own blocks and ends. Raises ConfigError when the spec does not fit."""
    check_spec(part.backbone, spec)
    part.ends.prompt_tokens = spec.prompts
    if spec.kind == "lora":
        lora.attach(part, spec)
    elif spec.kind == "prompt":
        if part.embeddings:
            add_prompt(part.ends.base, spec.prompt_tokens, part.backbone.width)
        for i in set(part.held).intersection(prompted_blocks(part.backbone, spec)):
            add_prompt(part.trunk.blocks[i], spec.prompt_tokens, part.backbone.width)
    elif spec.kind == "adapter":
        for i in set(part.held).intersection(module_blocks(part.backbone, spec)):
            add_adapter(part.trunk.blocks[i], spec.adapter_width, part.backbone.width)
    elif spec.kind == "full":
        part.full_from = full_from(part.backbone, spec)
        _own_all(part)
    part.module_parameters = None
    # PEFT marks LoRA alone as trainable; the classifier trains with it.
    train_only(part)


def _own_all(part: Part) -> None:
    """Give the part copies of the module's tensors: what trains must not be shared with another part."""
    for path, child in part.model.named_modules():
        for name, parameter in child.named_parameters(path, recurse=False):
            if not parameter.is_meta and _in_module(part, name):
                own = parameter.detach().clone()
                leaf = name.rpartition(".")[2]
                setattr(child, leaf, nn.Parameter(own, requires_grad=False))


def parameters(part: Part) -> dict[str, nn.Parameter]:
    """The module's parameters that live in this part, by the whole model's names.

    Merged deltas are among them, and never require a gradient.
    """
    if part.module_parameters is None:
        # Kept, for a walk over a whole skeleton takes milliseconds and a site asks several times a round.
        part.module_parameters = {
            lora.public_name(name): parameter
            for name, parameter in part.model.named_parameters()
            if not parameter.is_meta and _in_module(part, name)
        }
    return dict(part.module_parameters)


def _in_module(part: Part, name: str) -> bool:
    if name.partition(".")[0] in part.family.classifier:
        return True
    if part.full_from is not None:
        return name not in part.family.idle and depth(part.backbone, name) >= part.full_from
    return any(mark in name for mark in _MARKS)


def load(part: Part, tensors: Mapping[str, NDArray[np.float32]]) -> None:
    """Copy the module's values into the part. Raises BackboneError when one lacks or does not fit.

    Loading again replaces all that was loaded before, merged deltas too.
    """
    for name, parameter in parameters(part).items():
        if name not in tensors or tensors[name].shape != tuple(parameter.shape):
            got = tensors[name].shape if name in tensors else "nothing"
            raise BackboneError(
                f"module tensor {name}: {tuple(parameter.shape)} is wanted, got {got}; the module was "
                f"made for another backbone, rank or class list"
            )
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(np.require(tensors[name], requirements="W")))
    for child in part.model.modules():
        if isinstance(child, Merged):
            child.apply_delta()


def read(part: Part) -> ModuleTensors:
    """The module's values in this part, as copies."""
    return {n: p.detach().cpu().numpy().copy() for n, p in parameters(part).items()}


def train_only(part: Part, names: Collection[str] | None = None) -> None:
    """Let the module's tensors `names` train and no others; None: all that can train. Drops gradients."""
    for name, parameter in parameters(part).items():
        parameter.requires_grad_(trains(name) and (names is None or name in names))
        parameter.grad = None


def freeze_head(part: Part, blocks_below: int) -> None:
    """Stop training what is below block `blocks_below`, prompt and embeddings too; it still counts forward."""
    for name, parameter in parameters(part).items():
        if depth(part.backbone, name) < blocks_below:
            parameter.requires_grad_(False)


def freeze_classifier(part: Part) -> None:
    """Stop training the classifier, all layers of it: its features must stay what they were made for."""
    for name, parameter in parameters(part).items():
        if depth(part.backbone, name) > part.backbone.blocks:
            parameter.requires_grad_(False)

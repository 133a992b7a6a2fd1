"""The module before any training."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedsplit.model.backbone import Backbone, sides
from fedsplit.model.checkpoint import load_tensors, stored_names
from fedsplit.model.layers import MERGED, PROMPT, UP
from fedsplit.model.module.names import depth, shapes
from fedsplit.model.module.spec import ModuleSpec, ModuleTensors


def initial(backbone: Backbone, spec: ModuleSpec, *, seed: int) -> ModuleTensors:
    """The module before any training: it adds nothing, but for a prompt, whose tokens are random.

    LoRA A as PEFT draws it, an adapter's lower layer likewise, a prompt as VPT does; LoRA B, an adapter's upper
    layer and the last linear are zero; a full module is what is on disk, and so are a classifier's first layers where
    the checkpoint has them. Each tensor draws from its own generator, seeded by its name, so the start does not depend
    on cuts.
    """
    wanted = shapes(backbone, spec)
    tensors = _from_disk(backbone, spec, wanted)
    for name, shape in wanted.items():
        if name not in tensors:
            tensors[name] = _drawn(backbone, name, shape, seed)
    return {n: tensors[n] for n in wanted}


def _from_disk(backbone: Backbone, spec: ModuleSpec, wanted: Collection[str]) -> ModuleTensors:
    full, stored = spec.kind == "full", backbone.family.stored
    names = {n for n in wanted if full and depth(backbone, n) <= backbone.blocks}
    if not full and not stored:
        return {}
    skeleton = backbone.skeleton(1)
    first = {n for n in wanted if n.partition(".")[0] in stored}
    names |= stored_names(backbone.path, skeleton) & first
    found = load_tensors(backbone.path, skeleton, names)
    return {n: t.numpy() for n, t in found.items()}


def _drawn(backbone: Backbone, name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    if _starts_at_zero(backbone, name):
        return np.zeros(shape, dtype=np.float32)
    if len(shape) == 1:
        return np.ones(shape, dtype=np.float32)  # a norm's weight
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)
    value = torch.empty(shape)
    if f".{PROMPT}." in name:
        limit = math.sqrt(6 / (_patch_values(backbone) + backbone.width))
        nn.init.uniform_(value, -limit, limit, generator=generator)
    else:
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
    return value.numpy()


def _starts_at_zero(backbone: Backbone, name: str) -> bool:
    grows = any(f".{part}." in name for part in ("lora_B", MERGED, UP))
    return grows or name.endswith("bias") or name == f"{backbone.family.final_linear}.weight"


def _patch_values(backbone: Backbone) -> int:
    """Numbers that make one token: those of a patch; of a text the width of its embedding."""
    if backbone.family.kind == "text":
        return backbone.width
    height, width = sides(backbone.config.patch_size)
    return height * width * int(getattr(backbone.config, "num_channels", 3))

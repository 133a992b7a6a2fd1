"""The module of a task: LoRA on some blocks plus the classifier. The only file that imports peft.

A module is a flat dict of fp32 arrays by the whole model's names ("vit.layers.0.attention.q_proj.lora_A.weight",
"classifier.weight"); `attach` puts LoRA on a part, `load`/`read` move the arrays in and out, `export` writes
PEFT's own format.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.errors import BackboneError, ConfigError, ProtocolError
from fedsplit.model.backbone import Backbone, Part
from fedsplit.model.families import Family

ModuleTensors = dict[str, NDArray[np.float32]]
_ADAPTER = "default"
# Far above any sane alpha; alpha / rank must stay a float.
_MAX_ALPHA = 2**20


@dataclass(frozen=True, kw_only=True)
class ModuleSpec:
    """What the module of a task is made of."""

    classes: tuple[str, ...]
    lora: bool = True
    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get LoRA; empty: the family's query and value."""

    @classmethod
    def of(cls, config: RunConfig, classes: tuple[str, ...]) -> ModuleSpec:
        """The module that a run's settings ask for."""
        return cls(
            classes=classes,
            lora=config.module == "lora",
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            targets=tuple(t.strip() for t in config.lora_targets.split(",") if t.strip()),
        )


def attach(part: Part, spec: ModuleSpec) -> None:
    """Put LoRA on the part's own blocks. Raises ConfigError when a target is not there."""
    if not spec.lora or not part.held:
        return
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=_target_paths(part, spec),
        lora_dropout=0.0,
        bias="none",
    )
    inject_adapter_in_model(config, part.model, adapter_name=_ADAPTER)
    # PEFT marks LoRA alone as trainable; the classifier trains with it.
    for parameter in parameters(part).values():
        parameter.requires_grad_(True)


def _target_paths(part: Part, spec: ModuleSpec) -> list[str]:
    root = f"{part.family.base}.{part.family.blocks}"
    prefixes = tuple(f"{root}.{i}." for i in part.held)
    return [n for n in _targets(part.model, part.family, spec) if n.startswith(prefixes)]


def _targets(model: nn.Module, family: Family, spec: ModuleSpec) -> dict[str, nn.Linear]:
    """The linear layers of all blocks that get LoRA. Raises ConfigError when a target is not there."""
    root = f"{family.base}.{family.blocks}."
    linear = {
        n: m for n, m in model.named_modules() if n.startswith(root) and isinstance(m, nn.Linear)
    }
    targets = spec.targets or family.lora_targets
    if missing := [t for t in targets if not any(n.endswith(f".{t}") for n in linear)]:
        offered = sorted({n.rsplit(".", 1)[1] for n in linear})
        raise ConfigError(
            f"lora-targets: no linear layer {missing[0][:100]!r} in the blocks of family "
            f"{family.model_type!r}; there are {', '.join(offered)}"
        )
    return {n: m for n, m in linear.items() if any(n.endswith(f".{t}") for t in targets)}


def parameters(part: Part) -> dict[str, nn.Parameter]:
    """The module's parameters that live in this part, by the whole model's names."""
    own = {}
    for name, parameter in part.model.named_parameters():
        is_classifier = name.split(".", 1)[0] in part.family.classifier and not parameter.is_meta
        if is_classifier or ".lora_" in name:
            own[name.replace(f".{_ADAPTER}.", ".")] = parameter
    return own


def load(part: Part, tensors: Mapping[str, NDArray[np.float32]]) -> None:
    """Copy the module's values into the part. Raises BackboneError when one lacks or does not fit."""
    for name, parameter in parameters(part).items():
        if name not in tensors or tensors[name].shape != tuple(parameter.shape):
            got = tensors[name].shape if name in tensors else "nothing"
            raise BackboneError(
                f"module tensor {name}: {tuple(parameter.shape)} is wanted, got {got}; the module was "
                f"made for another backbone, rank or class list"
            )
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(np.require(tensors[name], requirements="W")))


def read(part: Part) -> ModuleTensors:
    """The module's values in this part, as copies."""
    return {n: p.detach().cpu().numpy().copy() for n, p in parameters(part).items()}


def freeze_head(part: Part, blocks_below: int) -> None:
    """Stop training LoRA in blocks[0:blocks_below]; its values still count in the forward pass."""
    root = f"{part.family.base}.{part.family.blocks}"
    prefixes = tuple(f"{root}.{i}." for i in range(blocks_below))
    for name, parameter in parameters(part).items():
        if name.startswith(prefixes):
            parameter.requires_grad_(False)


def shapes(backbone: Backbone, spec: ModuleSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the whole module, on all blocks. Costs no memory for weights.

    Raises ConfigError when a LoRA target is not in the blocks.
    """
    found: dict[str, tuple[int, ...]] = {}
    skeleton: Any = backbone.skeleton(len(spec.classes))
    if spec.lora:
        for name, layer in _targets(skeleton, backbone.family, spec).items():
            found[f"{name}.lora_A.weight"] = (spec.rank, layer.in_features)
            found[f"{name}.lora_B.weight"] = (layer.out_features, spec.rank)
    for top in backbone.family.classifier:
        for name, parameter in skeleton.get_submodule(top).named_parameters():
            found[f"{top}.{name}"] = tuple(parameter.shape)
    return found


def initial(backbone: Backbone, spec: ModuleSpec, *, seed: int) -> ModuleTensors:
    """The module before any training: LoRA A uniform as PEFT does it, LoRA B and the last linear zero.

    Each tensor draws from its own generator, seeded by its name, so the start does not depend on cuts.
    """
    tensors: ModuleTensors = {}
    for name, shape in shapes(backbone, spec).items():
        zero = ".lora_B." in name or name.endswith("bias") or _is_output(backbone, name)
        if zero:
            tensors[name] = np.zeros(shape, dtype=np.float32)
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)
        value = torch.empty(shape)
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
        tensors[name] = value.numpy()
    return tensors


def _is_output(backbone: Backbone, name: str) -> bool:
    """Is this the linear layer that makes the logits?"""
    last = backbone.family.classifier[-1]
    return name in {f"{last}.weight", f"{last}.out_proj.weight"}


def export(
    folder: Path, backbone: Backbone, spec: ModuleSpec, tensors: Mapping[str, NDArray[np.float32]]
) -> None:
    """Write the module in PEFT's format: `PeftModel.from_pretrained(whole_model, folder)` loads it.

    Beside it goes `fedsplit.json` with the classes and the backbone's digest.
    """
    from peft import LoraConfig
    from safetensors.numpy import save_file

    whole = dict(tensors) if spec.lora else {**tensors, **_idle_lora(backbone, spec)}
    folder.mkdir(parents=True, exist_ok=True)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        # Whole names: a bare one like "dense" is met outside the blocks too. A module without LoRA still
        # is an adapter for PEFT, which wants a target: it gets LoRA that adds nothing.
        target_modules=sorted(n.removesuffix(".lora_A.weight") for n in whole if ".lora_A." in n),
        lora_dropout=0.0,
        bias="none",
        modules_to_save=list(backbone.family.classifier),
        base_model_name_or_path=str(backbone.name),
        task_type="SEQ_CLS" if backbone.family.kind == "text" else None,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file(
        {f"base_model.model.{n}": np.ascontiguousarray(t) for n, t in whole.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    about = {"classes": list(spec.classes), "backbone_sha256": backbone.sha256, "lora": spec.lora}
    (folder / "fedsplit.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _idle_lora(backbone: Backbone, spec: ModuleSpec) -> ModuleTensors:
    lora = ModuleSpec(classes=spec.classes, rank=spec.rank, alpha=spec.alpha, targets=spec.targets)
    return {n: t for n, t in initial(backbone, lora, seed=0).items() if ".lora_" in n}


def trained_names(backbone: Backbone, spec: ModuleSpec, cut: Cut, *, head: bool) -> set[str]:
    """The module tensors that a device at `cut` trains; without `head`, those of the tail alone."""
    root = f"{backbone.family.base}.{backbone.family.blocks}"
    blocks = [i for i in cut.device_blocks(backbone.blocks) if head or i >= cut.b]
    prefixes = tuple(f"{root}.{i}." for i in blocks)
    return {
        name
        for name in shapes(backbone, spec)
        if ".lora_" not in name or (prefixes and name.startswith(prefixes))
    }


def device_names(backbone: Backbone, spec: ModuleSpec, cut: Cut) -> set[str]:
    """The module tensors that a device at `cut` holds."""
    return trained_names(backbone, spec, cut, head=True)


def server_names(backbone: Backbone, spec: ModuleSpec) -> set[str]:
    """The module tensors that an encoder host may need, whatever the cuts: LoRA on every block."""
    return {name for name in shapes(backbone, spec) if ".lora_" in name}


def pack(spec: ModuleSpec, tensors: Mapping[str, NDArray[np.float32]]) -> bytes:
    """A module version as safetensors bytes, with what LoRA needs beside the weights as metadata."""
    from safetensors.numpy import save

    about = {
        "rank": spec.rank,
        "alpha": spec.alpha,
        "targets": list(spec.targets),
        "lora": spec.lora,
    }
    return save(dict(tensors), metadata={"fedsplit": json.dumps(about)})


def unpack(data: bytes) -> tuple[ModuleSpec, ModuleTensors]:
    """The inverse of `pack`. Raises ProtocolError on anything that `pack` does not write."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as load_bytes

    try:
        header_bytes = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + header_bytes])
        about = json.loads(header["__metadata__"]["fedsplit"])
        rank, alpha, targets, lora = (about[k] for k in ("rank", "alpha", "targets", "lora"))
        # `type`, for True is an int to isinstance.
        good = (type(rank), type(alpha), type(lora), type(targets)) == (int, int, bool, list)
        good = good and 0 < rank <= 1024 and 0 < alpha <= _MAX_ALPHA
        if not (good and all(isinstance(t, str) for t in targets)):
            raise ValueError("rank, alpha, targets or lora is out of range")
        tensors = load_bytes(data)
    except (
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as err:
        raise ProtocolError(
            f"a module version could not be read ({type(err).__name__}: {str(err)[:200]}); it is safetensors "
            f"bytes as fedsplit packs them"
        ) from err
    if wrong := [
        n for n, t in tensors.items() if t.dtype != np.float32 or not np.isfinite(t).all()
    ]:
        raise ProtocolError(f"module tensor {wrong[0]!r} is not finite float32")
    spec = ModuleSpec(classes=("?",), lora=lora, rank=rank, alpha=alpha, targets=tuple(targets))
    return spec, tensors

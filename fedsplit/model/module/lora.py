"""LoRA by PEFT: puts it on a part's layers and writes PEFT's configuration. The only file that imports peft."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsplit.model.backbone import Backbone
from fedsplit.model.layers import MERGED, Merged
from fedsplit.model.module.names import depth, lora_layers
from fedsplit.model.module.spec import ModuleSpec
from fedsplit.model.part import Part

_ADAPTER = "default"


def attach(part: Part, spec: ModuleSpec) -> None:
    """Put LoRA on the part's own blocks. Raises ConfigError when a target is not there."""
    from peft import LoraConfig, inject_adapter_in_model

    layers = lora_layers(part.model, part.backbone, spec)
    paths = [n for n in layers if depth(part.backbone, n) in part.held]
    # PEFT wants at least one target.
    if not paths:
        return
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, target_modules=paths, lora_dropout=0.0, bias="none"
    )
    inject_adapter_in_model(config, part.model, adapter_name=_ADAPTER)
    for path in paths:
        layer = part.model.get_submodule(path)
        # Not PEFT's alpha / r: all ranks have one scale in common, to the last bit.
        layer.scaling[_ADAPTER] = spec.scale
        if spec.merged:
            layer.add_module(MERGED, Merged(layer.base_layer))


def public_name(name: str) -> str:
    """The module's name of a parameter: PEFT puts its adapter's name into it."""
    return name.replace(f".{_ADAPTER}.", ".")


def save_config(
    folder: Path, backbone: Backbone, spec: ModuleSpec, tensors: Mapping[str, object]
) -> None:
    """Write `adapter_config.json` for the LoRA layers that occur in `tensors`."""
    from peft import LoraConfig

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=_alpha(spec),
        # Whole names: a bare one like "dense" is met outside the blocks too.
        target_modules=sorted(n.removesuffix(".lora_A.weight") for n in tensors if ".lora_A." in n),
        lora_dropout=0.0,
        bias="none",
        modules_to_save=list(backbone.family.classifier),
        base_model_name_or_path=str(backbone.name),
        task_type="SEQ_CLS" if backbone.family.kind == "text" else None,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))


def _alpha(spec: ModuleSpec) -> Any:
    """The alpha with which PEFT, which divides by the rank, gets the common scale; whole where it can be.

    PEFT calls it an int and computes with a fraction as well.
    """
    alpha = spec.alpha * spec.rank / spec.max_rank
    return int(alpha) if alpha.is_integer() else alpha

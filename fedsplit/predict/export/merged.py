"""A module as weights of transformers' own classification model: nothing of fedsplit is left in its forward pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedsplit.core.errors import ConfigError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec, ModuleTensors
from fedsplit.model.split import SplitModel, whole_model
from fedsplit.model.tokenizer import read_tokenizer

MERGEABLE = ("lora", "classifier", "full")
_A, _B = ".lora_A.weight", ".lora_B.weight"


def merged_model(backbone: Backbone, spec: ModuleSpec, tensors: ModuleTensors) -> SplitModel:
    """The whole model whose every weight is a plain one. Raises ConfigError for a module that no weight can hold."""
    if spec.kind not in MERGEABLE:
        raise ConfigError(
            f"a module of kind {spec.kind} cannot be merged: it adds layers that transformers' {backbone.family.model_class} "
            f"does not have. --to onnx and --to hf can export it"
        )
    # LoRA's merged deltas were folded into the pairs when the module was written.
    plain = replace(spec, kind="full", last_blocks=0, merged=False)
    weights = module.initial(backbone, plain, seed=0)
    weights |= {n: t for n, t in tensors.items() if n in weights}
    for name in [n for n in tensors if n.endswith(_A)]:
        layer = name.removesuffix(_A)
        b, a = tensors[f"{layer}{_B}"].astype(np.float64), tensors[name].astype(np.float64)
        weight = weights[f"{layer}.weight"]
        weights[f"{layer}.weight"] = (weight + spec.scale * (b @ a)).astype(np.float32)
    return whole_model(backbone, plain, weights)


def save_merged(folder: Path, backbone: Backbone, spec: ModuleSpec, model: SplitModel) -> None:
    """Write config.json and model.safetensors, as `AutoModelFor...Classification.from_pretrained` reads them."""
    plain: Any = model.part.model
    names = dict(enumerate(spec.classes))
    plain.config.id2label, plain.config.label2id = names, {n: i for i, n in names.items()}
    plain.config.problem_type = (
        "single_label_classification" if spec.numbers is None else "regression"
    )
    plain.config.architectures = [backbone.family.model_class]
    if backbone.family.causal:
        # transformers' class finds a text's last token by this id.
        plain.config.pad_token_id = read_tokenizer(backbone.path).pad_token_id
    plain.save_pretrained(folder)

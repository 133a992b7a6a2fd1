"""The module of a task: the small tensors that are trained around the backbone, of one of five kinds.

A module is a flat dict of fp32 arrays by the whole model's names ("vit.layers.0.attention.q_proj.lora_A.weight",
"classifier.weight"). `spec` says what it is made of; `names` which tensors that gives and whose they are at a
cut; `start` where they begin; `attach` puts them on a part and moves values in and out; `lora` is PEFT's share
of that; `packing` makes bytes for an encoder host; `export` writes files. Callers import from here.
"""

from __future__ import annotations

from fedsplit.model.module.attach import (
    attach,
    freeze_classifier,
    freeze_head,
    load,
    parameters,
    read,
    train_only,
)
from fedsplit.model.module.export import (
    WantedBackbone,
    export,
    fold_merged,
    load_exported,
    load_inputs,
    wanted_backbone,
)
from fedsplit.model.module.names import (
    check_spec,
    depth,
    device_names,
    final_linear,
    server_names,
    shapes,
    spec_faults,
    trained_names,
    trains,
)
from fedsplit.model.module.packing import pack, unpack
from fedsplit.model.module.spec import KINDS, ModuleKind, ModuleSpec, ModuleTensors
from fedsplit.model.module.start import initial

__all__ = [
    "KINDS",
    "ModuleKind",
    "ModuleSpec",
    "ModuleTensors",
    "WantedBackbone",
    "attach",
    "check_spec",
    "depth",
    "device_names",
    "export",
    "final_linear",
    "fold_merged",
    "freeze_classifier",
    "freeze_head",
    "initial",
    "load",
    "load_exported",
    "load_inputs",
    "pack",
    "parameters",
    "read",
    "server_names",
    "shapes",
    "spec_faults",
    "train_only",
    "trained_names",
    "trains",
    "unpack",
    "wanted_backbone",
]

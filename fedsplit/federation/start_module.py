"""A run's start from an earlier run's trained module. Called by server.py."""

from __future__ import annotations

from pathlib import Path

from fedsplit.core.errors import ConfigError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec, ModuleTensors


def start_from(
    folder: Path, backbone: Backbone, spec: ModuleSpec, fresh: ModuleTensors
) -> ModuleTensors:
    """The fresh module with every tensor of the earlier one that fits it; a classifier only for the same classes.

    Raises ConfigError where the folder holds no module, or one of another backbone or kind.
    """
    earlier, tensors = module.load_exported(folder, backbone)
    if earlier.kind != spec.kind:
        raise ConfigError(
            f"start-module={folder} holds module={earlier.kind}, the run trains module={spec.kind}; use the "
            f"same kind"
        )
    same_classes = earlier.classes == spec.classes
    taken = {
        name: value
        for name, value in tensors.items()
        if name in fresh
        and value.shape == fresh[name].shape
        and (same_classes or name.split(".", 1)[0] not in backbone.family.classifier)
    }
    backbone_names = {n for n in fresh if n.split(".", 1)[0] not in backbone.family.classifier}
    if missing := sorted(backbone_names - taken.keys()):
        raise ConfigError(
            f"start-module={folder} lacks {missing[0]} at shape {fresh[missing[0]].shape} ({len(missing)} "
            f"tensors in all); use the rank, targets and sizes that it was trained with"
        )
    return fresh | taken

"""Which tensors a module has, what shape they are, and who holds and trains them at a cut.

All names are the whole model's. `depth` orders them along the model, and every question of "whose?" is a
comparison of depths with the cut. Costs no memory for weights; shapes are remembered per backbone and spec.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from fedsplit.core.cut import Cut
from fedsplit.core.errors import ConfigError
from fedsplit.model.backbone import Backbone
from fedsplit.model.families import Family
from fedsplit.model.layers import DOWN, MERGED, PROMPT, UP
from fedsplit.model.module.spec import MAX_TOKENS, ModuleSpec

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer; here of the blocks alone."""

Shapes = dict[str, tuple[int, ...]]


def depth(backbone: Backbone, name: str) -> int:
    """Where a tensor stands: -1 embeddings and prompt, i block i, L norm and pooling, L + 1 classifier."""
    family, blocks = backbone.family, backbone.blocks
    top, _, rest = name.partition(".")
    if top in family.classifier:
        return blocks + 1
    if rest.startswith((f"{family.embeddings}.", f"{PROMPT}.")):
        return -1
    if rest.startswith(f"{family.blocks}."):
        return int(rest.removeprefix(f"{family.blocks}.").partition(".")[0])
    return blocks


def device_names(backbone: Backbone, spec: ModuleSpec, cut: Cut) -> set[str]:
    """The module tensors that a device at `cut` holds."""
    return set(shapes(backbone, spec)) - server_names(backbone, spec, cut)


def server_names(backbone: Backbone, spec: ModuleSpec, cut: Cut | None = None) -> set[str]:
    """The module tensors that run on the server at `cut`; without one, all that a host may need for any cut."""
    first, last = (0, backbone.blocks) if cut is None else (cut.a, cut.b - 1)
    if cut is not None and cut.pooled(backbone.blocks):
        last = backbone.blocks
    return {n for n in shapes(backbone, spec) if first <= depth(backbone, n) <= last}


def trained_names(
    backbone: Backbone, spec: ModuleSpec, cut: Cut, *, head: bool, classifier: bool = True
) -> set[str]:
    """The module tensors that a device at `cut` trains.

    Without `head`, those of the tail alone: a prompt and a full module's embeddings are the head's. Without
    `classifier`, all but it. Merged deltas never train.
    """
    top = backbone.blocks + 1
    return {
        name
        for name in device_names(backbone, spec, cut)
        if trains(name)
        and (head or depth(backbone, name) >= cut.b)
        and (classifier or depth(backbone, name) < top)
    }


def trains(name: str) -> bool:
    """Can this tensor train at all?"""
    return f".{MERGED}." not in name


def shapes(backbone: Backbone, spec: ModuleSpec) -> Shapes:
    """Names and shapes of the whole module. Raises ConfigError when the spec does not fit the backbone."""
    return dict(_shapes(backbone, spec, backbone.config_json))


def check_spec(backbone: Backbone, spec: ModuleSpec) -> None:
    """Raise one ConfigError that lists all that does not fit the backbone."""
    shapes(backbone, spec)


@functools.lru_cache(maxsize=64)
def _shapes(backbone: Backbone, spec: ModuleSpec, _config: str) -> Shapes:
    skeleton: Any = backbone.skeleton(len(spec.classes))
    if faults := spec_faults(backbone, spec, skeleton):
        raise ConfigError("\n  - ".join(faults))
    make = {"lora": _lora, "prompt": _prompt, "adapter": _adapter, "full": _full}
    found = make[spec.kind](backbone, spec, skeleton) if spec.kind in make else {}
    for top in backbone.family.classifier:
        for name, parameter in skeleton.get_submodule(top).named_parameters():
            found[f"{top}.{name}"] = tuple(parameter.shape)
    return found


def _lora(backbone: Backbone, spec: ModuleSpec, skeleton: nn.Module) -> Shapes:
    found: Shapes = {}
    for name, layer in lora_layers(skeleton, backbone, spec).items():
        found[f"{name}.lora_A.weight"] = (spec.rank, layer.in_features)
        found[f"{name}.lora_B.weight"] = (layer.out_features, spec.rank)
        if spec.merged:
            found[f"{name}.{MERGED}.weight"] = (layer.out_features, layer.in_features)
    return found


def _prompt(backbone: Backbone, spec: ModuleSpec, _: nn.Module) -> Shapes:
    base, shape = backbone.family.base, (spec.prompt_tokens, backbone.width)
    blocks = [
        f"{base}.{backbone.family.blocks}.{i}.{PROMPT}.weight"
        for i in prompted_blocks(backbone, spec)
    ]
    return dict.fromkeys([f"{base}.{PROMPT}.weight", *blocks], shape)


def _adapter(backbone: Backbone, spec: ModuleSpec, _: nn.Module) -> Shapes:
    found: Shapes = {}
    for i in module_blocks(backbone, spec):
        block = f"{backbone.family.base}.{backbone.family.blocks}.{i}"
        found[f"{block}.{DOWN}.weight"] = (spec.adapter_width, backbone.width)
        found[f"{block}.{DOWN}.bias"] = (spec.adapter_width,)
        found[f"{block}.{UP}.weight"] = (backbone.width, spec.adapter_width)
        found[f"{block}.{UP}.bias"] = (backbone.width,)
    return found


def _full(backbone: Backbone, spec: ModuleSpec, skeleton: nn.Module) -> Shapes:
    lowest = full_from(backbone, spec)
    return {
        n: tuple(p.shape)
        for n, p in skeleton.named_parameters()
        if n not in backbone.family.idle and depth(backbone, n) >= lowest
    }


def full_from(backbone: Backbone, spec: ModuleSpec) -> int:
    """The depth at which a full module begins: with all of the last blocks, or with the embeddings."""
    return backbone.blocks - spec.last_blocks if spec.last_blocks else -1


def module_blocks(backbone: Backbone, spec: ModuleSpec) -> range:
    """The blocks that get LoRA or adapters."""
    return range(backbone.blocks - (spec.last_blocks or backbone.blocks), backbone.blocks)


def prompted_blocks(backbone: Backbone, spec: ModuleSpec) -> range:
    """The blocks that get prompt tokens of their own: none, or all but the first, to which those of the embeddings come."""
    return range(1, backbone.blocks if spec.deep_prompt else 1)


def lora_layers(model: nn.Module, backbone: Backbone, spec: ModuleSpec) -> dict[str, nn.Linear]:
    """The linear layers that get LoRA. Raises ConfigError when a target is not there."""
    linear, missing = _targets(model, backbone.family, spec)
    if missing:
        raise ConfigError(missing)
    wanted = set(module_blocks(backbone, spec))
    return {n: m for n, m in linear.items() if depth(backbone, n) in wanted}


def _targets(
    model: nn.Module, family: Family, spec: ModuleSpec
) -> tuple[dict[str, nn.Linear], str]:
    """The target layers of all blocks, and what is wrong with the targets."""
    root = f"{family.base}.{family.blocks}."
    linear = {
        n: m for n, m in model.named_modules() if n.startswith(root) and isinstance(m, nn.Linear)
    }
    if spec.targets == (ALL_LINEAR,):
        return linear, ""
    targets = spec.targets or family.lora_targets
    if missing := [t for t in targets if not any(n.endswith(f".{t}") for n in linear)]:
        offered = sorted({n.rsplit(".", 1)[1] for n in linear})
        return {}, (
            f"lora-targets: no linear layer {missing[0][:100]!r} in the blocks of family "
            f"{family.model_type!r}; there are {', '.join(offered)}, or {ALL_LINEAR} by itself for all of them"
        )
    return {n: m for n, m in linear.items() if any(n.endswith(f".{t}") for t in targets)}, ""


def spec_faults(
    backbone: Backbone, spec: ModuleSpec, skeleton: nn.Module | None = None
) -> list[str]:
    """All that keeps the spec from fitting the backbone, one sentence each; empty when it fits."""
    faults = _block_faults(backbone, spec)
    if spec.kind == "lora":
        faults += _lora_faults(backbone, spec, skeleton or backbone.skeleton(1))
    if spec.kind == "prompt":
        faults += _prompt_faults(backbone.family, spec)
    if spec.kind == "adapter" and spec.adapter_width < 1:
        faults.append(
            f"adapter-width={spec.adapter_width} is no width; 1 or more is wanted: raise adapter-width"
        )
    return faults


def _block_faults(backbone: Backbone, spec: ModuleSpec) -> list[str]:
    if not 0 <= spec.last_blocks <= backbone.blocks:
        return [
            f"module-blocks={spec.last_blocks} does not fit the backbone: it has {backbone.blocks} blocks, so "
            f"0 (all) to {backbone.blocks} is wanted"
        ]
    if spec.last_blocks and spec.kind not in {"lora", "adapter", "full"}:
        return [
            f"module-blocks={spec.last_blocks} is for module=lora, adapter or full, not for module={spec.kind}; "
            f"leave it 0"
        ]
    return []


def _lora_faults(backbone: Backbone, spec: ModuleSpec, skeleton: nn.Module) -> list[str]:
    linear, missing = _targets(skeleton, backbone.family, spec)
    faults = [missing] if missing else []
    if not 1 <= spec.rank <= spec.max_rank:
        faults.append(
            f"lora-ranks: a site's rank {spec.rank} is not from 1 to lora-rank={spec.max_rank}; lower it or "
            f"raise lora-rank"
        )
    widths = {n: min(m.in_features, m.out_features) for n, m in linear.items()}
    # Layers may differ in width (grouped keys and values): a pair that is larger than some of them does no harm.
    if widths and spec.rank > max(widths.values()):
        name = max(widths, key=lambda n: widths[n])
        faults.append(
            f"lora-rank={spec.rank} is above the width of {name}, {widths[name]}; a rank of at most that is "
            f"wanted: lower lora-rank"
        )
    return faults


def _prompt_faults(family: Family, spec: ModuleSpec) -> list[str]:
    faults = []
    if not family.prompts:
        faults.append(
            f"module=prompt: family {family.model_type!r} takes no prompt tokens; use module=lora or adapter"
        )
    if not 1 <= spec.prompt_tokens <= MAX_TOKENS:
        faults.append(
            f"prompt-tokens={spec.prompt_tokens} is no number of tokens; 1 to {MAX_TOKENS} is wanted"
        )
    return faults


def final_linear(backbone: Backbone, spec: ModuleSpec) -> tuple[str, str]:  # noqa: ARG001
    """(weight [C, F], bias [C]): names of the linear layer that makes the logits of `Ends.features`.

    Some families have no such bias; then no module has a tensor of the second name.
    """
    last = backbone.family.final_linear
    return f"{last}.weight", f"{last}.bias"

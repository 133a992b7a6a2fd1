"""What a module is made of: `ModuleSpec`, and its form in files and messages, checked when it is read.

Knows no backbone; whether a spec fits one is `names.check_spec`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.config import ModuleSection
from fedsplit.core.scores import Scale

ModuleTensors = dict[str, NDArray[np.float32]]
ModuleKind = Literal["lora", "prompt", "adapter", "classifier", "full"]
KINDS: tuple[ModuleKind, ...] = get_args(ModuleKind)
MAX_RANK, MAX_TOKENS, MAX_WIDTH, MAX_BLOCKS = 1024, 1024, 65_536, 10_000
# Far above any sane alpha; alpha / rank must stay a float.
MAX_ALPHA = 2**20


@dataclass(frozen=True, kw_only=True)
class ModuleSpec:
    """What the module of a task is made of. Every kind includes the classifier."""

    classes: tuple[str, ...]
    kind: ModuleKind = "lora"
    """lora | prompt | adapter | classifier (that alone) | full (every weight of the backbone, or of its last blocks)."""
    rank: int = 8
    """Rank of LoRA's pair: at a site its own, in what the server publishes the largest."""
    max_rank: int = 0
    """Largest rank of the run; LoRA's output is scaled by alpha / max_rank at every site. 0: `rank`."""
    alpha: int = 16
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get LoRA; empty: the family's query and value."""
    merged: bool = False
    """Does LoRA come with dense deltas of its layers that never train (FLoRA's merged products)?"""
    prompt_tokens: int = 8
    """Learnable tokens after the first one."""
    deep_prompt: bool = False
    """Does a prompt have tokens for every block, not for the first one alone?"""
    adapter_width: int = 16
    """m, the width of an adapter's bottleneck."""
    last_blocks: int = 0
    """LoRA, adapters or all weights of this many last blocks only, and what follows them; 0: of all, a full module with the embeddings."""
    numbers: Scale | None = None
    """What its one output is in, where it predicts numbers; None: its outputs are classes."""

    def __post_init__(self) -> None:
        if not self.max_rank:
            object.__setattr__(self, "max_rank", self.rank)

    @property
    def scale(self) -> float:
        """Factor on LoRA's product: the same for every rank, so that a low one is a high one zero-padded."""
        return self.alpha / self.max_rank

    @property
    def lora(self) -> bool:
        """Is LoRA a part of it?"""
        return self.kind == "lora"

    @property
    def prompts(self) -> int:
        """Tokens that this module puts in: `prompt_tokens` of a prompt, else 0."""
        return self.prompt_tokens if self.kind == "prompt" else 0

    @classmethod
    def of(
        cls,
        section: ModuleSection,
        classes: tuple[str, ...],
        rank: int | None = None,
        numbers: Scale | None = None,
    ) -> ModuleSpec:
        """The module that a run's section asks for; `rank` is a site's own where it is not the run's."""
        return cls(
            classes=classes,
            numbers=numbers,
            kind=section.kind,
            rank=rank or section.lora_rank,
            max_rank=section.lora_rank,
            alpha=section.lora_alpha,
            targets=tuple(t.strip() for t in section.lora_targets.split(",") if t.strip()),
            merged=section.kind == "lora" and section.lora_aggregation == "flora",
            prompt_tokens=section.prompt_tokens,
            deep_prompt=section.prompt_depth == "all",
            adapter_width=section.adapter_width,
            last_blocks=section.module_blocks,
        )


# What is said of labels stays out: an encoder host has no business with it.
_ABOUT = tuple(f.name for f in fields(ModuleSpec) if f.name not in ("classes", "numbers"))
_RANGES = {
    "alpha": (1, MAX_ALPHA),
    "prompt_tokens": (1, MAX_TOKENS),
    "adapter_width": (1, MAX_WIDTH),
    "last_blocks": (0, MAX_BLOCKS),
}


def about(spec: ModuleSpec) -> dict[str, Any]:
    """All of a spec but what it says of labels, ready for JSON."""
    return {k: v for k, v in asdict(spec).items() if k in _ABOUT}


def read_about(
    raw: Any,
    *,
    classes: tuple[str, ...] = ("?",),
    numbers: Scale | None = None,
    max_rank: int = MAX_RANK,
) -> ModuleSpec:
    """The inverse of `about`. Raises ValueError on anything that it does not make, or a rank above `max_rank`."""
    if not isinstance(raw, Mapping) or set(raw) != set(_ABOUT):
        raise ValueError(f"exactly the fields {', '.join(_ABOUT)} are wanted")
    # `type`, for True is an int to isinstance.
    ranges = _RANGES | {"rank": (1, max_rank), "max_rank": (1, max_rank)}
    bad = [
        name
        for name, (low, high) in ranges.items()
        if type(raw[name]) is not int or not low <= raw[name] <= high
    ]
    if type(raw["kind"]) is not str or raw["kind"] not in KINDS:
        bad.append("kind")
    bad += [name for name in ("merged", "deep_prompt") if type(raw[name]) is not bool]
    if type(raw["targets"]) is not list or not all(type(t) is str for t in raw["targets"]):
        bad.append("targets")
    if not bad and raw["rank"] > raw["max_rank"]:
        bad.append("rank")
    if bad:
        raise ValueError(f"{', '.join(bad)} is out of range")
    about_it = {**raw, "targets": tuple(raw["targets"])}
    return ModuleSpec(classes=classes, numbers=numbers, **about_it)

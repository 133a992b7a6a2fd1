"""What the module is made of: its kind, LoRA, prompts, adapters, and the classifier's start."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from fedsplit.core.config.section import Check, Section


class ModuleSection(Section):
    """What the module is made of."""

    kind: Literal["lora", "prompt", "adapter", "classifier", "full"] = Field(
        default="lora", alias="module"
    )
    """What trains besides the classifier: LoRA, prompt tokens, adapters, nothing, or all weights."""
    module_blocks: int = Field(default=0, ge=0)
    """How many of the last blocks get LoRA, adapters or trained weights; 0: all blocks, and with all weights the embeddings too."""
    lora_rank: int = Field(default=8, ge=1, le=1024)
    """Rank of LoRA's two matrices."""
    lora_alpha: int = Field(default=16, ge=1, le=2**20)
    """LoRA's output is scaled by lora-alpha / lora-rank."""
    lora_targets: str = ""
    """Comma-separated names of the linear layers that get LoRA, or all-linear; empty: query and value."""
    lora_ranks: str = ""
    """Ranks "4;8;16", dealt to the sites in turn, at most lora-rank; empty: lora-rank for all."""
    lora_aggregation: Literal[
        "plain", "ffa", "rolora", "flexlora", "flora", "lora-fair", "hetlora"
    ] = "plain"
    """How the sites' LoRA modules become one."""
    rank_pruning: float = Field(default=1.0, gt=0, le=1)
    """HetLoRA: the share of its rank that a site keeps after training has shrunk the other components; 1: always all."""
    prompt_tokens: int = Field(default=8, ge=1, le=1024)
    """Number of tokens of module=prompt."""
    prompt_depth: Literal["first", "all"] = "first"
    """Where module=prompt puts tokens: before the first block only, or new tokens before every block (VPT-deep)."""
    adapter_width: int = Field(default=16, ge=1, le=4096)
    """Inner width of module=adapter."""
    classifier_init: Literal["auto", "zero", "class-means", "ridge"] = "auto"
    """The classifier's start: zero, or in closed form from summed statistics of frozen features. auto: the method's own start, else ridge, but zero with a start-module or a robust-rule."""
    ridge_lambda: float = Field(default=100.0, gt=0, allow_inf_nan=False)
    """Regularisation of classifier-init=ridge, in units of the features' mean variance."""
    calibrate: bool = True
    """Scale a closed-form classifier by a temperature, found on held-out samples of the sites."""
    classifier_training: Literal["trained", "fixed"] = "trained"
    """fixed keeps the classifier as it started."""

    @field_validator("lora_ranks")
    @classmethod
    def _check_ranks(cls, value: str) -> str:
        parts = [part.strip() for part in value.split(";")] if value else []
        if any(not (p.isascii() and p.isdigit() and 0 < len(p) < 5 and int(p)) for p in parts):
            raise ValueError(f"lora-ranks {value[:100]!r} are not ranks; use e.g. 4;8;16")
        return value

    def contradictions(self) -> list[Check]:
        """Settings of this section that cannot go together."""
        lora, aggregation = self.kind == "lora", self.lora_aggregation
        return [
            (
                max(self.ranks) > self.lora_rank,
                f"lora-ranks={self.lora_ranks}: {max(self.ranks)} is more than lora-rank={self.lora_rank}, the largest; "
                f"raise lora-rank",
            ),
            (
                bool(self.lora_ranks) and not lora,
                f"lora-ranks={self.lora_ranks} are for module=lora, not module={self.kind}",
            ),
            (
                aggregation != "plain" and not lora,
                f"lora-aggregation={aggregation} is for module=lora, not module={self.kind}",
            ),
            (
                self.rank_pruning < 1 and aggregation != "hetlora",
                f"rank-pruning={self.rank_pruning:g} is for lora-aggregation=hetlora, not {aggregation}",
            ),
            (
                self.prompt_depth != "first" and self.kind != "prompt",
                f"prompt-depth={self.prompt_depth} is for module=prompt, not module={self.kind}",
            ),
            (
                self.module_blocks > 0 and self.kind not in ("lora", "adapter", "full"),
                f"module-blocks={self.module_blocks} is for module=lora, adapter or full, not module={self.kind}",
            ),
        ]

    @property
    def classifier_start(self) -> Literal["zero", "class-means", "ridge"]:
        """How the classifier starts; `from_flat` has settled an auto already."""
        return "ridge" if self.classifier_init == "auto" else self.classifier_init

    @property
    def ranks(self) -> tuple[int, ...]:
        """The LoRA ranks that are dealt to the sites in turn."""
        return tuple(int(r) for r in self.lora_ranks.split(";") if r) or (self.lora_rank,)

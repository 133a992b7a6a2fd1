"""Where embeddings, blocks, norm and pooling live in each family of backbones, and what a block takes.

Adding a family is one `Family(...)` entry below. Names are attribute paths inside transformers' own
classification model, so that every tensor keeps the whole model's name. Shapes: B batch, T tokens,
D width, P width of the pooled features, F width of what enters the last linear layer, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedsplit.core.errors import BackboneError

InputKind = Literal["image", "text"]
LAYER_TYPES = FULL, SLIDING = "full_attention", "sliding_attention"
"""The types of blocks that transformers' `layer_types` may name here: a token sees all others, or those near it."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one `model_type` of transformers is laid out."""

    model_type: str
    kind: InputKind
    model_class: str
    """The whole model: transformers' classification class."""
    base: str
    """Attribute of the whole model that holds the backbone."""
    blocks: str
    """Path of the block list under `base`. A block takes hidden states, `attention_mask`, and what the next four say."""
    causal: bool = False
    """Does a token see only itself and the tokens before it? False: it sees both sides."""
    layer_types: bool = False
    """Do blocks differ by `layer_types` of config.json? Then each type has a mask and rotary tables of its own."""
    rotary: str = ""
    """Attribute of the backbone that makes `position_embeddings` of positions; empty: positions are in the embeddings."""
    block_kwargs: tuple[tuple[str, Any], ...] = ()
    """Further arguments of every block, such as that it keeps no cache."""
    lora_targets: tuple[str, ...]
    """The linear layers of a block that get LoRA by default: query and value."""
    pool: Callable[[Any, Tensor, Tensor | None], Tensor]
    """(backbone, last hidden [B, T, D], mask [B, T] or None) -> pooled features [B, P]; includes the final norm."""
    pool_modules: tuple[str, ...] = ()
    """Submodules of the backbone that `pool` uses."""
    pool_factor: int = 1
    """P / D."""
    classifier: tuple[str, ...] = ("classifier",)
    """Top-level submodules that make logits of pooled features; they train with the module."""
    features: Callable[[Any, Tensor], Tensor] = lambda model, pooled: pooled  # noqa: ARG005
    """(whole model, pooled features [B, P]) -> what enters the last linear layer, [B, F]."""
    final_linear: str = "classifier"
    """Path of the linear layer that makes the logits."""
    prompts: bool = True
    """May prompt tokens stand between the first token and the others?"""
    stored: tuple[str, ...] = ()
    """Those of `classifier` that a checkpoint may hold trained; where it does, they start from it."""
    idle: tuple[str, ...] = ()
    """Parameters that classification never uses; a full module leaves them out."""
    embed_kwargs: tuple[tuple[str, Any], ...] = ()
    """Extra arguments of the embeddings' forward."""
    embeddings: str = "embeddings"
    processor: str = "ViTImageProcessor"
    """transformers' image processor class of a `preprocessor_config.json` that names none."""
    pixels: tuple[tuple[str, Any], ...] = ()
    """How published checkpoints of image models want pictures, for backbones without that file."""


def _norm_first(backbone: Any, h_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:  # noqa: ARG001
    first_BD: Tensor = backbone.layernorm(h_BTD)[:, 0, :]
    return first_BD


def _norm_first_and_mean(backbone: Any, h_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:  # noqa: ARG001
    h_BTD = backbone.layernorm(h_BTD)
    return torch.cat([h_BTD[:, 0], h_BTD[:, 1:].mean(dim=1)], dim=1)


def _first(backbone: Any, h_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:  # noqa: ARG001
    return h_BTD[:, 0]


def _pooler(backbone: Any, h_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:  # noqa: ARG001
    pooled: Tensor = backbone.pooler(h_BTD)
    return pooled


def _norm_first_or_mean(backbone: Any, h_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    h_BTD = backbone.final_norm(h_BTD)
    if backbone.config.classifier_pooling == "cls":
        return h_BTD[:, 0]
    mask_BT = h_BTD.new_ones(h_BTD.shape[:2], dtype=torch.bool) if mask_BT is None else mask_BT
    return (h_BTD * mask_BT.unsqueeze(-1)).sum(dim=1) / mask_BT.sum(dim=1, keepdim=True)


def _norm_last(backbone: Any, h_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The last token that is no padding, wherever the padding is: the one that has seen all others."""
    h_BTD = backbone.norm(h_BTD)
    if mask_BT is None:
        return h_BTD[:, -1]
    batch, tokens = mask_BT.shape
    last_B = (torch.arange(tokens, device=h_BTD.device) * mask_BT).argmax(dim=1)
    return h_BTD[torch.arange(batch, device=h_BTD.device), last_B]


# Dropout, which these classifiers have as well, never acts here.
def _dense_tanh(model: Any, pooled_BP: Tensor) -> Tensor:
    return torch.tanh(model.classifier.dense(pooled_BP))


def _pre_relu(model: Any, pooled_BP: Tensor) -> Tensor:
    return nn.functional.relu(model.pre_classifier(pooled_BP))


def _head(model: Any, pooled_BP: Tensor) -> Tensor:
    features: Tensor = model.head(pooled_BP)
    return features


# interpolate_pos_encoding is the identity at the size a backbone was trained with.
_ANY_SIZE = (("interpolate_pos_encoding", True),)

_HALF = (("resample", 2), ("image_mean", (0.5, 0.5, 0.5)), ("image_std", (0.5, 0.5, 0.5)))
_IMAGENET = (
    ("resample", 3),
    ("image_mean", (0.485, 0.456, 0.406)),
    ("image_std", (0.229, 0.224, 0.225)),
)

_VIT = Family(
    model_type="vit",
    kind="image",
    model_class="ViTForImageClassification",
    base="vit",
    blocks="layers",
    lora_targets=("q_proj", "v_proj"),
    pool=_norm_first,
    pool_modules=("layernorm",),
    embed_kwargs=_ANY_SIZE,
    pixels=_HALF,
)
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        _VIT,
        replace(
            _VIT,
            model_type="deit",
            model_class="DeiTForImageClassification",
            base="deit",
            processor="DeiTImageProcessor",
            pixels=_IMAGENET,
        ),
        Family(
            model_type="dinov2",
            kind="image",
            model_class="Dinov2ForImageClassification",
            base="dinov2",
            blocks="encoder.layer",
            lora_targets=("q_proj", "v_proj"),
            pool=_norm_first_and_mean,
            pool_modules=("layernorm",),
            pool_factor=2,
            idle=("dinov2.embeddings.mask_token",),
            processor="BitImageProcessor",
            pixels=_IMAGENET,
        ),
        Family(
            model_type="bert",
            kind="text",
            model_class="BertForSequenceClassification",
            base="bert",
            blocks="encoder.layer",
            lora_targets=("query", "value"),
            pool=_pooler,
            pool_modules=("pooler",),
        ),
        Family(
            model_type="roberta",
            kind="text",
            model_class="RobertaForSequenceClassification",
            base="roberta",
            blocks="encoder.layer",
            lora_targets=("query", "value"),
            pool=_first,
            features=_dense_tanh,
            final_linear="classifier.out_proj",
        ),
        Family(
            model_type="distilbert",
            kind="text",
            model_class="DistilBertForSequenceClassification",
            base="distilbert",
            blocks="transformer.layer",
            lora_targets=("q_lin", "v_lin"),
            pool=_first,
            classifier=("pre_classifier", "classifier"),
            features=_pre_relu,
        ),
        Family(
            model_type="modernbert",
            kind="text",
            model_class="ModernBertForSequenceClassification",
            base="model",
            blocks="layers",
            layer_types=True,
            rotary="rotary_emb",
            lora_targets=("Wqkv",),
            pool=_norm_first_or_mean,
            pool_modules=("final_norm",),
            classifier=("head", "classifier"),
            stored=("head",),
            features=_head,
        ),
        Family(
            model_type="llama",
            kind="text",
            model_class="LlamaForSequenceClassification",
            base="model",
            embeddings="embed_tokens",
            blocks="layers",
            causal=True,
            rotary="rotary_emb",
            # Nothing is generated, so nothing is kept for later tokens.
            block_kwargs=(("use_cache", False),),
            lora_targets=("q_proj", "v_proj"),
            pool=_norm_last,
            pool_modules=("norm",),
            classifier=("score",),
            final_linear="score",
        ),
    )
}


def family_of(model_type: str, *, where: str) -> Family:
    """The family of a `model_type`. Raises BackboneError that lists the known ones."""
    if model_type not in FAMILIES:
        raise BackboneError(
            f"backbone {where} is of family {model_type!r}, which fedsplit does not know; known "
            f"families: {', '.join(sorted(FAMILIES))}. A new one is an entry in fedsplit/model/families.py"
        )
    return FAMILIES[model_type]

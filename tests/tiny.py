"""Tiny backbones with random weights, one a family, saved as a user would save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_IMAGE = {"image_size": 16, "patch_size": 4, "num_channels": 3}
_SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 48,
}
_TEXT = {"vocab_size": 50, "max_position_embeddings": 40, **_SMALL}
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTConfig", "ViTModel", _IMAGE | _SMALL),
    "deit": ("DeiTConfig", "DeiTModel", _IMAGE | _SMALL),
    "dinov2": ("Dinov2Config", "Dinov2Model", _IMAGE | _SMALL | {"mlp_ratio": 2}),
    "bert": ("BertConfig", "BertModel", _TEXT),
    "roberta": ("RobertaConfig", "RobertaModel", _TEXT),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertModel",
        {
            "vocab_size": 50,
            "max_position_embeddings": 40,
            "dim": 24,
            "n_layers": 4,
            "n_heads": 3,
            "hidden_dim": 48,
        },
    ),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertModel",
        # Blocks 1 and 2 see two tokens to each side; 0 and 3 all.
        _TEXT
        | {"local_attention": 4, "norm_bias": True, "pad_token_id": 1}
        | {"bos_token_id": 2, "eos_token_id": 2, "cls_token_id": 2, "sep_token_id": 2},
    ),
    "llama": ("LlamaConfig", "LlamaModel", _TEXT | {"num_key_value_heads": 1, "pad_token_id": 1}),
}


def save_all(root: Path) -> dict[str, Path]:
    """family -> directory of a tiny backbone with random weights, under `root`."""
    return {family: save(root, family) for family in CONFIGS}


def save(root: Path, family: str, **other: Any) -> Path:
    """The directory of one; `other` settings go over the family's here."""
    config_name, model_name, settings = CONFIGS[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**settings | other)
    model = getattr(transformers, model_name)(config)
    for parameter in model.parameters():
        # Biases and norms start at 0 and 1, which would hide a swapped or forgotten tensor.
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(root / family)
    return root / family

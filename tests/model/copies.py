"""Copies of backbones that a test may damage, and a small tokenizer for those that have none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from fedsplit.model.files import SINGLE

WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "pump",
    "leaks",
    "oil",
    "belt",
    "##s",
    "3",
    "油",
    "ポンプ",
)


def copy_of(source: Path, target: Path, **config: Any) -> Path:
    """A copy; `config` overrides keys of its config.json, None takes a key out."""
    shutil.copytree(source, target)
    if config:
        changed = json.loads((target / "config.json").read_text()) | config
        (target / "config.json").write_text(
            json.dumps({k: v for k, v in changed.items() if v is not None})
        )
    return target


def change_tensors(folder: Path, change: Any) -> None:
    """`change(name, tensor)` gives the tensor that is kept, or None."""
    kept = {n: change(n, t) for n, t in load_file(folder / SINGLE).items()}
    kept = {n: t for n, t in kept.items() if t is not None}
    save_file(kept, folder / SINGLE, metadata={"format": "pt"})


def add_tokenizer(folder: Path, *, words: tuple[str, ...] = WORDS, **settings: Any) -> Path:
    """A WordPiece tokenizer as BERT's, of `words`; `settings` go into tokenizer_config.json."""
    numbers = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.save(str(folder / "tokenizer.json"))
    said = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said | settings))
    return folder

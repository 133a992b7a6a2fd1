"""A text backbone's tokenizer, as its folder has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedsplit.core.errors import BackboneError


def padding_notes(directory: Path, pad_token_id: int | None) -> tuple[str, ...]:
    """What a model that reads a text's last token makes otherwise than transformers' class, a sentence each.

    That class takes the last id that is not config.json's `pad_token_id`; fedsplit goes by the mask. Raises BackboneError.
    """
    tokenizer = read_tokenizer(directory)
    notes = []
    if pad_token_id != tokenizer.pad_token_id:
        notes.append(
            f"config.json has pad_token_id {pad_token_id}, the tokenizer pads with {tokenizer.pad_token_id}: set "
            f"pad_token_id to {tokenizer.pad_token_id} before transformers' own class reads batches"
        )
    if tokenizer("a")["input_ids"][-1:] == [tokenizer.pad_token_id]:
        notes.append(
            "the tokenizer ends each text with its padding token: fedsplit classifies by that token, transformers' own "
            "class by the one before it; give the tokenizer a pad_token that is nothing else"
        )
    return tuple(notes)


def read_tokenizer(directory: Path) -> Any:
    """Load the directory's tokenizer; code that lies there is never run. Raises BackboneError."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, RecursionError) as err:
        reason = " ".join(str(err).split())[:300]
        raise BackboneError(
            f"{directory}: its tokenizer cannot be loaded ({reason}); "
            "a text backbone needs its tokenizer files beside config.json, and fedsplit never runs code from a "
            "backbone's folder"
        ) from err
    # Without its files transformers builds a tokenizer that knows nothing: every word is [UNK].
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise BackboneError(
            f"{directory}: its tokenizer has no words; put tokenizer.json or the vocabulary beside config.json"
        )
    if tokenizer.pad_token_id is None:
        raise BackboneError(
            f"{directory}: its tokenizer has no padding token; set pad_token in tokenizer_config.json"
        )
    return tokenizer

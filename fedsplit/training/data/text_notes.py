"""What a tokenizer makes of a source's texts: how many are cut, and how much of them it does not know.

Told at roll call and by `fedsplit data`, not at each message: all texts are tokenised for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsplit.training.data.examples import Examples
from fedsplit.training.data.transform import TextTransform

MOST = 20_000
"""Texts that are looked at: beyond that a fixed random choice of so many."""
MUCH_UNKNOWN = 0.05
_PIECE = 512


@dataclass(frozen=True)
class TextFacts:
    """Lengths in tokens, as the tokenizer would have them without a limit, and what is unknown."""

    looked_at: int
    lengths: tuple[int, int, int]
    """Least, median and largest."""
    cut: int
    """Texts of those looked at that are longer than the limit."""
    limit: int
    unknown: float
    """Share of all tokens that the tokenizer's vocabulary does not have; 0 where it has all bytes."""


def text_facts(examples: Examples, transform: TextTransform) -> TextFacts:
    """Tokenise the texts without a limit."""
    chosen = np.arange(len(examples))
    if len(chosen) > MOST:
        chosen = np.sort(np.random.default_rng(0).permutation(chosen)[:MOST])
    unknown_id, special = transform.tokenizer.unk_token_id, set(transform.tokenizer.all_special_ids)
    lengths: list[int] = []
    unknown = known = 0
    for start in range(0, len(chosen), _PIECE):
        texts = [examples.text(int(i)) for i in chosen[start : start + _PIECE]]
        for ids in transform.tokenizer(texts, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]:
            lengths.append(len(ids))
            count = ids.count(unknown_id) if unknown_id is not None else 0
            unknown += count
            known += sum(i not in special for i in ids)
    ordered = sorted(lengths)
    return TextFacts(
        looked_at=len(lengths),
        lengths=(ordered[0], ordered[len(ordered) // 2], ordered[-1]),
        cut=sum(length > transform.max_length for length in lengths),
        limit=transform.max_length,
        unknown=unknown / max(1, unknown + known),
    )


def text_notes(facts: TextFacts, total: int) -> list[str]:
    """The facts that a person should know before training."""
    notes = []
    of = f"{facts.looked_at} texts" + (
        f" looked at, of {total}," if facts.looked_at < total else ""
    )
    if facts.cut:
        notes.append(
            f"{facts.cut} of {of} are longer than {facts.limit} tokens and are cut there (max-length, or what the backbone can "
            f"take)"
        )
    if facts.unknown > MUCH_UNKNOWN:
        notes.append(
            f"{100 * facts.unknown:.0f} % of the tokens are unknown to the backbone's tokenizer: it was made for another "
            f"language or field, and the model sees little of these texts; use a backbone that knows them"
        )
    return notes

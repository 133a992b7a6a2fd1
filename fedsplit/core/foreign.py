"""Text of others made fit to be shown: sites' names, errors of peers, class names, headers of tokens.

Every edge at which foreign text enters a log, a terminal, a record or an error calls `printable` once. What comes
out has no control characters (a terminal obeys them, a log reader trusts line ends), can be encoded, and is short.
"""

from __future__ import annotations

MAX_CHARS = 500
# Direction marks turn a line round, separators break it, both without being control characters.
_UNSAFE = frozenset("\u2028\u2029\u200e\u200f\u061c\ufeff") | {
    chr(c) for span in (range(0x202A, 0x202F), range(0x2066, 0x206A)) for c in span
}


def printable(text: object, *, limit: int = MAX_CHARS) -> str:
    """`text` on one line, at most `limit` characters: what is not printable is written as an escape."""
    # Cut before the work, for escapes only make it longer.
    raw = str(text)[: limit + 1]
    out = "".join(c if c.isprintable() and c not in _UNSAFE else _escaped(c) for c in raw)
    return out if len(out) <= limit else out[: limit - 1] + "…"


def _escaped(char: str) -> str:
    if char in "\n\r\t":
        return " "
    return char.encode("unicode_escape").decode("ascii")

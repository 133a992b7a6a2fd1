"""Foreign text becomes one short line that a terminal does not obey."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedsplit.core.foreign import MAX_CHARS, printable


@given(st.text(alphabet=st.characters(), max_size=2000), st.integers(1, 600))
def test_any_text_is_short_and_safe(text: str, limit: int) -> None:
    shown = printable(text, limit=limit)
    assert len(shown) <= limit
    assert shown.isprintable()
    shown.encode("utf-8")


def test_ordinary_text_stays_as_it_is() -> None:
    assert printable("検査ライン A: 98.1 %") == "検査ライン A: 98.1 %"


def test_escape_sequences_are_told_and_not_obeyed() -> None:
    assert printable("a\x1b[2Jb\nc\u202ed\udc81") == "a\\x1b[2Jb c\\u202ed\\udc81"


def test_a_long_text_is_cut_with_a_mark() -> None:
    assert printable("x" * 10**6) == "x" * (MAX_CHARS - 1) + "…"

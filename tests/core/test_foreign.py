"""Foreign text becomes one short line that a terminal does not obey."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.core.foreign import MAX_CHARS, parse_json, printable, read_json


@given(st.text(alphabet=st.characters(), max_size=2000), st.integers(1, 600))
def test_any_text_is_short_and_safe(text: str, limit: int) -> None:
    shown = printable(text, limit=limit)
    assert len(shown) <= limit
    assert shown.replace("\u3000", "").isprintable()
    shown.encode("utf-8")


def test_ordinary_text_stays_as_it_is() -> None:
    assert printable("検査ライン\u3000A: 98.1 %") == "検査ライン\u3000A: 98.1 %"


def test_escape_sequences_are_told_and_not_obeyed() -> None:
    text = "a\x1b[2Jb\nc\u202ed\udc81\u2028e\u2066"
    assert printable(text) == "a\\x1b[2Jb c\\u202ed\\udc81\\u2028e\\u2066"


def test_a_long_text_is_cut_with_a_mark() -> None:
    assert printable("x" * 10**6) == "x" * (MAX_CHARS - 1) + "…"


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"a":' * 300 + b"1" + b"}" * 300, b"9" * 5000, b"{", b"", b"\xff"]
)
def test_json_that_cannot_be_read_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        parse_json(text)
    assert len(str(caught.value)) < 200


def test_json_files_are_read_no_further_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, 2.5, null, "検"]}', encoding="utf-8")
    assert read_json(path) == {"a": [1, 2.5, None, "検"]}
    with pytest.raises(ValueError, match="at most 5 are looked at"):
        read_json(path, limit=5)

"""Notes keep to the bounds that the wire checks."""

from __future__ import annotations

from fedsplit.core.notes import MAX_NOTE_CHARS, MAX_NOTES, by_reason, fit


def test_each_note_is_told_once_and_safely() -> None:
    assert fit(["a\x1b", "b", "a\x1b"]) == ("a\\x1b", "b")


def test_many_long_notes_are_bounded_and_the_rest_is_counted() -> None:
    told = fit(f"{i} " + "x" * 1000 for i in range(MAX_NOTES + 5))
    assert len(told) == MAX_NOTES
    assert told[-1].startswith("6 more notes")
    assert all(len(note) <= MAX_NOTE_CHARS for note in told)


def test_a_fault_of_many_sites_is_told_once() -> None:
    told = [(f"s{i}", f"site 's{i}': no such folder") for i in range(9)] + [("x", "late")]
    assert by_reason(told) == {"no such folder": [f"s{i}" for i in range(9)], "late": ["x"]}

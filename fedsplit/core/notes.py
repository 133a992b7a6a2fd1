"""Notes: what a site guessed, left out or found odd, told where people look.

Whoever reads data or a backbone adds a sentence; they travel with the roll call's answer, are shown by the command
line and kept in the summary. Both ends hold them to the same bounds.
"""

from __future__ import annotations

from collections.abc import Iterable

from fedsplit.core.foreign import printable

MAX_NOTES = 64
MAX_NOTE_CHARS = 400


def fit(notes: Iterable[str]) -> tuple[str, ...]:
    """The notes, printable and within the bounds, each told once; the last says how many there is no room for."""
    told = list(dict.fromkeys(printable(note, limit=MAX_NOTE_CHARS) for note in notes))
    if len(told) <= MAX_NOTES:
        return tuple(told)
    kept = told[: MAX_NOTES - 1]
    return (*kept, f"{len(told) - len(kept)} more notes are in the site's log only")


def by_reason(told: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """(site, reason) pairs as reason -> sites: what many sites say alike is told once, without its own site's name."""
    found: dict[str, list[str]] = {}
    for site, reason in told:
        found.setdefault(reason.removeprefix(f"site {site!r}: "), []).append(site)
    return found

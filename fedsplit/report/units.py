"""Numbers as people read them: bytes, seconds, shares and factors."""

from __future__ import annotations

from fedsplit.core.intervals import wilson

NONE = "-"
interval = wilson
"""The 95 % interval of a share of n samples."""


def human_bytes(count: float) -> str:
    """12 B, 3.4 kB, 605 kB, 1.18 MB: decimal units, three digits."""
    if abs(count) < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        count /= 1000
        if abs(count) < 999.5 or unit == "TB":
            break
    digits = 2 if abs(count) < 9.995 else 1 if abs(count) < 99.95 else 0
    return f"{count:.{digits}f} {unit}"


def human_seconds(seconds: float) -> str:
    """0.42 s, 3.1 s, 52 s, 4 min 05 s, 2 h 07 min."""
    if seconds < 0.995:
        return f"{seconds:.2f} s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def percent(share: float | None) -> str:
    """84.5 %, or a dash where nothing was measured."""
    return NONE if share is None else f"{100 * share:.1f} %"


def percent_of(share: float | None, n: int) -> str:
    """84.5 % (81-88): an accuracy and its 95 % interval, for `n` samples."""
    if share is None or n < 1:
        return percent(share)
    low, high = interval(share, n)
    return f"{percent(share)} ({100 * low:.0f}-{100 * high:.0f})"


def points(difference: float) -> str:
    """+12.3 points: the difference of two accuracies."""
    return f"{100 * difference:+.1f} points"


def factor_less(count: float, reference: float) -> str:
    """How `count` bytes compare with `reference`: "12x less", "2.3x more", "the same"."""
    if count <= 0 or reference <= 0:
        return "not comparable"
    ratio = reference / count
    word = "less" if ratio >= 1 else "more"
    ratio = max(ratio, 1 / ratio)
    if ratio < 1.05:
        return "about the same"
    return f"{ratio:.1f}x {word}" if ratio < 9.95 else f"{ratio:.0f}x {word}"

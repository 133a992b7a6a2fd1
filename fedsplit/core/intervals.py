"""How sure a share or a difference of shares is: intervals and tests for counts, without SciPy."""

from __future__ import annotations

import math

_Z = 1.959963984540054
"""Of 95 % on both sides of a normal distribution."""


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of `n` samples (Wilson, 1927): what other samples of this size may well give."""
    middle = (share + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
    half = _Z / (1 + _Z * _Z / n) * math.sqrt(share * (1 - share) / n + _Z * _Z / (4 * n * n))
    # At 0 and 1 the sums are off by their last bit; the share is never outside.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def binomial_tail(k: int, n: int, share: float) -> float:
    """P(X <= k) of a binomial X of `n` trials."""
    if k >= n or share <= 0:
        return 1.0
    if share >= 1 or k < 0:
        return 0.0
    rare, often = math.log(share), math.log1p(-share)
    terms = [
        math.lgamma(n + 1)
        - math.lgamma(i + 1)
        - math.lgamma(n - i + 1)
        + i * rare
        + (n - i) * often
        for i in range(k + 1)
    ]
    most = max(terms)
    return min(1.0, math.exp(most) * math.fsum(math.exp(term - most) for term in terms))


def upper_share(k: int, n: int, doubt: float) -> float:
    """The largest share that `k` of `n` leave possible, wrong with probability `doubt` (Clopper and Pearson, 1934)."""
    low, high = k / n if n else 0.0, 1.0
    if k >= n:
        return 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_tail(k, n, middle) > doubt else (low, middle)
    return high


def mcnemar(first_only: int, second_only: int) -> float:
    """Exact two-sided p-value that two judges of the same samples are right equally often (McNemar, 1947).

    `first_only`, `second_only`: samples that only one of them has right.
    """
    n = first_only + second_only
    few = min(first_only, second_only)
    return min(1.0, 2 * binomial_tail(few, n, 0.5))


def paired_difference(
    both: int, first_only: int, second_only: int, none: int
) -> tuple[float, float]:
    """The 95 % interval of (share that the first has right) - (the second's), of the same samples.

    Newcombe's hybrid of Wilson's intervals (Statistics in Medicine 17, 1998, method 10).
    """
    n = both + first_only + second_only + none
    first, second = (both + first_only) / n, (both + second_only) / n
    (low1, high1), (low2, high2) = wilson(first, n), wilson(second, n)
    spread = (both + first_only) * (second_only + none) * (both + second_only) * (first_only + none)
    together = float(both * none - first_only * second_only)
    if together > n / 2:
        together -= n / 2
    elif together >= 0:
        together = 0.0
    phi = together / math.sqrt(spread) if spread else 0.0
    difference = first - second

    def half(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    return (
        max(-1.0, difference - half(first - low1, high2 - second)),
        min(1.0, difference + half(high1 - first, second - low2)),
    )

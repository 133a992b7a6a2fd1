"""What only shows when sites are held side by side: names of classes that look alike, and images of other ranges.

The lines are logged and kept with the sites that they are about.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from fedsplit.core.class_names import look_alikes
from fedsplit.core.foreign import printable
from fedsplit.core.orders import RollCall

_SHOWN = 8


def differences_between(calls: Mapping[str, RollCall]) -> list[tuple[tuple[str, ...], str]]:
    """(sites, what differs between them), a sentence each. Within one site look-alikes are its own note."""
    return [*_alike(calls), *_ranges(calls)]


def _alike(calls: Mapping[str, RollCall]) -> list[tuple[tuple[str, ...], str]]:
    holders: dict[str, list[str]] = defaultdict(list)
    for site, call in calls.items():
        for name in call.classes:
            holders[name].append(site)
    found = []
    for group in look_alikes(holders):
        sites = tuple(dict.fromkeys(site for name in group for site in holders[name]))
        if len(sites) < 2:
            continue
        told = "; ".join(
            f"{printable(name, limit=60)!r} at {_names(holders[name])}" for name in group
        )
        found.append(
            (
                sites,
                f"classes look alike and are trained as different ones: {told}. If they are one, give them one name",
            )
        )
    return found


def _ranges(calls: Mapping[str, RollCall]) -> list[tuple[tuple[str, ...], str]]:
    of: dict[float, list[str]] = defaultdict(list)
    for site, call in calls.items():
        if call.pixel_max:
            of[call.pixel_max].append(site)
    if len(of) < 2:
        return []
    told = "; ".join(f"0 to {white:g} at {_names(sites)}" for white, sites in sorted(of.items()))
    sites = tuple(site for group in of.values() for site in group)
    return [
        (
            sites,
            f"the sites' pixels have different ranges: {told}. If that is not so, set pixel-max at the site",
        )
    ]


def _names(sites: list[str]) -> str:
    more = f" and {len(sites) - _SHOWN} more" if len(sites) > _SHOWN else ""
    return ", ".join(printable(site, limit=60) for site in sites[:_SHOWN]) + more

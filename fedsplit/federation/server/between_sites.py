"""What only shows when sites are held side by side: names of classes that look alike, and images of other ranges.

The lines are logged and kept with the sites that they are about.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from fedsplit.core.class_names import look_alikes
from fedsplit.core.foreign import printable
from fedsplit.core.orders import RollCall

_ANOTHER_UNIT = 30
"""Times that one deviation is another one: metres and feet are 3, metres and millimetres 1,000."""
_SHOWN = 8


def differences_between(calls: Mapping[str, RollCall]) -> list[tuple[tuple[str, ...], str]]:
    """(sites, what differs between them), a sentence each. Within one site look-alikes are its own note."""
    return [*_alike(calls), *_ranges(calls), *_spreads(calls)]


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


def _spreads(calls: Mapping[str, RollCall]) -> list[tuple[tuple[str, ...], str]]:
    """That one site's numbers spread so much wider than another's that the unit may differ."""
    of = {site: call.spread.deviation for site, call in calls.items() if call.spread}
    known = {site: deviation for site, deviation in of.items() if deviation > 0}
    if not known or max(known.values()) < _ANOTHER_UNIT * min(known.values()):
        return []
    wide, narrow = max(known, key=lambda s: known[s]), min(known, key=lambda s: known[s])
    return [
        (
            (wide, narrow),
            f"the sites' numbers spread differently: deviation {known[wide]:g} at {printable(wide, limit=60)}, "
            f"{known[narrow]:g} at {printable(narrow, limit=60)}. If their units differ, use one unit at all sites",
        )
    ]


def _names(sites: list[str]) -> str:
    more = f" and {len(sites) - _SHOWN} more" if len(sites) > _SHOWN else ""
    return ", ".join(printable(site, limit=60) for site in sites[:_SHOWN]) + more

"""What differs between sites is told with their names."""

from __future__ import annotations

from typing import Any

from fedsplit.core.orders import RollCall
from fedsplit.federation.server.between_sites import differences_between


def call(site: str, *classes: str, **more: Any) -> RollCall:
    return RollCall(
        site=site, cut="", classes=classes, samples=2, test_samples=1, backbone_sha256="0" * 64,
        fedsplit_version="0", number=-1, **more,
    )  # fmt: skip


def told(*calls: RollCall) -> list[tuple[tuple[str, ...], str]]:
    return differences_between({c.site: c for c in calls})


def test_sites_that_are_alike_are_not_mentioned() -> None:
    assert told(call("a", "x", "y", pixel_max=255), call("b", "y", pixel_max=255), call("c")) == []


def test_look_alikes_of_several_sites() -> None:
    ((sites, text),) = told(call("a", "Crack", "ok"), call("b", "crack"), call("c", "ok"))
    assert sites == ("a", "b")
    assert "'Crack' at a; 'crack' at b" in text


def test_look_alikes_within_one_site_are_its_own_note() -> None:
    assert told(call("a", "Crack", "crack"), call("b", "ok")) == []


def test_ranges_that_differ() -> None:
    ((sites, text),) = told(
        call("a", pixel_max=4095), call("b", pixel_max=255), call("c", pixel_max=255)
    )
    assert set(sites) == {"a", "b", "c"}
    assert "0 to 255 at b, c; 0 to 4095 at a" in text

"""What is installed is named, and differences are told with both sides."""

from __future__ import annotations

import fedsplit
from fedsplit.core.versions import COMPARED, differences, installed


def test_installed_names_every_library_that_computes() -> None:
    found = installed()
    assert found["fedsplit"] == fedsplit.__version__
    assert all(found[name][0].isdigit() for name in COMPARED)


def test_the_same_differs_in_nothing() -> None:
    assert differences(installed(), installed()) == []


def test_both_sides_are_told() -> None:
    theirs = {name: v for name, v in installed().items() if name != "peft"} | {"torch": "1.0"}
    ours = installed()
    assert differences(theirs, ours) == [
        f"torch 1.0 here, {ours['torch']} at the server",
        f"peft none here, {ours['peft']} at the server",
    ]

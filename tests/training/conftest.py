"""Fixtures of the training tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsplit.model.backbone import Backbone


@pytest.fixture(scope="session")
def vit(tiny: dict[str, Path]) -> Backbone:
    return Backbone.find(str(tiny["vit"]))


@pytest.fixture(scope="session")
def bert(tiny: dict[str, Path]) -> Backbone:
    return Backbone.find(str(tiny["bert"]))

"""Fixtures of the model tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsplit.model.backbone import Backbone


@pytest.fixture
def vit(tiny: dict[str, Path]) -> Backbone:
    return Backbone.find(str(tiny["vit"]))

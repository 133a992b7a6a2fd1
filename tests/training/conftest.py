"""Fixtures of the training tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedsplit.model.backbone import Backbone


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Such small tensors gain nothing from more, and lose much where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_vit(tiny: dict[str, Path]) -> Backbone:
    return Backbone.find(str(tiny["vit"]))


@pytest.fixture(scope="session")
def tiny_bert(tiny: dict[str, Path]) -> Backbone:
    return Backbone.find(str(tiny["bert"]))

"""A control service and a folder of pictures for the tests of a site."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsplit.plant.site.join import Joined, join
from fedsplit.plant.site.wish import Wish

from .server import Control, served


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    with served(tmp_path / "server") as found:
        yield found


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures each of "good" and "傷 deep"; the path has a blank, quotes and Japanese."""
    folder = tmp_path_factory.mktemp("data") / 'line "a" \'s ライン'
    for i in range(12):
        file = folder / ("good", "傷 deep")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    return folder


@pytest.fixture
def joined(control: Control, pictures: Path, tmp_path: Path) -> Callable[..., Joined]:
    """Joins a site at tmp_path/site."""

    def go(**changes: object) -> Joined:
        wish = Wish(
            code=control.code(),
            folder=tmp_path / "site",
            data=f"folder:{pictures}",
            task="inspection",
        )
        return join(Wish(**{**vars(wish), **changes}), lambda _: None)

    return go

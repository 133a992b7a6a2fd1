"""Real files for the data tests, made in tmp_path: images, tables, arrays and model directories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHARED = Path(__file__).parents[3].parent / "shared"


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """A path under ../shared, or a visible skip."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"{path} is not on this machine")
        return path

    return find


def write_image(path: Path, *, shade: int = 100, size: tuple[int, int] = (6, 4)) -> Path:
    """A file whose content depends on `shade`; the format follows the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), shade, dtype=np.uint8)
    pixels[0, 0] = (255, 0, 0)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A folder of two classes with two images each, PNG and JPEG."""
    root = tmp_path / "parts"
    for shade, name in enumerate(["ok/a.png", "ok/b.jpg", "scratch/c.PNG", "scratch/d.jpeg"]):
        write_image(root / name, shade=shade * 50)
    return root


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., Path]:
    """Write arrays to a small npz file."""

    def write(**arrays: object) -> Path:
        path = tmp_path / "set.npz"
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
        return path

    return write

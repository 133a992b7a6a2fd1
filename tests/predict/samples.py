"""Inputs for the tests of predict: a few images and texts of many kinds of files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)


def photos(folder: Path, count: int = 4) -> Path:
    """Images of noise in two levels of folders, one with a Japanese name."""
    for i in range(count):
        path = folder / ("検査", "b/deeper")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(noise).save(path)
    return folder


def ramps(folder: Path) -> dict[str, Path]:
    """One ramp from black to white in many forms that training reads."""
    folder.mkdir(parents=True, exist_ok=True)
    grey = Image.fromarray(np.rint(255 * RAMP).astype(np.uint8))
    deep = np.rint(4095 * RAMP).astype(np.uint16)
    found = {}

    def put(name: str, image: Image.Image, **how: object) -> None:
        found[name] = folder / name
        image.save(folder / name, **how)

    put("grey.png", grey)
    put("rgb.bmp", grey.convert("RGB"))
    put("rgba.png", grey.convert("RGBA"))
    put("palette.gif", grey.convert("P"))
    put("cmyk.jpg", grey.convert("CMYK"), quality=95)
    put("bits12.png", Image.fromarray(deep))
    put("bits12.tif", Image.fromarray(deep))
    turned = grey.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[274] = 6
    put("turned.png", turned, exif=exif)
    return found

"""What is attacked: a backbone and a site's images, with public images that the attacker may learn from.

`digits` needs nothing but the installed packages; `cifar10` what experiments/prepare.py makes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from fedsplit.model.backbone import Backbone
from fedsplit.training.data import Examples, ImageTransform, load_source

Images = NDArray[np.uint8]
DATA = Path(__file__).resolve().parents[1] / "data"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A site to attack. Images are uint8 [N, side, side, 3], as they go into the backbone before normalising."""

    name: str
    backbone: Backbone
    transform: ImageTransform
    site: Examples
    grey: bool
    """All images of the site are grey, which the attacker may guess."""
    public: dict[str, Images]
    """kind -> the attacker's images: another kind than the site's, and the same kind but other images."""


def digits(samples: int, public: int) -> Scene:
    """Scanned digits on the bundled backbone; the attacker has crops of photos, or other digits."""
    backbone = Backbone.find("vit-glyphs")
    transform = ImageTransform.from_backbone(backbone.path)
    examples = load_source("digits", site="site")
    order = np.random.default_rng(0).permutation(len(examples))
    others = examples.subset(order[samples : samples + public])
    side = transform.settings.output[0]
    return Scene(
        name="digits, vit-glyphs",
        backbone=backbone,
        transform=transform,
        site=examples.subset(order[:samples]),
        grey=True,
        public={"photos": photos(public, side), "other digits": _resized(others, transform)},
    )


def cifar10(samples: int, public: int, *, side: int = 64, data: Path = DATA) -> Scene | None:
    """CIFAR-10 on ViT-Tiny; the attacker has coloured digits, or other CIFAR-10 images. None without the files."""
    if not (data / "cifar10.npz").is_file() or not (data / "vit-tiny").is_dir():
        return None
    backbone = Backbone.find(str(data / "vit-tiny"))
    transform = ImageTransform.from_backbone(backbone.path, image_size=side)
    examples = load_source(f"npz:{data / 'cifar10.npz'}", site="site", max_samples=samples + public)
    order = np.random.default_rng(0).permutation(len(examples))
    others = examples.subset(order[samples:])
    return Scene(
        name=f"CIFAR-10 at {side} px, ViT-Tiny",
        backbone=backbone,
        transform=transform,
        site=examples.subset(order[:samples]),
        grey=False,
        public={
            "coloured digits": coloured_digits(public, side),
            "other photos": _resized(others, transform),
        },
    )


def photos(count: int, side: int) -> Images:
    """Random crops of the two photos that come with scikit-learn."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(1)
    whole = [np.asarray(image) for image in load_sample_images().images]
    crops = []
    for i in range(count):
        image, size = whole[i % len(whole)], int(rng.integers(side, 4 * side))
        top = int(rng.integers(image.shape[0] - size))
        left = int(rng.integers(image.shape[1] - size))
        crops.append(_scaled(image[top : top + size, left : left + size], side))
    return np.stack(crops)


def coloured_digits(count: int, side: int) -> Images:
    """Digits as glyphs: one random colour on another."""
    examples = load_source("digits", site="public")
    rng = np.random.default_rng(2)
    glyphs = []
    for i in rng.integers(len(examples), size=count).tolist():
        ink = examples.image(i)[:, :, :1] / 255
        front, back = rng.integers(0, 256, (2, 3))
        glyphs.append(_scaled((back + ink * (front - back)).astype(np.uint8), side))
    return np.stack(glyphs)


def _scaled(image: Images, side: int) -> Images:
    return np.asarray(Pillow.fromarray(image).resize((side, side), Pillow.Resampling.BILINEAR))


def _resized(examples: Examples, transform: ImageTransform) -> Images:
    return np.stack([transform.resize(examples.image(i)) for i in range(len(examples))])

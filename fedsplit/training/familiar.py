"""Do images look like what the bundled backbone knows? Told before a run and at roll call."""

from __future__ import annotations

import numpy as np

from fedsplit.core.errors import DataError
from fedsplit.model.backbone import Backbone
from fedsplit.model.files import BUNDLED
from fedsplit.training.data.examples import Examples

# What vit-glyphs was trained on: fedsplit/assets/vit-glyphs/README.md.
_SIDE = 32
_LOOKED_AT = 16
_COLOUR = 8
"""Mean difference of two channels, of 255, above which an image is not grey."""

UNFAMILIAR = (
    f"the bundled backbone knows small grey signs alone, and these images are coloured or larger than {_SIDE} pixels: expect "
    "little of it. Give one that has seen images like yours, --set backbone=DIR (docs/how-to/own-data.md, A backbone)"
)


def unfamiliar(backbone: Backbone, examples: Examples) -> tuple[str, ...]:
    """The note, where the backbone is the bundled one and most of some images are of another kind than its own."""
    if backbone.path.name not in BUNDLED or examples.kind != "image" or not len(examples.labels):
        return ()
    seen = np.unique(np.linspace(0, len(examples.labels) - 1, _LOOKED_AT).astype(int))
    odd = [_odd(examples, int(i)) for i in seen]
    return (UNFAMILIAR,) if 2 * sum(odd) > len(odd) else ()


def _odd(examples: Examples, i: int) -> bool:
    try:
        image = examples.image(i)
    except DataError:
        return False  # told where broken files are
    pixels = image.astype(np.int16)
    colour = max(np.abs(pixels[..., 0] - pixels[..., c]).mean() for c in (1, 2))
    return bool(max(image.shape[:2]) > _SIDE or colour > _COLOUR)

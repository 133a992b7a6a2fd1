"""A contact sheet: a few images of each class with their file names, as the backbone's first step gets them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from fedsplit.core.errors import RunDirError
from fedsplit.core.foreign import printable
from fedsplit.training.data import Examples
from fedsplit.training.data.examples import Index

EACH, MOST_CLASSES = 6, 40
_SIDE, _GAP, _TEXT = 128, 10, 18
_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "ipaexg.ttf",
    "ipag.ttf",
    "YuGothR.ttc",
    "meiryo.ttc",
    "DejaVuSans.ttf",
)
_PAPER, _INK, _GREY = "white", "#222222", "#777777"


def write_sheet(path: Path, examples: Examples) -> None:
    """Write the PNG. Raises RunDirError where it cannot be written, DataError for an image that cannot be read."""
    classes = [c for c in range(len(examples.classes)) if (examples.labels == c).any()][
        :MOST_CLASSES
    ]
    row = _SIDE + 2 * _TEXT + _GAP
    width = EACH * (_SIDE + _GAP) + _GAP
    sheet = Pillow.new("RGB", (width, _GAP + len(classes) * (row + _TEXT)), _PAPER)
    draw, head, small = ImageDraw.Draw(sheet), _font(15), _font(11)
    for place, label in enumerate(classes):
        top = _GAP + place * (row + _TEXT)
        members = np.flatnonzero(examples.labels == label)
        name = printable(examples.classes[label], limit=60)
        draw.text((_GAP, top), f"{name}: {len(members)}", fill=_INK, font=head)
        for column, i in enumerate(_spread(members)):
            left = _GAP + column * (_SIDE + _GAP)
            image = Pillow.fromarray(examples.image(int(i)))
            # Small scans are made large enough to be seen, pixel by pixel.
            grow = max(1, _SIDE // max(image.size))
            if grow > 1:
                image = image.resize(
                    (image.width * grow, image.height * grow), Pillow.Resampling.NEAREST
                )
            image.thumbnail((_SIDE, _SIDE))
            sheet.paste(image, (left, top + _TEXT + 4))
            told = printable(Path(examples.origin(int(i))).name, limit=22)
            draw.text((left, top + _TEXT + _SIDE + 6), told, fill=_GREY, font=small)
    try:
        sheet.save(path, format="PNG")
    except OSError as err:
        raise RunDirError(
            f"{path}: the contact sheet cannot be written ({err}); give another --sheet"
        ) from err


def _spread(members: Index) -> Index:
    """A few of them, from the first to the last."""
    places = np.linspace(0, len(members) - 1, min(EACH, len(members))).round().astype(int)
    chosen: Index = members[places]
    return chosen


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)

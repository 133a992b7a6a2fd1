"""A contact sheet: a few images of each class with their file names, as the backbone's first step gets them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from fedsplit.core.errors import RunDirError
from fedsplit.core.foreign import printable
from fedsplit.report.fonts import NONE_HERE, file_for
from fedsplit.training.data import Examples
from fedsplit.training.data.examples import Index

EACH, MOST_CLASSES = 6, 40
SIDE = 128
"""Of an image on the sheet, in pixels."""
_GAP, _TEXT = 10, 18
_PAPER, _INK, _GREY = "white", "#222222", "#777777"


def write_sheet(path: Path, examples: Examples) -> list[str]:
    """Write the PNG; what there is to say of it. Raises RunDirError where it cannot be written, DataError for an image that cannot be read."""
    held = [c for c in range(len(examples.classes)) if (examples.labels == c).any()]
    members = [np.flatnonzero(examples.labels == c) for c in held[:MOST_CLASSES]]
    if examples.numbers is not None:
        # One row, from the least number to the largest.
        members = [np.argsort(examples.numbers, kind="stable")]
    rows = [(c, _spread(of)) for c, of in zip(held, members, strict=False)]
    heads = [
        f"{printable(examples.classes[c], limit=60)}: {(examples.labels == c).sum()}"
        for c, _ in rows
    ]
    names = {i: _caption(examples, i) for _, chosen in rows for i in chosen}
    font, has_all = file_for([*heads, *names.values()])
    head, small = (
        ImageFont.load_default(size) if font is None else ImageFont.truetype(font, size)
        for size in (15, 11)
    )
    row = SIDE + 3 * _TEXT + _GAP
    sheet = Pillow.new("RGB", (EACH * (SIDE + _GAP) + _GAP, _GAP + len(rows) * row), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (_, chosen) in enumerate(rows):
        top = _GAP + place * row
        draw.text((_GAP, top), heads[place], fill=_INK, font=head)
        for column, i in enumerate(chosen):
            left = _GAP + column * (SIDE + _GAP)
            sheet.paste(thumbnail(examples, i), (left, top + _TEXT + 4))
            draw.text((left, top + _TEXT + SIDE + 6), names[i], fill=_GREY, font=small)
    try:
        sheet.save(path, format="PNG")
    except OSError as err:
        raise RunDirError(
            f"{path}: the contact sheet cannot be written ({err}); give another --sheet"
        ) from err
    notes = [] if has_all else [NONE_HERE]
    if len(rows) < len(held):
        notes.append(f"the contact sheet shows the first {len(rows)} of {len(held)} classes")
    return notes


def _caption(examples: Examples, i: int) -> str:
    if examples.numbers is not None:
        return f"{examples.numbers[i]:.6g}"
    return printable(Path(examples.origin(i)).name, limit=22)


def thumbnail(examples: Examples, i: int) -> Pillow.Image:
    """Sample `i` within SIDE x SIDE."""
    image = Pillow.fromarray(examples.image(i))
    # Small scans are made large enough to be seen, pixel by pixel.
    grow = max(1, SIDE // max(image.size))
    if grow > 1:
        size = (image.width * grow, image.height * grow)
        image = image.resize(size, Pillow.Resampling.NEAREST)
    image.thumbnail((SIDE, SIDE))
    return image


def _spread(members: Index) -> list[int]:
    """A few of them, from the first to the last."""
    places = np.linspace(0, len(members) - 1, min(EACH, len(members))).round().astype(int)
    return [int(i) for i in members[places]]

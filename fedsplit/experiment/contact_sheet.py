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
# With Japanese characters, as files are called by Linux, Windows and macOS.
_WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc", "NotoSansCJKjp-Regular.otf", "NotoSansJP-Regular.otf", "NotoSansJP-Regular.ttf",
    "NotoSerifCJK-Regular.ttc", "fonts-japanese-gothic.ttf", "ipaexg.ttf", "ipag.ttf", "TakaoGothic.ttf",
    "VL-Gothic-Regular.ttf", "YuGothM.ttc", "YuGothR.ttc", "meiryo.ttc", "msgothic.ttc", "ヒラギノ角ゴシック W3.ttc",
    "Hiragino Sans GB.ttc", "wqy-zenhei.ttc", "msyh.ttc", "malgun.ttf",
)  # fmt: skip
_FONTS = (*_WIDE_FONTS, "DejaVuSans.ttf")
_FIRST_WIDE = 0x2E80
"""Scripts of East Asia begin here."""
_PAPER, _INK, _GREY = "white", "#222222", "#777777"


def write_sheet(path: Path, examples: Examples) -> list[str]:
    """Write the PNG; what there is to say of it. Raises RunDirError where it cannot be written, DataError for an image that cannot be read."""
    classes = [c for c in range(len(examples.classes)) if (examples.labels == c).any()][
        :MOST_CLASSES
    ]
    row = _SIDE + 2 * _TEXT + _GAP
    width = EACH * (_SIDE + _GAP) + _GAP
    sheet = Pillow.new("RGB", (width, _GAP + len(classes) * (row + _TEXT)), _PAPER)
    draw, (head, wide), (small, _) = ImageDraw.Draw(sheet), _font(15), _font(11)
    texts = []
    for place, label in enumerate(classes):
        top = _GAP + place * (row + _TEXT)
        members = np.flatnonzero(examples.labels == label)
        name = printable(examples.classes[label], limit=60)
        texts.append(name)
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
            texts.append(told)
            draw.text((left, top + _TEXT + _SIDE + 6), told, fill=_GREY, font=small)
    try:
        sheet.save(path, format="PNG")
    except OSError as err:
        raise RunDirError(
            f"{path}: the contact sheet cannot be written ({err}); give another --sheet"
        ) from err
    if not wide and any(ord(c) >= _FIRST_WIDE for c in "".join(texts)):
        return [
            "no font of this machine has Japanese characters, so the contact sheet shows boxes in place of them; install "
            "one, e.g. the package fonts-noto-cjk"
        ]
    return []


def _spread(members: Index) -> Index:
    """A few of them, from the first to the last."""
    places = np.linspace(0, len(members) - 1, min(EACH, len(members))).round().astype(int)
    chosen: Index = members[places]
    return chosen


def _font(size: int) -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, bool]:
    """A font of this machine, and whether it has Japanese characters."""
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size), name in _WIDE_FONTS
        except OSError:
            continue
    return ImageFont.load_default(size), False

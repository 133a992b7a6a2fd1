"""The images that a module got wrong, on one sheet with their file names, the surest first; of numbers the farthest off."""

from __future__ import annotations

from pathlib import Path

from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from fedsplit.core.errors import RunDirError
from fedsplit.core.foreign import printable
from fedsplit.predict.judge.judged import Judged
from fedsplit.report.contact_sheet import SIDE, thumbnail
from fedsplit.report.fonts import NONE_HERE, file_for

MOST = 60
"""Samples on the sheet, and on the page."""
_COLUMNS, _GAP, _LINE = 6, 12, 15
_PAPER, _INK, _RED = "white", "#222222", "#A12622"


def caption(judged: Judged, i: int) -> tuple[str, str]:
    """What a sample is and what the module took it for, in words."""
    examples = judged.examples
    if examples.numbers is not None:
        return f"{examples.numbers[i]:.6g}", f"{judged.answers[i]:.6g}"
    names = examples.classes
    return names[int(examples.labels[i])], f"{names[int(judged.answers[i])]} {judged.sure[i]:.2f}"


def place(judged: Judged, i: int) -> str:
    """Sample `i` as a person finds it: its file within the source's folder, or its place in the file."""
    base = Path(judged.source.partition(":")[2]).expanduser().absolute()
    origin = judged.examples.origin(i)
    return origin.removeprefix(f"{base}/").removeprefix(f"{base.parent}/")


def write_sheet(path: Path, judged: Judged) -> list[str]:
    """Write the PNG; what there is to say of it. Raises RunDirError where it cannot be written, DataError for an image that cannot be read."""
    chosen = judged.wrong[:MOST]
    texts = {i: _lines(judged, i) for i in chosen}
    file, has_all = file_for(line for lines in texts.values() for line in lines)
    font = ImageFont.load_default(11) if file is None else ImageFont.truetype(file, 11)
    cell = SIDE + 3 * _LINE + _GAP
    rows = -(-len(chosen) // _COLUMNS)
    columns = min(_COLUMNS, len(chosen))
    sheet = Pillow.new("RGB", (columns * (SIDE + _GAP) + _GAP, rows * cell + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for at, i in enumerate(chosen):
        left, top = _GAP + at % _COLUMNS * (SIDE + _GAP), _GAP + at // _COLUMNS * cell
        sheet.paste(thumbnail(judged.examples, i), (left, top))
        for line, (text, colour) in enumerate(zip(texts[i], (_INK, _INK, _RED), strict=True)):
            draw.text((left, top + SIDE + 3 + line * _LINE), _fitted(text, font), fill=colour, font=font)  # fmt: skip
    try:
        sheet.save(path, format="PNG")
    except OSError as err:
        raise RunDirError(
            f"{path} cannot be written ({err}); free some space or give another --out"
        ) from err
    return [] if has_all else [NONE_HERE]


def _lines(judged: Judged, i: int) -> tuple[str, str, str]:
    label, answer = caption(judged, i)
    # Folders are told by the label; the end of a long name tells files apart.
    name = printable(Path(place(judged, i)).name)
    return name, printable(f"is {label}"), printable(f"said {answer}")


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, shortened in its middle to the width of an image."""
    short, kept = text, len(text)
    while font.getlength(short) > SIDE and kept > 2:
        kept -= 1
        short = f"{text[: (kept + 1) // 2]}..{text[len(text) - kept // 2 :]}"
    return short

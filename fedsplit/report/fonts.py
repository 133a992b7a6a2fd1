"""Fonts for names that are not Latin: Japanese, Chinese and Korean ones are boxes in matplotlib's own font.

A font of the system is looked for only where a text needs one. Where there is none, that is told
once and the picture is drawn all the same.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import ImageFont

log = logging.getLogger(__name__)

# Parts of the file names of widespread fonts with Japanese characters, the even ones first.
_FILES = (
    "notosanscjk", "notosansjp", "sourcehansans", "ipaexg", "ipag", "takaogothic", "takaopgothic", "vl-gothic",
    "vl-pgothic", "yugoth", "meiryo", "msgothic", "hiragino", "unifont", "wqy", "malgun", "simhei", "msyh",
)  # fmt: skip
_LAST_OF_OWN = "\u2bff"
"""matplotlib's own font has most characters up to here: Latin, Greek, Cyrillic, arrows, signs."""
_OWN = "DejaVu Sans"
_FOLDERS = (
    "/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts",
    "/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts",
)  # fmt: skip
NONE_HERE = (
    "no font of this machine has Japanese characters, so pictures show boxes in place of them; install one, e.g. the "
    "package fonts-noto-cjk"
)


def style_for(texts: Iterable[str]) -> dict[str, Any]:
    """Matplotlib settings with which `texts` can be drawn; empty where its own font will do."""
    if not _beyond(_LAST_OF_OWN, texts):
        return {}
    family = wide_font()
    if family is None:
        _tell_once()
        # The boxes are told once, in words that help, and not by a warning for each character.
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from font", category=UserWarning
        )
        return {}
    return {"font.family": [_OWN, family]}


def file_for(texts: Iterable[str]) -> tuple[str | None, bool]:
    """The file of a font that `texts` can be drawn with, and whether it has all their characters.

    None is Pillow's own font, which has ASCII alone: a site has no matplotlib, and maybe no font at all.
    """
    wide = wide_files()
    try:
        from matplotlib import font_manager
    except ImportError:
        return (wide[0], True) if wide else (None, not _beyond("\x7f", texts))
    if not _beyond(_LAST_OF_OWN, texts):
        return font_manager.findfont(_OWN), True
    return (wide[0], True) if wide else (font_manager.findfont(_OWN), False)


def _beyond(last: str, texts: Iterable[str]) -> bool:
    return any(char > last for text in texts for char in text)


@functools.cache
def _tell_once() -> None:
    log.warning(NONE_HERE)


@functools.cache
def wide_files() -> tuple[str, ...]:
    """Files of this machine's first font with Japanese characters, its regular weight first; empty where there is none."""
    found: dict[str, str] = {}
    for folder in _FOLDERS:
        for path in sorted(Path(folder).expanduser().rglob("*.[ot]t[fc]")):
            found.setdefault(path.name.lower().replace("_", ""), str(path))
    for part in _FILES:
        # All weights of it: titles are bold.
        names = sorted(n for n in found if n.startswith(part) and _readable(found[n]))
        if names:
            names.sort(key=lambda name: "regular" not in name)
            return tuple(found[name] for name in names)
    return ()


def _readable(path: str) -> bool:
    try:
        ImageFont.truetype(path)
    except OSError:
        return False
    return True


@functools.cache
def wide_font() -> str | None:
    """The name of that font, made known to matplotlib; None where there is none that can be read."""
    return min(filter(None, map(_added, wide_files())), key=len, default=None)


def _added(path: str) -> str | None:
    """The name of a font file, now known to matplotlib; None where it cannot be read."""
    from matplotlib import font_manager

    try:
        font_manager.fontManager.addfont(path)
        return font_manager.FontProperties(fname=path).get_name()
    except (OSError, RuntimeError):
        return None

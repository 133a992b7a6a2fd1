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

from matplotlib import font_manager

log = logging.getLogger(__name__)

# Parts of the file names of widespread fonts with Japanese characters, the even ones first.
_FILES = (
    "notosanscjk", "notosansjp", "sourcehansans", "ipaexg", "ipag", "takaogothic", "takaopgothic", "vl-gothic",
    "vl-pgothic", "yugoth", "meiryo", "msgothic", "hiragino", "unifont", "wqy", "malgun", "simhei", "msyh",
)  # fmt: skip
_LAST_OF_OWN = "\u2bff"
"""matplotlib's own font has most characters up to here: Latin, Greek, Cyrillic, arrows, signs."""
_OWN = "DejaVu Sans"
NONE_HERE = (
    "no font of this machine has Japanese characters, so pictures show boxes in place of them; install one, e.g. the "
    "package fonts-noto-cjk"
)


def style_for(texts: Iterable[str]) -> dict[str, Any]:
    """Matplotlib settings with which `texts` can be drawn; empty where its own font will do."""
    if not _needs_wide(texts):
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


def file_for(texts: Iterable[str]) -> tuple[str, bool]:
    """The file of a font that `texts` can be drawn with, and whether it has all their characters."""
    family = wide_font() if (wide := _needs_wide(texts)) else None
    return font_manager.findfont(family or _OWN), not wide or family is not None


def _needs_wide(texts: Iterable[str]) -> bool:
    return any(char > _LAST_OF_OWN for text in texts for char in text)


@functools.cache
def _tell_once() -> None:
    log.warning(NONE_HERE)


@functools.cache
def wide_font() -> str | None:
    """Name of a font of this machine with Japanese characters, made known to matplotlib; None where none is."""
    # Not matplotlib's kept list: a font that was installed since is not in it.
    files = {
        Path(path).name.lower().replace("_", ""): path for path in font_manager.findSystemFonts()
    }
    for part in _FILES:
        # All weights of it: titles are bold.
        known = [
            name for path in sorted(files) if path.startswith(part) if (name := _added(files[path]))
        ]
        if known:
            return min(known, key=len)
    return None


def _added(path: str) -> str | None:
    """The name of a font file, now known to matplotlib; None where it cannot be read."""
    try:
        font_manager.fontManager.addfont(path)
        return font_manager.FontProperties(fname=path).get_name()
    except (OSError, RuntimeError):
        return None

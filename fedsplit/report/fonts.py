"""Fonts for names that are not Latin: Japanese, Chinese and Korean ones are boxes in matplotlib's own font.

A font of the system is looked for only where a text needs one. Where there is none, that is told once and the plot
is drawn all the same. Called by whoever draws, through `style_for`.
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


def style_for(texts: Iterable[str]) -> dict[str, Any]:
    """Matplotlib settings with which `texts` can be drawn; empty where its own font will do."""
    if all(char <= _LAST_OF_OWN for text in texts for char in text):
        return {}
    family = wide_font()
    if family is None:
        # The boxes are told once, in words that help, and not by a warning for each character.
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from font", category=UserWarning
        )
        return {}
    return {"font.family": ["DejaVu Sans", family]}


@functools.cache
def wide_font() -> str | None:
    """Name of a font of this machine with Japanese characters, made known to matplotlib; None and a word where none is."""
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
    log.warning(
        "no font of this machine has Japanese characters, so plots show boxes in place of them; install one, e.g. "
        "the package fonts-noto-cjk"
    )
    return None


def _added(path: str) -> str | None:
    """The name of a font file, now known to matplotlib; None where it cannot be read."""
    try:
        font_manager.fontManager.addfont(path)
        return font_manager.FontProperties(fname=path).get_name()
    except (OSError, RuntimeError):
        return None

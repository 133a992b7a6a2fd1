"""Names that people give to runs and tasks, in any script. They become names of folders, so not every character will do.

A name is held in one form (Unicode's NFC): the same word typed on two systems is the same name.
"""

from __future__ import annotations

import hashlib
import unicodedata

MAX_TASK_CHARS = 64
MAX_RUN_CHARS = 100
MAX_CERTIFICATE_CHARS = 64
"""Of a certificate's common name."""
MAX_BYTES = 240
"""File systems count bytes, at most 255 a name; what is put before or behind a name has to fit too."""
RULE = "letters or digits of any script, '-', '_', and '.' but not first"


def normalised(name: str) -> str:
    """The one form in which a name is kept and compared."""
    return unicodedata.normalize("NFC", name)


def is_name(name: str, most: int) -> bool:
    """May a run or a task be called so? `most` counts characters."""
    if not 0 < len(name) <= most or len(name.encode("utf-8", "replace")) > MAX_BYTES:
        return False
    # A mark (a vowel sign, an accent of its own) follows a letter.
    first = name[0].isalnum() or name[0] in "-_"
    return first and all(c.isalnum() or c in "-_." or _is_mark(c) for c in name[1:])


def _is_mark(char: str) -> bool:
    return unicodedata.category(char).startswith("M")


def certificate_name(site: str) -> str:
    """The name under which a site stands in its certificate and its files: its own where it is plain, else a digest.

    Certificates and proxies know ASCII, and a file name must not lead out of its folder.
    """
    plain = site.isascii() and all(c.isalnum() or c in "-_." for c in site)
    if plain and 0 < len(site) <= MAX_CERTIFICATE_CHARS and site[0].isalnum():
        return site
    return f"site-{hashlib.sha256(normalised(site).encode()).hexdigest()[:16]}"

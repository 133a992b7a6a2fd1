"""How a version is named: TASK, TASK@ALIAS, TASK@latest, TASK#NUMBER, or the first digits of its digest."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedsplit.core.errors import ConfigError
from fedsplit.core.foreign import printable
from fedsplit.core.names import MAX_TASK_CHARS, is_name, normalised
from fedsplit.registry.version import MAX_NUMBER, PRODUCTION

_DIGEST = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True)
class Reference:
    """A reference, taken apart. TASK alone means TASK@production, unless it is rather a digest."""

    task: str = ""
    alias: str = ""
    number: int = 0
    digest: str = ""
    """The first digits of one; beside `task` where the text may be either."""

    @classmethod
    def read(cls, text: str) -> Reference:
        """Raises ConfigError where it is none."""
        word = normalised(text.strip())
        task, at, alias = word.partition("@")
        if at and _is_name(task) and _is_name(alias):
            return cls(task=task, alias=alias)
        task, at, digits = word.partition("#")
        if at and _is_name(task) and digits.isascii() and digits.isdigit() and len(digits) < 11:
            return cls(task=task, number=min(int(digits), MAX_NUMBER + 1))
        digest = word.lower() if _DIGEST.fullmatch(word.lower()) else ""
        if _is_name(word) or digest:
            return cls(task=word, alias=PRODUCTION, digest=digest)
        raise ConfigError(
            f"{printable(text, limit=200)!r} names no module; give TASK, TASK@ALIAS, TASK@latest, TASK#NUMBER, or at least 8 "
            f"digits of a digest"
        )


def _is_name(text: str) -> bool:
    return is_name(text, MAX_TASK_CHARS)

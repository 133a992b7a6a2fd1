"""The report's sentences in its languages, from words.toml: `say("key", name=...)`.

Nothing foreign is ever part of a key; values are put in as they are, and escaped where the page is written.
"""

from __future__ import annotations

import functools
import tomllib
from importlib.resources import files
from typing import Any

from fedsplit.core.errors import ConfigError

LANGUAGES = ("en", "ja")


class Words:
    """One language. Raises ConfigError for one that there is not."""

    def __init__(self, lang: str) -> None:
        if lang not in LANGUAGES:
            raise ConfigError(
                f"the report is not written in {lang[:20]!r}; choose one of {', '.join(LANGUAGES)}"
            )
        self.lang = lang

    def __call__(self, key: str, **values: Any) -> str:
        """The sentence of a key with `values` in its places."""
        return _all()[key][self.lang].format(**values)


@functools.cache
def _all() -> dict[str, dict[str, str]]:
    text = (files("fedsplit.report") / "words.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)

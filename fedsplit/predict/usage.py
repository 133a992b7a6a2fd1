"""What a module in use has answered, a day: how often each class, and how sure it was. No inputs, no single answers.

    SITE/usage/2026-11-28.json    days are UTC's; each module by its digest

A site reports these sums (plant/site/report.py), and the server compares them with what the module did on the site's test
samples. Whoever answers with a module of a site's folder adds to them; several processes may at once. Without torch.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedsplit.core.closing import Closing
from fedsplit.core.foreign import MAX_CLASSES, ClassName, read_json
from fedsplit.core.whole_files import write_whole

log = logging.getLogger(__name__)

FOLDER = "usage"
DAYS_KEPT = 60
MAX_MODULES = 64
"""Of one day; the first ones stay."""
_EVERY_S = 5.0
_LOCK_S = 5.0
_MAX_FILE_BYTES = 32 << 20
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
Answers = Annotated[int, Field(ge=0, le=2**50)]


class Sums(BaseModel):
    """Sums over answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: Answers = 0
    confidence: Annotated[float, Field(ge=0, le=2**50, allow_inf_nan=False)] = 0.0
    """Sum of the probabilities of the classes that were answered."""
    classes: Annotated[dict[ClassName, Answers], Field(max_length=MAX_CLASSES)] = {}
    """Class -> how often it was answered."""

    @classmethod
    def of(cls, classes: Sequence[str], confidences: Sequence[float]) -> Sums:
        """Those of some answers."""
        return cls(
            samples=len(classes), confidence=float(sum(confidences)), classes=dict(Counter(classes))
        )

    def plus(self, more: Sums) -> Sums:
        """Both together."""
        counts = Counter(self.classes) + Counter(more.classes)
        kept = dict(counts.most_common(MAX_CLASSES))
        return Sums(
            samples=self.samples + more.samples,
            confidence=self.confidence + more.confidence,
            classes=kept,
        )


class _Day(BaseModel):
    model_config = ConfigDict(extra="forbid")

    modules: Annotated[dict[str, Sums], Field(max_length=MAX_MODULES)] = {}
    """Digest -> its sums."""


@dataclass(eq=False)
class Usage(Closing):
    """The counts of a site folder for one module version. `add` is quick; what it adds is on disk within seconds.

    A full disk costs counts, never an answer: it is logged once.
    """

    folder: Path
    """The site's."""
    module: str
    """Digest of the module that answers."""
    now: Callable[[], float] = time.time
    _waiting: dict[str, Sums] = field(default_factory=dict, init=False)
    _written: float = field(default=0.0, init=False)
    _told: bool = field(default=False, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def add(self, classes: Sequence[str], confidences: Sequence[float]) -> None:
        """Count answers: each one's class and its probability."""
        if not classes:
            return
        day = day_of(self.now())
        with self._lock:
            self._waiting[day] = self._waiting.get(day, Sums()).plus(Sums.of(classes, confidences))
            if time.monotonic() - self._written < _EVERY_S:
                return
            self._written = time.monotonic()
        self.flush()

    def flush(self) -> None:
        """Write what waits."""
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        try:
            for day, sums in waiting.items():
                _add(self.folder / FOLDER, day, self.module, sums)
        except (OSError, Timeout) as err:
            if not self._told:
                self._told = True
                log.warning(
                    "the counts of answers in %s cannot be kept (%s); answers go on without them",
                    self.folder / FOLDER,
                    getattr(err, "strerror", None) or err,
                )

    def close(self) -> None:
        """Write what waits."""
        self.flush()


def day_of(at: float) -> str:
    """The day of a time in seconds since the epoch, UTC."""
    return datetime.datetime.fromtimestamp(at, datetime.UTC).date().isoformat()


def used(folder: Path, day: str) -> dict[str, Sums]:
    """What the modules of a site's folder answered on a day: digest -> sums. A damaged file counts as none."""
    try:
        return _Day.model_validate(
            read_json(folder / FOLDER / f"{day}.json", limit=_MAX_FILE_BYTES)
        ).modules
    except (OSError, ValueError, ValidationError):
        return {}


def _add(folder: Path, day: str, module: str, sums: Sums) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    with FileLock(folder / ".lock", timeout=_LOCK_S, mode=0o600):
        modules = used(folder.parent, day)
        if module not in modules and len(modules) >= MAX_MODULES:
            return
        known = modules.get(module)
        modules[module] = known.plus(sums) if known else sums
        said = {"modules": {digest: one.model_dump() for digest, one in modules.items()}}
        write_whole(folder / f"{day}.json", json.dumps(said, ensure_ascii=False) + "\n")
        days = sorted(p for p in folder.glob("*.json") if _DAY.fullmatch(p.stem))
        for path in days[:-DAYS_KEPT]:
            path.unlink(missing_ok=True)

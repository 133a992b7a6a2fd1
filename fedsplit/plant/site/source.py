"""A look at a site's own data by the rules of training: what `site join` says before a code is used up.

Loads the readers (torch among them): for commands that end, not for the processes that stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsplit.core.errors import DataError
from fedsplit.core.scores import Target
from fedsplit.core.tasks import parse_classes
from fedsplit.plant.site.folder import SiteFile
from fedsplit.training.data import Examples, load_source, train_test_split

TEST_FRACTION = 0.2
"""What a run keeps for testing unless it says otherwise."""


@dataclass(frozen=True)
class Seen:
    """What is in the source."""

    kind: str
    samples: int
    classes: dict[str, int]
    """Name -> samples; empty where labels are numbers."""
    notes: tuple[str, ...]

    def __str__(self) -> str:
        if not self.classes:
            return f"{self.samples:,} {self.kind}s, each with a number"
        shown = [f"{name} ({count:,})" for name, count in list(self.classes.items())[:20]]
        more = len(self.classes) - len(shown)
        return (
            f"{self.samples:,} {self.kind}s in {len(self.classes)} classes: {', '.join(shown)}"
            + (f" and {more} more" if more else "")
        )


def look_at(settings: SiteFile) -> Seen:
    """Read all of the source as a run would. Raises ConfigError, DataError."""
    try:
        return _read(settings, "class")
    except DataError as as_classes:
        try:
            return _read(settings, "number")
        except DataError:
            # Numbers are the rarer case: what is wrong with the labels as classes is what is meant.
            raise as_classes from None


def _read(settings: SiteFile, target: Target) -> Seen:
    site, reading = settings.site, settings.reading
    examples = load_source(
        site.data,
        site=site.name,
        classes=parse_classes(reading.classes) or None if target == "class" else None,
        text_column=reading.text_column or "text",
        label_column=reading.label_column or "label",
        pixel_max=reading.pixel_max,
        target=target,
    )
    # As a run does at roll call: too few samples are known here.
    train_test_split(
        examples.labels,
        examples.digests(),
        TEST_FRACTION,
        site=site.name,
        groups=examples.groups,
    )
    return Seen(examples.kind, len(examples), _counts(examples), tuple(examples.notes))


def _counts(examples: Examples) -> dict[str, int]:
    if examples.numbers is not None:
        return {}
    counts = np.bincount(examples.labels, minlength=len(examples.classes))
    return {name: int(n) for name, n in zip(examples.classes, counts, strict=True)}

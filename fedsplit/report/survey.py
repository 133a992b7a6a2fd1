"""A look at a source through the eyes of a site that would train on it: what `fedsplit data` shows.

Reads by the very functions that a site reads by (training/site_data.py), as a site without a record of earlier runs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedsplit.core.config import RunConfig
from fedsplit.core.foreign import printable
from fedsplit.model.backbone import Backbone
from fedsplit.report.contact_sheet import write_sheet
from fedsplit.training.data import Examples, TextTransform, load_source, train_test_split
from fedsplit.training.data.text_notes import TextFacts, text_facts, text_notes
from fedsplit.training.own_data import without_test

SITE = "this site"
"""What errors call the site through whose eyes this looks."""
FIVE = ("least", "lower_quartile", "median", "upper_quartile", "largest")
"""What is said of numbers beside their count."""
MOST_SIZES = 2000
"""Images whose size is looked at."""
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What is in a source."""

    source: str
    kind: str
    samples: int
    numbers: dict[str, dict[str, float]]
    """Where labels are numbers: of all, train and test the count, least, quartiles and largest; else empty."""
    classes: dict[str, int]
    """Name -> samples; empty where labels are numbers."""
    train: dict[str, int]
    test: dict[str, int]
    """Name -> samples on that side, for a site that meets this source for the first time."""
    sizes: dict[str, int]
    """Images: "WIDTHxHEIGHT" -> count, of at most MOST_SIZES, the most frequent first."""
    pixel_max: float
    """The value read as white; 0 for texts."""
    characters: tuple[int, int, int] | None
    """Texts: least, median and largest number of characters."""
    tokens: TextFacts | None
    """Texts with a backbone."""
    doubles_within: int
    """Samples beyond the first of equal content and class."""
    doubles_across: int
    """Samples whose content is there under another class too."""
    notes: tuple[str, ...]
    sheet: str
    """File of the contact sheet; empty for texts."""

    def record(self) -> dict[str, Any]:
        """As one JSON object."""
        tokens = None
        if self.tokens is not None:
            least, median, most = self.tokens.lengths
            tokens = {
                "least": least, "median": median, "largest": most, "limit": self.tokens.limit,
                "cut": self.tokens.cut, "unknown_share": self.tokens.unknown,
            }  # fmt: skip
        return {
            "source": self.source,
            "kind": self.kind,
            "classes": self.classes,
            "numbers": self.numbers or None,
            "split": {
                name: {"train": self.train[name], "test": self.test[name]} for name in self.classes
            },
            "sizes": self.sizes,
            "range": {"white": self.pixel_max} if self.kind == "image" else None,
            "characters": self.characters,
            "tokens": tokens,
            "duplicates": {"within": self.doubles_within, "across": self.doubles_across},
            "notes": list(self.notes),
            "errors": [],
            "contact_sheet": self.sheet,
        }


def survey(flat: Mapping[str, Any], *, backbone: bool, sheet: Path) -> Survey:
    """Read the source of these settings. Raises ConfigError, DataError, and BackboneError where one is looked through.

    `sheet` is written for images. Raises RunDirError where it cannot be.
    """
    config = RunConfig.from_flat({"data": "digits", **flat})
    examples = load_source(
        config.task.data,
        site=SITE,
        classes=config.task.class_names,
        max_samples=config.task.max_samples,
        text_column=config.task.text_column,
        label_column=config.task.label_column,
        pixel_max=config.task.pixel_max,
        leave_out_broken=config.task.broken_files == "leave-out",
        target=config.task.target,
    )
    notes = list(examples.notes)
    digests = examples.digests()
    train, test = train_test_split(
        examples.labels, digests, config.task.test_fraction, site=SITE, groups=examples.groups
    )
    notes += without_test(examples, test)
    within, across, more = _doubles(examples, digests)
    notes += more
    tokens, more = _seen_by(config, examples) if backbone else (None, [])
    notes += more
    images = examples.kind == "image"
    if images:
        notes += write_sheet(sheet, examples)
    lengths = sorted(len(examples.text(i)) for i in range(len(examples))) if not images else []
    return Survey(
        source=config.task.data,
        kind=examples.kind,
        samples=len(examples),
        numbers=_numbers(examples, {"all": np.arange(len(examples)), "train": train, "test": test}),
        classes=_count(examples, np.arange(len(examples))),
        train=_count(examples, train),
        test=_count(examples, test),
        sizes=_sizes(examples) if images else {},
        pixel_max=examples.pixel_max,
        characters=(lengths[0], lengths[len(lengths) // 2], lengths[-1]) if lengths else None,
        tokens=tokens,
        doubles_within=within,
        doubles_across=across,
        notes=tuple(dict.fromkeys(notes)),
        sheet=str(sheet) if images else "",
    )


def _numbers(
    examples: Examples, sides: Mapping[str, np.ndarray[Any, Any]]
) -> dict[str, dict[str, float]]:
    if examples.numbers is None:
        return {}
    found: dict[str, dict[str, float]] = {}
    for name, chosen in sides.items():
        five = np.quantile(examples.numbers[chosen], (0, 0.25, 0.5, 0.75, 1)).tolist()
        found[name] = {"count": len(chosen)} | dict(zip(FIVE, five, strict=True))
    return found


def _count(examples: Examples, chosen: np.ndarray[Any, Any]) -> dict[str, int]:
    if examples.numbers is not None:
        return {}
    counts = np.bincount(examples.labels[chosen], minlength=len(examples.classes))
    return {name: int(n) for name, n in zip(examples.classes, counts, strict=True)}


def _sizes(examples: Examples) -> dict[str, int]:
    step = -(-len(examples) // MOST_SIZES)
    shapes = (examples.image(i).shape for i in range(0, len(examples), step))
    return dict(Counter(f"{width}x{height}" for height, width, _ in shapes).most_common())


def _doubles(examples: Examples, digests: np.ndarray[Any, Any]) -> tuple[int, int, list[str]]:
    """Equal samples of one label, and of several; in the second case one of the classes is wrong."""
    told = examples.labels if examples.numbers is None else examples.numbers
    one, several, wrong = ("in their class", "classes", ", so labels are wrong")
    if examples.numbers is not None:
        one, several, wrong = ("with their number", "numbers", "")
    places: dict[int, list[int]] = defaultdict(list)
    for i, digest in enumerate(digests.tolist()):
        places[digest].append(i)
    within = across = 0
    odd: list[str] = []
    for same in places.values():
        labels = Counter(told[same].tolist())
        within += sum(n - 1 for n in labels.values())
        if len(labels) > 1:
            across += len(same)
            odd.append(", ".join(printable(examples.origin(i), limit=120) for i in same[:2]))
    notes = []
    if within:
        notes.append(
            f"{within} samples are there twice or more {one}; equal ones are on one side of the split"
        )
    if across:
        notes.append(
            f"{across} samples of equal content have different {several}{wrong}, e.g. {'; '.join(odd[:_SHOWN])}"
        )
    return within, across, notes


def _seen_by(config: RunConfig, examples: Examples) -> tuple[TextFacts | None, list[str]]:
    """What the backbone makes of the samples. Raises BackboneError where it cannot read them."""
    found = Backbone.find(config.placement.backbone)
    if found.family.kind != examples.kind:
        return None, [
            f"these are {examples.kind}s, backbone {found.name!r} reads {found.family.kind}s: it cannot train on them"
        ]
    if examples.kind == "image":
        return None, list(found.notes)
    facts = text_facts(examples, TextTransform.from_backbone(found.path, config.task.max_length))
    return facts, text_notes(facts, len(examples))

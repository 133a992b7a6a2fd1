"""A module on a labelled source: it answers every sample once, and what comes of it is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.errors import ConfigError, DataError
from fedsplit.core.foreign import printable
from fedsplit.predict.found import FoundModule
from fedsplit.predict.judge.classes import ClassVerdict, judge_classes
from fedsplit.predict.judge.compare import Comparison, compare, compare_numbers
from fedsplit.predict.judge.numbers import NumberVerdict, judge_numbers
from fedsplit.predict.predictor import Predictor, Progress
from fedsplit.training.data import load_source, train_test_split
from fedsplit.training.data.examples import Examples

SITE = "here"
"""Who owns the samples, in errors; the command line leaves it out."""
_SHOWN = 10


@dataclass(frozen=True, eq=False)
class Judged:
    """A module, the samples it was judged on, and the verdict. N samples."""

    source: str
    module: FoundModule
    examples: Examples
    verdict: ClassVerdict | NumberVerdict
    answers: NDArray[np.float64]
    """[N], positions of classes; or numbers in their unit."""
    sure: NDArray[np.float64]
    """[N], the probability of each answer; of numbers 1."""
    wrong: tuple[int, ...]
    """Positions of samples answered wrongly, the surest first; of numbers of all, the farthest off first."""
    against: tuple[FoundModule, Comparison] | None
    notes: tuple[str, ...]
    """What a reader has to know of the samples, a sentence each."""


@dataclass(frozen=True)
class Samples:
    """Which samples of a source, and how it is read."""

    source: str
    test_alone: bool = False
    """Only those that a site of this test-fraction and these files keeps for tests."""
    test_fraction: float = 0.2
    text_column: str = "text"
    label_column: str = "label"
    leave_out_broken: bool = False

    def read(self, predictor: Predictor) -> Examples:
        """Labelled in the module's classes. Raises ConfigError and DataError, also for a class that the module has not."""
        examples = load_source(
            self.source,
            site=SITE,
            classes=predictor.classes if predictor.spec.numbers is None else None,
            text_column=self.text_column,
            label_column=self.label_column,
            pixel_max=predictor.inputs.pixel_max,
            leave_out_broken=self.leave_out_broken,
            target="class" if predictor.spec.numbers is None else "number",
        )
        if not self.test_alone:
            return examples
        _, test = train_test_split(
            examples.labels,
            examples.digests(),
            self.test_fraction,
            site=SITE,
            groups=examples.groups,
        )
        return examples.subset(test)


def judge(
    predictor: Predictor,
    samples: Samples,
    *,
    against: Predictor | None = None,
    risk: float = 0.01,
    batch_size: int = 32,
    progress: Callable[[str], Progress] | None = None,
) -> Judged:
    """The verdict on `predictor`, and how it differs from `against`. `progress` is asked once a module, with its name.

    Raises ConfigError and DataError for samples that cannot be judged, and where the two modules answer another question.
    """
    if against is not None:
        _check_same(predictor, against)
    examples = samples.read(predictor)
    shares = _shares(predictor, examples, batch_size, progress)
    theirs = None if against is None else _shares(against, examples, batch_size, progress)
    notes = [*examples.notes, *_missing(examples), _trained_on(samples)]
    compared: Comparison | None = None
    verdict: ClassVerdict | NumberVerdict
    if examples.numbers is None:
        answers, sure = shares.argmax(axis=1), shares.max(axis=1)
        verdict = judge_classes(shares, examples.labels, predictor.classes, risk=risk)
        off = np.where(answers == examples.labels, -np.inf, sure)
        wrong = np.argsort(-off, kind="stable")[: int((answers != examples.labels).sum())]
        if theirs is not None and against is not None:
            same = [against.classes.index(name) for name in predictor.classes]
            compared = compare(answers, theirs[:, same].argmax(axis=1), examples.labels)
    else:
        answers, sure = shares[:, 0], np.ones(len(shares))
        numbers = np.asarray(examples.numbers, np.float64)
        verdict = judge_numbers(answers, numbers)
        wrong = np.argsort(-np.abs(answers - numbers), kind="stable")
        if theirs is not None:
            compared = compare_numbers(answers, theirs[:, 0], numbers)
    return Judged(
        source=samples.source,
        module=predictor.found,
        examples=examples,
        verdict=verdict,
        answers=answers.astype(np.float64),
        sure=sure,
        wrong=tuple(int(i) for i in wrong),
        against=(against.found, compared) if against is not None and compared is not None else None,
        notes=tuple(note for note in dict.fromkeys(notes) if note),
    )


def _shares(
    predictor: Predictor,
    examples: Examples,
    batch_size: int,
    progress: Callable[[str], Progress] | None,
) -> NDArray[np.float64]:
    told = progress(predictor.found.name) if progress is not None else None
    outputs = predictor.over(examples, batch_size=batch_size, progress=told)
    if not np.isfinite(outputs).all():
        i = int(np.flatnonzero(~np.isfinite(outputs).all(axis=1))[0])
        raise DataError(
            f"{printable(examples.origin(i), limit=500)}: the module's output is not a number; look at this sample, and "
            f"whether the backbone's files are whole"
        )
    return predictor.probabilities(outputs)


def _check_same(this: Predictor, other: Predictor) -> None:
    """Raise ConfigError unless both answer one question."""
    if (this.spec.numbers is None) != (other.spec.numbers is None) or set(this.classes) != set(
        other.classes
    ):
        raise ConfigError(
            f"the modules answer different questions: {this.found.name} says {_listed(this)}, {other.found.name} says "
            f"{_listed(other)}; compare modules of one task"
        )
    if this.kind != other.kind:
        raise ConfigError(
            f"{this.found.name} reads {this.kind}s, {other.found.name} reads {other.kind}s; compare modules of one task"
        )


def _listed(predictor: Predictor) -> str:
    if predictor.spec.numbers is not None:
        return "a number"
    names = ", ".join(printable(name, limit=60) for name in predictor.classes[:_SHOWN])
    more = len(predictor.classes) - _SHOWN
    return f"{names} and {more} more" if more > 0 else names


def _missing(examples: Examples) -> list[str]:
    """The module's classes of which there is no sample."""
    if examples.numbers is not None:
        return []
    counts = np.bincount(examples.labels, minlength=len(examples.classes))
    gone = [printable(n, limit=60) for n, k in zip(examples.classes, counts, strict=True) if not k]
    if not gone:
        return []
    named = ", ".join(gone[:_SHOWN]) + (
        f" and {len(gone) - _SHOWN} more" if len(gone) > _SHOWN else ""
    )
    return [f"there is no sample of {named}: nothing is said of how well the module finds it"]


def _trained_on(samples: Samples) -> str:
    if samples.test_alone:
        return (
            f"only the test side is judged (test-fraction {samples.test_fraction:g}): samples that a site with these files "
            f"did not train on, unless files were added or the site kept other sides"
        )
    return (
        "all samples of the source are judged; whether the module was trained on some of them is not known here, and on "
        "those it looks better than it is"
    )

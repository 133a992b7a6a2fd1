"""Inputs -> answers, in their order and in bounded memory: files are decoded a few ahead while the model works.

What cannot be read takes its place among the answers as an `Unread` and stops nothing. What a person should know of the
inputs in all (texts that were cut, further pages of files) is counted in `Seen`.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from fedsplit.core.cpus import usable_cpus
from fedsplit.core.errors import ConfigError, DataError
from fedsplit.core.foreign import printable
from fedsplit.predict.answers import Answer, answers
from fedsplit.predict.images import read_image
from fedsplit.predict.predictor import Predictor, Prepared
from fedsplit.predict.source import Input
from fedsplit.training.data import TextTransform
from fedsplit.training.data.text_notes import MUCH_UNKNOWN

MAX_BATCH = 4096


@dataclass(frozen=True, slots=True)
class Answered:
    """An input and what the module says of it."""

    name: str
    answer: Answer


@dataclass(frozen=True, slots=True)
class Unread:
    """An input that could not be read, and why."""

    name: str
    problem: str


@dataclass
class Seen:
    """What showed while inputs were read."""

    several_pages: int = 0
    """Files with more than one page or frame."""
    cut: int = 0
    """Texts as long as the limit, or longer."""
    tokens: int = 0
    unknown: int = 0

    def notes(self, predictor: Predictor) -> list[str]:
        """What there is to say of it, a sentence each."""
        found = []
        if self.several_pages:
            found.append(
                f"{self.several_pages} files have more than one page or frame, of which the first alone is used"
            )
        transform = predictor.transform
        if self.cut and isinstance(transform, TextTransform):
            found.append(
                f"{self.cut} texts have {transform.max_length} tokens or more; what is beyond is not read, as in the run "
                f"(max-length)"
            )
        if self.unknown > MUCH_UNKNOWN * self.tokens:
            found.append(
                f"{100 * self.unknown / self.tokens:.0f} % of the tokens are unknown to the backbone's tokenizer: the model "
                f"sees little of these texts"
            )
        return found


def stream(
    predictor: Predictor, inputs: Iterable[Input], *, batch_size: int = 32, seen: Seen | None = None
) -> Iterator[list[Answered | Unread]]:
    """Batch by batch, `batch_size` inputs that can be read in each, what became of them in their order.

    Raises ConfigError for a batch-size that is none.
    """
    check_batch_size(batch_size)
    seen = seen or Seen()
    batch: list[tuple[Input, Prepared | Unread]] = []
    readable = 0
    for found in _prepared(predictor, inputs, ahead=2 * batch_size, seen=seen):
        batch.append(found)
        readable += not isinstance(found[1], Unread)
        # What is unreadable is told soon as well, however much of it there is.
        if readable == batch_size or len(batch) >= 4 * batch_size:
            yield _answered(predictor, batch)
            batch, readable = [], 0
    if batch:
        yield _answered(predictor, batch)


def check_batch_size(batch_size: int) -> None:
    """Raise ConfigError for one that is none."""
    if not 1 <= batch_size <= MAX_BATCH:
        raise ConfigError(f"batch-size={batch_size} is not within 1 to {MAX_BATCH}; 32 is usual")


def _answered(
    predictor: Predictor, batch: list[tuple[Input, Prepared | Unread]]
) -> list[Answered | Unread]:
    good = [prepared for _, prepared in batch if not isinstance(prepared, Unread)]
    said = iter(answers(predictor, predictor.outputs(good)))
    found: list[Answered | Unread] = []
    for one, prepared in batch:
        if isinstance(prepared, Unread):
            found.append(prepared)
            continue
        answer = next(said)
        if answer.finite:
            found.append(Answered(one.name, answer))
        else:
            found.append(
                Unread(
                    one.name,
                    f"{_place(one)}: the model's outputs are not finite; the module is of no use for it",
                )
            )
    return found


def _prepared(
    predictor: Predictor, inputs: Iterable[Input], *, ahead: int, seen: Seen
) -> Iterator[tuple[Input, Prepared | Unread]]:
    """Each input with what the model takes of it. Images are decoded side by side, at most `ahead` of them."""
    if predictor.kind == "text":
        # Tokenising is quick, and a text of a pipe is answered when its batch is full.
        for one in inputs:
            yield one, _prepare(predictor, one, seen)
        return
    coming = iter(inputs)
    waiting: deque[tuple[Input, Future[Prepared | Unread]]] = deque()
    pool = ThreadPoolExecutor(usable_cpus(), thread_name_prefix="fedsplit-decode")
    try:
        for one in islice(coming, ahead):
            waiting.append((one, pool.submit(_prepare, predictor, one, seen)))
        while waiting:
            one, future = waiting.popleft()
            yield one, future.result()
            for following in islice(coming, 1):
                waiting.append((following, pool.submit(_prepare, predictor, following, seen)))
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare(predictor: Predictor, one: Input, seen: Seen) -> Prepared | Unread:
    if one.fault:
        return Unread(one.name, one.fault)
    sample = one.sample
    try:
        if isinstance(sample, Path | bytes):
            image = read_image(sample, predictor.inputs, where=_place(one))
            # Two threads may count at once and lose one: enough to say that there are some.
            seen.several_pages += image.pages > 1
            return predictor.prepare(image.pixels)
        prepared = predictor.prepare(sample)  # type: ignore[arg-type]
    except DataError as err:
        place = _place(one)
        return Unread(one.name, str(err) if place in str(err) else f"{place}: {err}")
    if isinstance(predictor.transform, TextTransform):
        unknown = predictor.transform.tokenizer.unk_token_id
        seen.cut += prepared.shape[1] >= predictor.transform.max_length
        seen.tokens += prepared.shape[1]
        seen.unknown += 0 if unknown is None else int((prepared[0] == unknown).sum())
    return prepared


def _place(one: Input) -> str:
    path = os.fspath(one.sample) if isinstance(one.sample, Path) else one.name
    place = one.where or path
    return printable(
        f"{place} ({path})" if one.where and isinstance(one.sample, Path) else place, limit=1000
    )

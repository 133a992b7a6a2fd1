"""Answers samples with the module that is in use: a bounded queue, batches, and one thread that computes.

A request takes a place, its samples are prepared in a few threads, then one thread computes what is there as a batch. A
request is answered by the module that was in use when it was taken, all of it: `swap` changes what the next one gets, and
a batch never holds requests of two modules. Knows nothing of HTTP: app.py asks, and waits for the future.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from fedsplit.core.closing import Closing
from fedsplit.core.cpus import usable_cpus
from fedsplit.core.errors import DataError, FedsplitError, OverloadedError, ServiceError
from fedsplit.predict.answers import Answer, answers
from fedsplit.predict.predictor import Predictor, Prepared, Sample

log = logging.getLogger(__name__)

_MOST_DECODERS = 4
"""An image may take some hundred megabytes while it is decoded."""
_MOST_RETRY_S = 60.0
_NEW_WEIGHT = 0.1
"""Of the last batch in the seconds that a sample takes."""

Told = Callable[[Predictor, Sequence[Answer]], None]
"""(module, its answers) of samples that were answered; called in the thread that computes."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is taken at a time."""

    batch: int = 16
    """Samples that are computed at once."""
    window_s: float = 0.005
    """How long a batch waits for requests that are being prepared. One that is alone never waits."""
    queue: int = 256
    """Samples that were taken and are not answered yet."""


@dataclass(frozen=True, eq=False)
class Answered:
    """What one request's samples got, all from one module."""

    predictor: Predictor
    answers: list[Answer]


@dataclass(eq=False)
class Place:
    """A request's room in the queue, from before its body is read until it is answered."""

    answering: Answering
    samples: int = 1

    def grow(self, samples: int) -> None:
        """Room for so many samples in all. Raises OverloadedError."""
        self.answering._take(samples - self.samples)
        self.samples = samples


@dataclass(eq=False)
class _Job:
    predictor: Predictor
    future: Future[Answered]
    prepared: list[Prepared] = field(default_factory=list)


class Answering(Closing):
    """The module in use and all that waits for it. Safe to use from several threads."""

    def __init__(
        self,
        predictor: Predictor | None = None,
        *,
        limits: Limits | None = None,
        threads: int = 0,
        told: Told | None = None,
    ) -> None:
        """Without a `predictor` nothing is answered until one is swapped in. `threads`: torch's, 0 as this process has it."""
        self.limits = limits or Limits()
        self.in_use_since = 0.0
        """Seconds since the epoch."""
        self.swaps = 0
        self.batches = 0
        self._told, self._threads = told, threads
        self._predictor: Predictor | None = None
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._taken = self._preparing = 0
        self._closing = False
        self._sample_s = 0.02
        # Of a text's tokeniser one thread at a time may change the settings.
        self._words = threading.Lock()
        self._decoders = ThreadPoolExecutor(
            min(_MOST_DECODERS, usable_cpus()), thread_name_prefix="serve-prepare"
        )
        self._worker = threading.Thread(target=self._work, name="serve-compute", daemon=True)
        if predictor is not None:
            self.swap(predictor)
        self._worker.start()

    @property
    def predictor(self) -> Predictor | None:
        """The module that the next request gets."""
        return self._predictor

    @property
    def waiting(self) -> int:
        """Samples that were taken and are not answered yet."""
        return self._taken

    def swap(self, predictor: Predictor | None) -> None:
        """Put another module into use, once it has answered a first sample; None: nothing is answered from now on.

        Raises FedsplitError where it cannot answer; then the one before it stays.
        """
        if predictor is not None:
            blank = np.zeros((8, 8, 3), np.uint8) if predictor.kind == "image" else "a"
            _finite(predictor, predictor.outputs([predictor.prepare(blank)]))
        with self._changed:
            self.swaps += self._predictor is not None
            self._predictor, self.in_use_since = predictor, time.time()

    @contextmanager
    def place(self) -> Iterator[Place]:
        """Room for a request. Raises OverloadedError where there is none, ServiceError without a module or at the end."""
        if self._closing:
            raise ServiceError("the service is being stopped; ask again once it is up")
        place = Place(self)
        self._take(1)
        try:
            yield place
        finally:
            self._take(-place.samples)

    def submit(
        self, place: Place, read: Callable[[Predictor], Sequence[Sample]]
    ) -> Future[Answered]:
        """Answer the samples that `read`, called in another thread, gives for the module that answers them.

        The future raises what `read` raises, DataError for a sample that cannot be read, OverloadedError.
        """
        predictor = self._predictor
        if predictor is None:
            raise ServiceError("no module is in use here yet; ask again once one has been promoted")
        job = _Job(predictor, Future())
        with self._changed:
            self._preparing += 1
        try:
            self._decoders.submit(self._prepare, job, place, read)
        except RuntimeError as err:  # shut down
            self._prepared(None)
            raise ServiceError("the service is being stopped; ask again once it is up") from err
        return job.future

    def close(self) -> None:
        """Answer what was taken, and end."""
        self._closing = True
        self._decoders.shutdown(wait=True)
        with self._changed:
            self._changed.notify_all()
        self._worker.join()

    def _take(self, samples: int) -> None:
        with self._changed:
            if samples > 0 and self._taken + samples > self.limits.queue:
                wait_s = min(_MOST_RETRY_S, max(1.0, self._taken * self._sample_s))
                raise OverloadedError(
                    f"{self._taken} samples wait here, and {self.limits.queue} is the most; ask again in {wait_s:.0f} s",
                    retry_after_s=wait_s,
                )
            self._taken += samples

    def _prepare(
        self, job: _Job, place: Place, read: Callable[[Predictor], Sequence[Sample]]
    ) -> None:
        ready = None
        try:
            if job.future.set_running_or_notify_cancel():
                samples = read(job.predictor)
                place.grow(len(samples))
                job.prepared = self._all_prepared(job.predictor, samples)
                ready = job
        except BaseException as err:  # noqa: BLE001 - whoever asked gets it
            job.future.set_exception(err)
        finally:
            self._prepared(ready)

    def _all_prepared(self, predictor: Predictor, samples: Sequence[Sample]) -> list[Prepared]:
        found = []
        for i, sample in enumerate(samples, 1):
            try:
                if isinstance(sample, str):
                    with self._words:
                        found.append(predictor.prepare(sample))
                else:
                    found.append(predictor.prepare(sample))
            except DataError as err:
                raise DataError(f"sample {i}: {err}" if len(samples) > 1 else str(err)) from err
        return found

    def _prepared(self, job: _Job | None) -> None:
        with self._changed:
            self._preparing -= 1
            if job is not None:
                self._jobs.append(job)
            self._changed.notify_all()

    def _work(self) -> None:
        # A new thread has as many of OpenMP as the machine has cores until it is told otherwise.
        torch.set_num_threads(self._threads or torch.get_num_threads())
        while jobs := self._next():
            self.batches += 1
            self._answer(jobs)

    def _next(self) -> list[_Job]:
        """What is computed next, all of one module; empty at the end."""
        with self._changed:
            while not self._jobs:
                if self._closing and not self._preparing:
                    return []
                self._changed.wait()
            until = time.monotonic() + self.limits.window_s
            while self._preparing and sum(len(j.prepared) for j in self._jobs) < self.limits.batch:
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            jobs = [self._jobs.popleft()]
            size = len(jobs[0].prepared)
            while self._jobs and self._jobs[0].predictor is jobs[0].predictor:
                size += len(self._jobs[0].prepared)
                if size > self.limits.batch:
                    break
                jobs.append(self._jobs.popleft())
            return jobs

    def _answer(self, jobs: list[_Job]) -> None:
        predictor = jobs[0].predictor
        prepared = [one for job in jobs for one in job.prepared]
        began = time.monotonic()
        try:
            found = answers(predictor, self._outputs(predictor, prepared))
        except Exception as err:
            if len(jobs) > 1:
                # One request must not cost the others their answer.
                for job in jobs:
                    self._answer([job])
                return
            if not isinstance(err, FedsplitError):
                log.exception("samples could not be computed")
            jobs[0].future.set_exception(err)
            return
        took_s = (time.monotonic() - began) / max(1, len(prepared))
        self._sample_s += _NEW_WEIGHT * (took_s - self._sample_s)
        at = 0
        for job in jobs:
            job.future.set_result(Answered(predictor, found[at : at + len(job.prepared)]))
            at += len(job.prepared)
        self._tell(predictor, found)

    def _outputs(self, predictor: Predictor, prepared: Sequence[Prepared]) -> NDArray[np.float32]:
        size = self.limits.batch
        starts = range(0, len(prepared), size)
        parts = [predictor.outputs(prepared[at : at + size]) for at in starts]
        return _finite(predictor, np.concatenate(parts))

    def _tell(self, predictor: Predictor, found: Sequence[Answer]) -> None:
        if self._told is None:
            return
        try:
            self._told(predictor, found)
        except Exception:
            log.exception("what was answered could not be counted")


def _finite(predictor: Predictor, outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(outputs).all():
        raise ServiceError(
            f"the module {predictor.found.name} gives outputs that are no numbers; use another version of it"
        )
    return outputs

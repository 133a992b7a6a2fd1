"""One order carried out at a site: test, train, test again; or statistics, calibration, training alone.

What trains and what is sent is training/plan.py's; work.py opens the model, learning.py trains it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsplit.core.aggregation import Tensors
from fedsplit.core.orders import (
    DELTA,
    FIT,
    HELD_OUT,
    SCALARS,
    STATISTICS,
    Answer,
    Calibration,
    Incoming,
    LocalOnly,
    Outgoing,
    travelling_bytes,
)
from fedsplit.core.records import RoundMetrics
from fedsplit.core.scores import MAX_CONFUSED, Tally
from fedsplit.model import module
from fedsplit.model.module import ModuleTensors
from fedsplit.site.learning import learn, settings_of
from fedsplit.site.work import HELD, KEPT, PERSONAL, OpenModel, SiteWork
from fedsplit.training.closed_form import calibration, collect
from fedsplit.training.closed_form_start import ClosedFormStart
from fedsplit.training.round import train

# One training sample in so many is held out for the calibration.
HELD_OUT_OF = 5


@dataclass(frozen=True)
class SiteRound(SiteWork):
    """One order, carried out."""

    started: float = field(default_factory=time.perf_counter)
    loads_before: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "loads_before", self.kept.parts.loads)

    def carry_out(self, incoming: Incoming) -> Outgoing:
        """Do what the order says. Raises FedsplitError."""
        self.limit.planned = self.planned()
        tensors = self.module_of(incoming)
        received = incoming.bytes
        if self.order.kind == "local-only":
            return Outgoing(self._local_only(tensors))
        if self.order.kind == "statistics":
            return self._statistics(tensors, received)
        if self.order.kind == "calibrate":
            return self._calibrate(tensors, received)
        if self.order.kind == "evaluate":
            return self._evaluate(tensors, received)
        return self._train_round(tensors, received)

    def _train_round(self, tensors: ModuleTensors, received: int) -> Outgoing:
        """Test the module that came, train it, test it again; the delta and the numbers."""
        saved = self.state.load() if self.keeps_state else None
        start = tensors | self.resumed(saved)
        with self.opened(tensors) as run:
            before = self.tested(run, self.own.test)
            module.load(run.model.part, start)
            learnt = learn(self, run, start, saved)
            now = module.read(run.model.part)
            flops = self.flops(run)
        if learnt.scalars is not None:
            reply: dict[str, Tensors] = {SCALARS: {SCALARS: learnt.scalars}}
        else:
            reply = {DELTA: {n: now[n] - tensors[n] for n in self.plan.sent}}
        if self.keeps_state:
            kept = {f"{KEPT}/{n}": now[n] for n in self.plan.kept}
            personal = {f"{PERSONAL}/{n}": t for n, t in learnt.personal.items()}
            # By zeroth order a site that has its module needs no other one, only what happened since.
            held = tensors if self.config.train.gradient == "zeroth-order" else {}
            whole = {f"{HELD}/{n}": t for n, t in held.items()}
            self.state.save(self.order.round, kept | personal | whole)
        metrics = self._metrics(
            run, received, reply, before=before, after=learnt.test, loss=learnt.loss, flops=flops
        )
        rank = learnt.rank if learnt.rank != self.order.rank else 0
        return Outgoing(Answer(metrics=metrics, rank=rank), reply)

    def _evaluate(self, tensors: ModuleTensors, received: int) -> Outgoing:
        """The run's last test, which also tells which class is taken for which."""
        classes = len(self.spec.classes)
        counts = None
        if self.spec.numbers is None and classes <= MAX_CONFUSED:
            counts = torch.zeros(classes, classes, dtype=torch.int64)

        def count(logits_BC: Tensor, labels_B: Tensor) -> None:
            if counts is not None:
                one = torch.ones_like(labels_B)
                counts.index_put_((labels_B, logits_BC.argmax(dim=1)), one, accumulate=True)

        with self.opened(tensors) as run:
            before = self.tested(run, self.own.test, watch=count)
            flops = self.flops(run)
        metrics = self._metrics(run, received, {}, before=before, flops=flops)
        if counts is not None:
            rows = tuple(map(tuple, counts.tolist()))
            metrics = metrics.model_copy(update={"confusion": rows})
        return Outgoing(Answer(metrics=metrics))

    def _statistics(self, tensors: ModuleTensors, received: int) -> Outgoing:
        """Sums of features and of their products with labels, over the training samples.

        Where the classifier is to be calibrated, those of the held-out fifth come apart: a classifier is too
        sure of the samples that it was solved from.
        """
        with self.opened(tensors) as run:
            arrays = self._sums(run)
            run.tested += len(self.own.train)
            flops = self.flops(run)
        reply = {STATISTICS: arrays}
        metrics = self._metrics(run, received, reply, flops=flops)
        return Outgoing(Answer(metrics=metrics), reply)

    def _sums(self, run: OpenModel) -> dict[str, NDArray[np.float32]]:
        arrays: dict[str, NDArray[np.float32]] = {}
        for prefix, indices in zip((FIT, HELD_OUT), self._held_out(), strict=True):
            found = collect(run.model, self.batches(indices), run.flow, self.task)
            arrays |= {f"{prefix}/{n}": a for n, a in found.arrays().items()}
        return arrays

    def _calibrate(self, tensors: ModuleTensors, received: int) -> Outgoing:
        """The loss of the module that came over the held-out samples, at several temperatures."""
        _, held_out = self._held_out()
        with self.opened(tensors) as run:
            nll = calibration(run.model, self.batches(held_out), flow=run.flow)
            run.tested += len(held_out)
            flops = self.flops(run)
        metrics = self._metrics(run, received, {}, flops=flops)
        told = Calibration(site=self.site.name, nll=tuple(map(float, nll)), metrics=metrics)
        return Outgoing(told)

    def _held_out(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Training samples to solve from, and those to calibrate on: a fifth, none where nobody calibrates."""
        shuffled = np.random.default_rng(self.seed("held out")).permutation(self.own.train)
        share = len(shuffled) // HELD_OUT_OF if self.config.module.calibrate else 0
        return np.sort(shuffled[share:]), np.sort(shuffled[:share])

    def _local_only(self, tensors: ModuleTensors) -> LocalOnly:
        """Train alone for as many epochs as the whole run has, then test at home and everywhere."""
        with self.opened(tensors) as run:
            # A start-module has brought a classifier, which stays.
            fresh = not tensors[module.final_linear(self.backbone, self.spec)[0]].any()
            if fresh and self.config.module.classifier_init != "zero":
                module.load(run.model.part, tensors | self._own_start(run, tensors))
            rounds = range(1, self.config.train.rounds + 1)
            # Alone there is no average to stay near, and no rank to save traffic by.
            settings = settings_of(self, rounds).having(proximal_mu=0.0, rank_penalty=0.0)
            train(run.model, self.epoch, settings, **run.training)
            own = self.tested(run, self.own.test)
            everywhere = self.tested(run, self.own.test_everywhere)
        return LocalOnly(site=self.site.name, own=own, everywhere=everywhere)

    def _own_start(self, run: OpenModel, tensors: ModuleTensors) -> ModuleTensors:
        """The closed-form classifier of this site's own samples."""
        start = ClosedFormStart(self.config, self.backbone, self.spec, tensors)
        samples = len(self.own.train)
        start.add(self.site.name, self._sums(run), samples=samples, weight=samples)
        if self.config.module.calibrate:
            module.load(run.model.part, tensors | start.provisional())
            _, held_out = self._held_out()
            start.add_nll(list(calibration(run.model, self.batches(held_out), flow=run.flow)))
        return start.final()

    def _metrics(
        self,
        run: OpenModel,
        received: int,
        reply: Mapping[str, Tensors],
        *,
        before: Tally | None = None,
        after: Tally | None = None,
        loss: float | None = None,
        flops: int = 0,
    ) -> RoundMetrics:
        wait_s = run.meter.wait_s if run.meter else 0.0
        before = before or self.task.scoring.nothing
        return RoundMetrics(
            round=self.order.round,
            site=self.site.name,
            cut=self.order.cut,
            codec=self.config.link.codec,
            samples=len(self.own.train) if loss is not None else 0,
            test_samples=before.samples,
            sums_global=before.sums,
            sums_personal=after.sums if after else None,
            loss=loss,
            bytes_activation_up=run.encoder.bytes_up if run.encoder else 0,
            bytes_activation_down=run.encoder.bytes_down if run.encoder else 0,
            bytes_module_up=travelling_bytes(reply),
            bytes_module_down=received,
            steps=run.encoder.steps if run.encoder else 0,
            seconds_device=max(0.0, time.perf_counter() - self.started - wait_s),
            seconds_wait=wait_s,
            peak_rss_bytes=peak_rss_bytes(),
            flops_device=flops,
            process=self.kept.process,
            backbone_loads=self.kept.parts.loads - self.loads_before,
        )


def peak_rss_bytes() -> int:
    """The most memory this process ever held."""
    memory = psutil.Process().memory_info()
    if peak := getattr(memory, "peak_wset", 0):  # Windows
        return int(peak)
    try:
        # Linux: getrusage would start at the parent's peak, which fork hands down.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return int(memory.rss)

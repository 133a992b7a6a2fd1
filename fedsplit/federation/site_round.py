"""One order carried out at a site: test, train, test again; or statistics, calibration, training alone.

What trains and what is sent is plan.py's, how it trains is training's; here the two meet the site's data, its
state on disk and the encoder. Called by site.py.
"""

from __future__ import annotations

import functools
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypedDict

import numpy as np
import psutil
from flwr.app import RecordDict
from numpy.typing import NDArray

from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.directions import points
from fedsplit.core.errors import FederationError
from fedsplit.core.records import RoundMetrics
from fedsplit.federation import messages
from fedsplit.federation.dial import CountingEncoder, Dial
from fedsplit.federation.messages import Answer, Calibration, LocalOnly, Order
from fedsplit.federation.plan import Plan, plan
from fedsplit.federation.replay_log import caught_up
from fedsplit.federation.site_state import DEFAULT_FOLDER, Saved, SiteState
from fedsplit.federation.zeroth_order import zeroth_order
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec, ModuleTensors
from fedsplit.model.parts import borrowed_part
from fedsplit.model.split import SplitModel
from fedsplit.training import data
from fedsplit.training.activation_cache import ActivationCache, Place, version_of
from fedsplit.training.closed_form import calibration, collect
from fedsplit.training.flops import device_flops
from fedsplit.training.personal import (
    evaluate_ditto,
    evaluate_fed_rod,
    train_ditto,
    train_fed_rod,
)
from fedsplit.training.pipeline import Flow
from fedsplit.training.round import Score, TrainSettings, WaitMeter, evaluate, train
from fedsplit.training.site_data import SiteData, SiteSettings
from fedsplit.training.zeroth_order import train_zeroth_order

PERSONAL, KEPT, HELD = "personal", "kept", "held"
# One training sample in so many is held out for the calibration.
HELD_OUT_OF = 5


class _Training(TypedDict):
    meter: WaitMeter | None
    cache: Place | None


class _Testing(_Training):
    in_flight: int


@dataclass
class _Open:
    """A split model that is ready to run, and what it has done so far."""

    model: SplitModel
    meter: WaitMeter | None
    encoder: CountingEncoder | None
    cache: Place | None
    trained: int = 0
    """Sample passes forward and back."""
    tested: int = 0
    """Sample passes forward only."""


@dataclass(frozen=True)
class _Learnt:
    """What a round's training came to."""

    loss: float
    score: Score
    """On the site's own test samples, by what the site would use itself."""
    personal: ModuleTensors = field(default_factory=dict)
    scalars: NDArray[np.float32] | None = None
    """Zeroth order: the update, as one number a step and direction."""


@dataclass(frozen=True)
class SiteRound:
    """One order with all that it needs."""

    order: Order
    config: RunConfig
    site: SiteSettings
    backbone: Backbone
    own: SiteData
    dial: Dial
    started: float = field(default_factory=time.perf_counter)

    def carry_out(self, content: RecordDict) -> RecordDict:
        """Do what the order says. Raises FedsplitError."""
        tensors = self._module(content)
        received = messages.array_bytes(content)
        if self.order.kind == "local-only":
            return messages.write(messages.ANSWER, self._local_only(tensors))
        if self.order.kind == "statistics":
            return self._statistics(tensors, received)
        if self.order.kind == "calibrate":
            return self._calibrate(tensors, received)
        if self.order.kind == "evaluate":
            return self._evaluate(tensors, received)
        return self._train_round(tensors, received)

    def _module(self, content: RecordDict) -> ModuleTensors:
        """The module that came, or the one that the site kept with the rounds since replayed."""
        if self.order.held < 0:
            return messages.from_arrays(content, messages.MODULE)
        saved = self._state.load()
        kept = saved.under(HELD) if saved else {}
        # The module of an order is the one after the round before it.
        if saved is None or saved.round - 1 != self.order.held:
            raise FederationError(
                f"the server counts on the module of round {self.order.held}, which this site has no longer; the "
                f"whole module is sent from now on"
            )
        return caught_up(
            content,
            self.order,
            kept,
            config=self.config,
            backbone=self.backbone,
            spec=self._spec,
        )

    # The orders.

    def _train_round(self, tensors: ModuleTensors, received: int) -> RecordDict:
        """Test the module that came, train it, test it again; the delta and the numbers."""
        saved = self._state.load() if self._keeps_state else None
        start = tensors | self._resumed(saved)
        reply = RecordDict()
        with self._split_model(tensors) as run:
            before = self._score(run, self.own.test)
            module.load(run.model.part, start)
            learnt = self._learn(run, start, saved)
            now = module.read(run.model.part)
            flops = self._flops(run)
        if learnt.scalars is not None:
            reply[messages.SCALARS] = messages.to_arrays({messages.SCALARS: learnt.scalars})
        else:
            delta = {n: now[n] - tensors[n] for n in self._plan.sent}
            reply[messages.DELTA] = messages.to_arrays(delta)
        if self._keeps_state:
            kept = {f"{KEPT}/{n}": now[n] for n in self._plan.kept}
            personal = {f"{PERSONAL}/{n}": t for n, t in learnt.personal.items()}
            # By zeroth order a site that has its module needs no other one, only what happened since.
            held = tensors if self.config.gradient == "zeroth-order" else {}
            whole = {f"{HELD}/{n}": t for n, t in held.items()}
            self._state.save(self.order.round, kept | personal | whole)
        metrics = self._metrics(
            run, received, reply, before=before, after=learnt.score, loss=learnt.loss, flops=flops
        )
        return _with_answer(reply, Answer(metrics=metrics))

    def _evaluate(self, tensors: ModuleTensors, received: int) -> RecordDict:
        with self._split_model(tensors) as run:
            before = self._score(run, self.own.test)
            flops = self._flops(run)
        metrics = self._metrics(run, received, RecordDict(), before=before, flops=flops)
        return messages.write(messages.ANSWER, Answer(metrics=metrics))

    def _statistics(self, tensors: ModuleTensors, received: int) -> RecordDict:
        """Sums of features and of their products with labels, over the training samples.

        Where the classifier is to be calibrated, those of the held-out fifth come apart: a classifier is too
        sure of the samples that it was solved from.
        """
        reply = RecordDict()
        fit, held_out = self._held_out()
        with self._split_model(tensors) as run:
            arrays: dict[str, NDArray[np.float32]] = {}
            for prefix, indices in ((messages.FIT, fit), (messages.HELD_OUT, held_out)):
                found = collect(run.model, self._batches(indices), self._flow(run))
                arrays |= {f"{prefix}/{n}": a for n, a in found.arrays().items()}
            run.tested += len(self.own.train)
            flops = self._flops(run)
        reply[messages.STATISTICS] = messages.to_arrays(arrays)
        metrics = self._metrics(run, received, reply, flops=flops)
        return _with_answer(reply, Answer(metrics=metrics))

    def _calibrate(self, tensors: ModuleTensors, received: int) -> RecordDict:
        """The loss of the module that came over the held-out samples, at several temperatures."""
        _, held_out = self._held_out()
        with self._split_model(tensors) as run:
            nll = calibration(run.model, self._batches(held_out), flow=self._flow(run))
            run.tested += len(held_out)
            flops = self._flops(run)
        metrics = self._metrics(run, received, RecordDict(), flops=flops)
        told = Calibration(site=self.site.name, nll=tuple(map(float, nll)), metrics=metrics)
        return messages.write(messages.ANSWER, told)

    def _held_out(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Training samples to solve from, and those to calibrate on: a fifth, none where nobody calibrates."""
        shuffled = np.random.default_rng(self._seed("held out")).permutation(self.own.train)
        share = len(shuffled) // HELD_OUT_OF if self.config.calibrate else 0
        return np.sort(shuffled[share:]), np.sort(shuffled[:share])

    def _local_only(self, tensors: ModuleTensors) -> LocalOnly:
        """Train alone for as many epochs as the whole run has, then test at home and everywhere."""
        with self._split_model(tensors) as run:
            rounds = range(1, self.config.rounds + 1)
            # Alone there is no average to stay near.
            settings = replace(self._settings(rounds), proximal_mu=0.0)
            train(run.model, self._epoch, settings, **self._with(run))
            own = self._score(run, self.own.test)
            everywhere = self._score(run, self.own.test_everywhere)
        return LocalOnly(
            site=self.site.name,
            correct_own=own.correct,
            total_own=own.total,
            correct_everywhere=everywhere.correct,
            total_everywhere=everywhere.total,
        )

    # How it learns.

    def _learn(self, run: _Open, start: ModuleTensors, saved: Saved | None) -> _Learnt:
        """Train for the round's epochs; the model then holds what is the server's share of it."""
        run.trained += self.config.local_epochs * len(self.own.train)
        settings = self._settings([self.order.round])
        if self.config.gradient == "zeroth-order":
            zo = zeroth_order(self.config, site=self.site.name, round_=self.order.round)
            loss, scalars = train_zeroth_order(
                run.model, self._epoch, settings, zo, meter=run.meter, cache=run.cache
            )
            return _Learnt(loss, self._score(run, self.own.test), scalars=scalars)
        mine = saved.under(PERSONAL) if saved else {}
        if self.config.personalisation == "fed-rod":
            return self._fed_rod(run, settings, mine)
        loss = train(run.model, self._epoch, settings, **self._with(run))
        if self.config.personalisation == "ditto":
            return self._ditto(run, settings, start, mine, loss)
        return _Learnt(loss, self._score(run, self.own.test))

    def _ditto(
        self,
        run: _Open,
        settings: TrainSettings,
        start: ModuleTensors,
        mine: ModuleTensors,
        loss: float,
    ) -> _Learnt:
        """After the global module's own training: that of the personal copy, which costs as much again."""
        run.trained += self.config.local_epochs * len(self.own.train)
        state = train_ditto(
            run.model,
            self._epoch,
            settings,
            received=start,
            saved=mine,
            ditto_lambda=self.config.ditto_lambda,
            **self._with(run),
        )
        run.tested += len(self.own.test)
        batches = self._batches(self.own.test)
        score = evaluate_ditto(run.model, batches, state.tensors, **self._testing(run))
        return _Learnt(loss, score, state.tensors)

    def _fed_rod(self, run: _Open, settings: TrainSettings, mine: ModuleTensors) -> _Learnt:
        balanced = replace(settings, loss="balanced-softmax")
        loss, state = train_fed_rod(run.model, self._epoch, balanced, saved=mine, **self._with(run))
        run.tested += len(self.own.test)
        batches = self._batches(self.own.test)
        score = evaluate_fed_rod(run.model, batches, state.tensors, **self._testing(run))
        return _Learnt(loss, score, state.tensors)

    def _settings(self, rounds: Sequence[int]) -> TrainSettings:
        """How to train for the local epochs of all these rounds in one go."""
        c = self.config
        factors = [c.learning_rate_factor(r) for r in rounds]
        return TrainSettings(
            epochs=c.local_epochs * len(rounds),
            learning_rate=c.learning_rate,
            lora_learning_rate=c.lora_learning_rate,
            optimizer=c.optimizer,
            weight_decay=c.weight_decay,
            in_flight=c.in_flight,
            schedule=tuple(f for f in factors for _ in range(c.local_epochs)),
            loss=c.loss,
            class_counts=self._class_counts(),
            label_smoothing=c.label_smoothing,
            clip_norm=c.clip_norm,
            accumulate=c.accumulate,
            proximal_mu=c.proximal_mu,
            precision=c.precision,
            augmentation=c.augmentation,
            augmentation_key=f"{c.seed}/{self.site.name}/{self.order.round}",
            server_mode=c.encoder_training if self.order.stream else "frozen",
        )

    def _class_counts(self) -> tuple[int, ...]:
        labels = self.own.examples.labels[self.own.train]
        counts = np.bincount(labels, minlength=len(self.order.classes or ()))
        return tuple(int(count) for count in counts)

    # The split model and what goes through it.

    @contextmanager
    def _split_model(self, tensors: ModuleTensors) -> Iterator[_Open]:
        """The split model with what came, ready to train what the plan says; closed at the end."""
        with borrowed_part(self.backbone, self._cut, self._spec) as part:
            module.load(part, tensors)
            for name, parameter in module.parameters(part).items():
                parameter.requires_grad_(name in self._plan.trained)
            how = self.order.stream
            with self.dial(how, self.config, self.site) if how else nullcontext() as encoder:
                meter = WaitMeter(encoder) if encoder else None
                model = SplitModel(part, self._cut, meter)
                yield _Open(model, meter, encoder, self._place(model, tensors))

    def _place(self, model: SplitModel, tensors: ModuleTensors) -> Place | None:
        """Where activations of this module version are kept, if they are and can be."""
        if not self.config.cache_activations or model.head_trains():
            return None
        if self.config.encoder_training != "frozen":
            return None
        device = module.device_names(self.backbone, self._spec, self._cut)
        if self._cut.a == self._cut.b:
            classifier = self.backbone.family.classifier
            below = {n for n in device if n.split(".", 1)[0] not in classifier}
        else:
            tail = module.trained_names(self.backbone, self._spec, self._cut, head=False)
            below = device - tail
        head = version_of({n: tensors[n] for n in below})
        return _activations(self._source).at(self._cut, f"{self.order.encoder_digest}/{head}")

    def _score(self, run: _Open, indices: NDArray[np.int64]) -> Score:
        run.tested += len(indices)
        return evaluate(run.model, self._batches(indices), **self._testing(run))

    def _batches(self, indices: NDArray[np.int64]) -> Iterator[data.Batch]:
        return data.batches(
            self.own.examples, indices, self.own.transform, batch_size=self.config.batch_size
        )

    def _epoch(self, epoch: int) -> Iterator[data.Batch]:
        return data.batches(
            self.own.examples,
            self.own.train,
            self.own.transform,
            batch_size=self.config.batch_size,
            seed=self._seed(epoch),
        )

    def _seed(self, what: int | str) -> int:
        # It depends on the run's seed, the site and the round alone, so a resumed run and another engine see
        # the same batches.
        key = f"{self.config.seed}/{self.site.name}/{self.order.round}/{what}"
        return zlib.crc32(key.encode())

    def _with(self, run: _Open) -> _Training:
        return {"meter": run.meter, "cache": run.cache}

    def _testing(self, run: _Open) -> _Testing:
        return {"meter": run.meter, "cache": run.cache, "in_flight": self.config.in_flight}

    def _flow(self, run: _Open) -> Flow:
        return Flow(in_flight=self.config.in_flight, meter=run.meter, cache=run.cache)

    # What it keeps and what it reports.

    @property
    def _keeps_state(self) -> bool:
        c = self.config
        personal = c.personalisation != "none" or c.site_local != "none"
        return personal or c.sync_every > 1 or c.gradient == "zeroth-order"

    def _resumed(self, saved: Saved | None) -> ModuleTensors:
        """What the site goes on from in place of what the server sent."""
        if saved is None or saved.round >= self.order.round:
            return {}
        kept = saved.under(KEPT)
        if any(self.config.syncs(r) for r in range(saved.round + 1, self.order.round)):
            # An average was made without this site: what it had is out of date but for what is its own.
            return {n: t for n, t in kept.items() if n in self._plan.own}
        return {n: t for n, t in kept.items() if n in self._plan.trained}

    @functools.cached_property
    def _source(self) -> str:
        source = self.site.data or self.config.data
        return f"{self.order.run}/{source}/{self.config.image_size}/{self.backbone.sha256}"

    @functools.cached_property
    def _cut(self) -> Cut:
        return Cut.parse(self.order.cut)

    @functools.cached_property
    def _spec(self) -> ModuleSpec:
        return ModuleSpec.of(self.config, self.order.classes or (), rank=self.order.rank)

    @functools.cached_property
    def _plan(self) -> Plan:
        return plan(self.config, self.backbone, self._spec, self._cut, max(self.order.round, 1))

    @functools.cached_property
    def _state(self) -> SiteState:
        folder = self.site.state_dir or self.order.state_dir or DEFAULT_FOLDER
        return SiteState(Path(folder), run=self.order.run, site=self.site.name)

    def _flops(self, run: _Open) -> int:
        """What head and tail computed; a sample whose activations were kept cost no head."""
        c = self.config
        batch = next(self._batches(self.own.train[:1]))
        served = c.encoder_training if run.encoder else "frozen"
        return device_flops(
            run.model,
            batch,
            train_samples=run.trained,
            eval_samples=run.tested,
            cached_samples=run.cache.hits if run.cache else 0,
            estimator=c.zo_estimator if c.gradient == "zeroth-order" else None,
            queries=c.zo_queries,
            server_probes=len(points(c.zo_estimator, c.zo_queries))
            if served == "zeroth-order"
            else 0,
            server_trains=served in ("hosted", "shared"),
        )

    def _metrics(
        self,
        run: _Open,
        received: int,
        reply: RecordDict,
        *,
        before: Score | None = None,
        after: Score | None = None,
        loss: float | None = None,
        flops: int = 0,
    ) -> RoundMetrics:
        wait_s = run.meter.wait_s if run.meter else 0.0
        return RoundMetrics(
            round=self.order.round,
            site=self.site.name,
            cut=self.order.cut,
            codec=self.config.codec,
            samples=len(self.own.train) if loss is not None else 0,
            test_samples=before.total if before else 0,
            correct_global=before.correct if before else 0,
            correct_personal=after.correct if after else None,
            loss=loss,
            bytes_activation_up=run.encoder.bytes_up if run.encoder else 0,
            bytes_activation_down=run.encoder.bytes_down if run.encoder else 0,
            bytes_module_up=messages.array_bytes(reply),
            bytes_module_down=received,
            steps=run.encoder.steps if run.encoder else 0,
            seconds_device=max(0.0, time.perf_counter() - self.started - wait_s),
            seconds_wait=wait_s,
            peak_rss_bytes=peak_rss_bytes(),
            flops_device=flops,
        )


@functools.lru_cache(maxsize=2)
def _activations(key: str) -> ActivationCache:
    """One run's activations in this process; in simulation those of all its sites, which share no sample."""
    del key
    return ActivationCache()


def _with_answer(reply: RecordDict, answer: Answer) -> RecordDict:
    reply[messages.ANSWER] = messages.write(messages.ANSWER, answer)[messages.ANSWER]
    return reply


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

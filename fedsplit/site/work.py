"""What every order at a site stands on: its settings, data, state on disk, and a split model ready to run."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.directions import points
from fedsplit.core.errors import FederationError
from fedsplit.core.orders import HISTORY, MODULE, Incoming, Order
from fedsplit.core.scores import Tally
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec, ModuleTensors
from fedsplit.model.split import SplitModel
from fedsplit.site.kept import Kept
from fedsplit.site.state import DEFAULT_FOLDER, Saved, SiteState
from fedsplit.site.time_limit import TimeLimit
from fedsplit.training import data
from fedsplit.training.activation_cache import CacheView, version_of
from fedsplit.training.dial import CountingEncoder, Dial
from fedsplit.training.pipeline import Flow
from fedsplit.training.plan import Plan, plan
from fedsplit.training.replay import caught_up, history_shapes
from fedsplit.training.round import Adjust, WaitMeter, Watch, evaluate
from fedsplit.training.site_data import SiteData
from fedsplit.training.site_settings import SiteSettings
from fedsplit.training.task import CLASSIFICATION, Regression, Task

# What a site's state holds: its personal model, what it goes on from, the module that it was sent.
PERSONAL, KEPT, HELD = "personal", "kept", "held"


class Training(TypedDict):
    """What training calls take beside the model."""

    meter: WaitMeter | None
    cache: CacheView | None


class Testing(Training):
    """What test calls take beside the model."""

    in_flight: int


@dataclass
class OpenModel:
    """A split model that is ready to run, and what it has done so far."""

    model: SplitModel
    meter: WaitMeter | None
    encoder: CountingEncoder | None
    cache: CacheView | None
    in_flight: int
    trained: int = 0
    """Sample passes forward and back."""
    tested: int = 0
    """Sample passes forward only."""

    @property
    def training(self) -> Training:
        """Arguments of training calls."""
        return {"meter": self.meter, "cache": self.cache}

    @property
    def testing(self) -> Testing:
        """Arguments of test calls."""
        return {"meter": self.meter, "cache": self.cache, "in_flight": self.in_flight}

    @property
    def flow(self) -> Flow:
        """The same for passes without a loss."""
        return Flow(in_flight=self.in_flight, meter=self.meter, cache=self.cache)


@dataclass(frozen=True)
class SiteWork:
    """One order and all that it needs."""

    order: Order
    config: RunConfig
    site: SiteSettings
    backbone: Backbone
    own: SiteData
    dial: Dial
    kept: Kept
    run: str = ""
    """The run as this site knows it: another one each time that it is started or resumed."""
    limit: TimeLimit = field(default_factory=TimeLimit)

    def module_of(self, incoming: Incoming) -> ModuleTensors:
        """The module that came, or the one that the site kept with the rounds since replayed."""
        if self.order.held < 0:
            shapes = module.shapes(self.backbone, self.spec)
            held = module.device_names(self.backbone, self.spec, self.cut)
            return incoming.arrays(MODULE, {n: shapes[n] for n in held})
        saved = self.state.load()
        kept = saved.under(HELD) if saved else {}
        # The module of an order is the one after the round before it.
        if saved is None or saved.round - 1 != self.order.held:
            raise FederationError(
                f"the server counts on the module of round {self.order.held}, which this site has no longer; the "
                f"whole module is sent from now on"
            )
        return caught_up(
            incoming.arrays(HISTORY, history_shapes(self.order, self.config)),
            self.order,
            kept,
            config=self.config,
            backbone=self.backbone,
            spec=self.spec,
        )

    def resumed(self, saved: Saved | None) -> ModuleTensors:
        """What the site goes on from in place of what the server sent."""
        if saved is None:
            return {}
        kept = saved.under(KEPT)
        # A round that is done again after a resume starts from what the server sends, but for what is the site's.
        again = saved.round >= self.order.round
        if again or any(
            self.config.train.syncs(r) for r in range(saved.round + 1, self.order.round)
        ):
            # An average was made without this site: what it had is out of date but for what is its own.
            return {n: t for n, t in kept.items() if n in self.plan.own}
        return {n: t for n, t in kept.items() if n in self.plan.trained}

    @contextmanager
    def opened(self, tensors: ModuleTensors) -> Iterator[OpenModel]:
        """The split model with what came, ready to train what the plan says; closed at the end."""
        with self.kept.parts.borrowed(self.backbone, self.cut, self.spec) as part:
            module.load(part, tensors)
            for name, parameter in module.parameters(part).items():
                parameter.requires_grad_(name in self.plan.trained)
            how = self.order.stream
            with self.dial(how, self.config, self.site) if how else nullcontext() as encoder:
                meter = WaitMeter(encoder) if encoder else None
                model = SplitModel(part, self.cut, meter)
                yield OpenModel(
                    model, meter, encoder, self._cache(model, tensors), self.config.link.in_flight
                )

    def _cache(self, model: SplitModel, tensors: ModuleTensors) -> CacheView | None:
        """Where activations of this module version are kept, if they are and can be."""
        if not self.config.link.cache_activations or model.head_trains():
            return None
        if self.config.placement.encoder_training != "frozen":
            return None
        # By depth, not by what trains: FLoRA's merged deltas of the tail never do, and yet change each round.
        head = version_of(
            {n: t for n, t in tensors.items() if module.depth(self.backbone, n) < self.cut.a}
        )
        return self.kept.activations.at(
            self.cut,
            f"{self.order.encoder_digest}/{head}",
            source=(self.order.run, self.own.identity),
            run=self.run,
            round_=self.order.round,
        )

    def tested(
        self,
        run: OpenModel,
        indices: NDArray[np.int64],
        *,
        adjust: Adjust | None = None,
        watch: Watch | None = None,
    ) -> Tally:
        """The test of what the model holds on these samples; `adjust` and `watch` as in `evaluate`."""
        run.tested += len(indices)
        batches = self.batches(indices)
        return evaluate(
            run.model, batches, adjust=adjust, watch=watch, task=self.task, **run.testing
        )

    def batches(self, indices: NDArray[np.int64]) -> Iterator[data.Batch]:
        """These samples in their order."""
        return self.limit.timed(
            data.batches(
                self.own.examples,
                indices,
                self.own.transform,
                batch_size=self.config.train.batch_size,
            )
        )

    def epoch(self, epoch: int | str) -> Iterator[data.Batch]:
        """The training samples in the epoch's order."""
        return self.limit.timed(
            data.batches(
                self.own.examples,
                self.own.train,
                self.own.transform,
                batch_size=self.config.train.batch_size,
                seed=self.seed(epoch),
            )
        )

    def planned(self) -> int:
        """Samples that will pass through the device, about."""
        c, train, test = self.config, len(self.own.train), len(self.own.test)
        if self.order.kind in ("statistics", "calibrate"):
            return train
        if self.order.kind == "evaluate":
            return test
        if self.order.kind == "local-only":
            return (
                c.train.rounds * c.train.local_epochs * train + test + len(self.own.test_everywhere)
            )
        epochs = (
            c.train.local_epochs
            * (2 if c.train.personalisation == "ditto" else 1)
            * c.train.keep_hardest
        )
        before = c.train.local_loss_epochs + (1 if c.train.keep_hardest < 1 else 0)
        return round((epochs + before) * train) + 2 * test

    def seed(self, what: int | str) -> int:
        """A seed that depends on the run's, the site and the round alone: a resumed run draws the same."""
        key = f"{self.config.run.seed}/{self.site.name}/{self.order.round}/{what}"
        return zlib.crc32(key.encode())

    def class_counts(self) -> tuple[int, ...]:
        """Training samples a class."""
        labels = self.own.examples.labels[self.own.train]
        counts = np.bincount(labels, minlength=len(self.order.classes or ()))
        return tuple(int(count) for count in counts)

    def flops(self, run: OpenModel) -> int:
        """What head and tail computed; a sample whose activations were kept cost no head."""
        c = self.config
        batch = next(self.batches(self.own.train[:1]))
        served = c.placement.encoder_training if run.encoder else "frozen"
        return self.kept.flops.of_round(
            run.model,
            batch,
            train_samples=run.trained,
            eval_samples=run.tested,
            cached_samples=run.cache.hits if run.cache else 0,
            estimator=c.train.zo_estimator if c.train.gradient == "zeroth-order" else None,
            queries=c.train.zo_queries,
            server_probes=len(points(c.train.zo_estimator, c.train.zo_queries))
            if served == "zeroth-order"
            else 0,
            server_trains=served in ("hosted", "shared"),
        )

    @property
    def keeps_state(self) -> bool:
        """Does the site go on from something of its own in its next round?"""
        c = self.config
        personal = c.train.personalisation != "none" or c.train.site_local != "none"
        return personal or c.train.sync_every > 1 or c.train.gradient == "zeroth-order"

    @functools.cached_property
    def task(self) -> Task:
        """What a label is, and what follows from it."""
        if self.config.task.target == "class":
            return CLASSIFICATION
        if self.order.scale is None:
            raise FederationError(
                f"an order to {self.order.kind} on numbers came without their scale; install the same fedsplit version on "
                f"both ends"
            )
        return Regression(self.order.scale)

    @functools.cached_property
    def cut(self) -> Cut:
        """The order's cut."""
        return Cut.parse(self.order.cut)

    @functools.cached_property
    def spec(self) -> ModuleSpec:
        """The module at this site's rank."""
        order = self.order
        return ModuleSpec.of(
            self.config.module, order.classes or (), rank=order.rank, numbers=order.scale
        )

    @functools.cached_property
    def plan(self) -> Plan:
        """What trains and what is sent."""
        return plan(self.config, self.backbone, self.spec, self.cut, max(self.order.round, 1))

    @functools.cached_property
    def state(self) -> SiteState:
        """This site's file."""
        # A path of the machine that simulates all sites: at a deployed site an order names no folder.
        told = self.order.state_dir if self.site.partition is not None else ""
        folder = self.site.state_dir or told or DEFAULT_FOLDER
        return SiteState(
            Path(folder), run=self.order.run, site=self.site.name, key=self.order.run_key
        )

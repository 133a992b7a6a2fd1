"""The sites of one process: what they do with an order, and what they keep. Nothing of Flower, gRPC or the server."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from fedsplit import __version__
from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.errors import BackboneError, ConfigError, DataError
from fedsplit.core.foreign import printable
from fedsplit.core.memory import give_back
from fedsplit.core.notes import fit
from fedsplit.core.orders import Incoming, NotHeld, Order, Outgoing, RollCall
from fedsplit.core.proxies import proxy_variable
from fedsplit.core.versions import installed
from fedsplit.model.backbone import Backbone
from fedsplit.model.store import BackboneStore, Fetch
from fedsplit.model.threads import limit_threads
from fedsplit.site import state
from fedsplit.site.kept import MB, Kept
from fedsplit.site.round import SiteRound
from fedsplit.site.time_limit import TimeLimit
from fedsplit.site.warming import warm
from fedsplit.training.data.sides import Record
from fedsplit.training.dial import Dial, dial_stream
from fedsplit.training.site_data import SiteData, with_text_notes
from fedsplit.training.site_settings import SiteSettings


@dataclass(frozen=True)
class SiteRuntime:
    """Carries out orders: for one message, for a simulation's sites in one process, or for years."""

    dial: Dial = dial_stream
    kept: Kept = field(default_factory=Kept)
    log: logging.Logger = field(default_factory=lambda: logging.getLogger(__name__))
    """Where the site's own people read what leaves it."""
    fetch: Fetch | None = None
    """Brings what a cut needs and the site's `backbone-dir` lacks; None: nobody does."""
    resident: bool = True
    """Does it outlive a message? False: at a deployed site each message starts a process with another one."""

    def carry_out(
        self,
        whole: SiteSettings,
        order: Order,
        incoming: Incoming,
        *,
        limit: TimeLimit,
        run_id: int,
    ) -> Outgoing:
        """Do what an order says, as the site of these settings. Raises FedsplitError.

        `run_id`: another one each time that a run is started or resumed.
        """
        config = RunConfig.resolved(order.config, of_order=True)
        site = whole.for_task(config)
        if site is None:
            return _not_held(whole, order, config)
        limit_threads(site.threads)
        self.kept.limit(site.memory_mb * MB)
        try:
            return self._carry_out(whole, site, order, config, incoming, limit, run_id)
        finally:
            for note in self.kept.notes():
                self.log.warning("site %s: %s", site.name, note)
            if site.data:  # In simulation it would only take time.
                give_back()

    def _carry_out(
        self,
        whole: SiteSettings,
        site: SiteSettings,
        order: Order,
        config: RunConfig,
        incoming: Incoming,
        limit: TimeLimit,
        run_id: int,
    ) -> Outgoing:
        cut = _cut(order, site, config)
        backbone = self._backbone(site, order.backbone_sha256, config.placement.backbone, cut)
        if order.backbone_sha256 != backbone.sha256:
            raise BackboneError(
                f"site {site.name!r}: backbone {backbone.path} has digest {backbone.sha256[:12]}, the server's "
                f"has {order.backbone_sha256[:12]} ({backbone.differs(order.backbone_sha256)}); copy the server's "
                f"model files to this site"
            )
        run = f"{run_id}/{order.run}"
        record = _record(site, run) if site.data else None
        own = self.kept.sources.open(config, site, backbone, order.classes, record, run=run)
        if order.kind == "roll-call":
            # Its own number, not that among the sites which hold the task.
            number = whole.partition[0] if whole.partition else -1
            return Outgoing(self._roll_call(config, site, number, backbone, own))
        work = SiteRound(
            order, config, site, backbone, own, self.dial, self.kept, f"{run_id}", limit
        )
        return work.carry_out(incoming)

    def warm(self, site: SiteSettings, *, backbone: str = "", sha256: str = "") -> None:
        """Load what the site's first order will want, as far as it is known; the log says what was not, and why.

        `backbone`: a directory or name; `sha256`: its digest in the site's `backbone-dir`. Never raises.
        """
        find = functools.partial(self._backbone, site, sha256, backbone, site.cut)
        warm(self.kept, site, find if backbone or sha256 else None, log=self.log)

    def _backbone(
        self, site: SiteSettings, sha256: str, name: str, cut: Cut | None = None
    ) -> Backbone:
        """The run's backbone: by its digest in the site's own store, else by the name that the run has for it.

        With all that `cut` needs; None: nobody knows yet where it will be cut.
        """
        if not site.backbone_dir:
            return Backbone.find(name)
        try:
            store = BackboneStore(Path(site.backbone_dir), fetch=self.fetch)
            return Backbone.find(str(store.ready(sha256, cut)))
        except BackboneError as err:
            with contextlib.suppress(BackboneError):
                if (found := Backbone.find(name)).sha256 == sha256:
                    return found
            raise BackboneError(
                f"site {site.name!r}: {err} (and {printable(name)} is no such backbone on this machine either)"
            ) from err

    def _roll_call(
        self, config: RunConfig, site: SiteSettings, number: int, backbone: Backbone, own: SiteData
    ) -> RollCall:
        own = with_text_notes(own)
        if site.data:
            self._tell(site, own)
        if site.cut is not None:
            site.cut.check(backbone.blocks)
        try:
            return RollCall(
                site=site.name,
                cut=str(site.cut) if site.cut is not None else "",
                rank=site.lora_rank,
                classes=own.examples.classes,
                samples=len(own.train),
                test_samples=len(own.test),
                backbone_sha256=backbone.sha256,
                fedsplit_version=__version__,
                versions=installed(),
                number=number,
                pixel_max=own.examples.pixel_max,
                spread=own.spread,
                notes=fit(
                    (
                        *own.notes,
                        *self._process_note(site),
                        *_proxy_note(site.encoder_address or config.link.encoder_address),
                    )
                ),
            )
        except ValidationError as err:
            first = err.errors()[0]
            raise DataError(
                f"site {site.name!r} cannot take part with {first['loc'][0]}: {printable(first['msg'])}"
            ) from err

    def _process_note(self, site: SiteSettings) -> tuple[str, ...]:
        # A simulation's processes are not the site's affair, and stay for the run.
        if self.resident or site.partition is not None:
            return ()
        return (
            "each message starts a process here, which loads Python, torch and the backbone anew: some 10 s a round; "
            "`fedsplit site run` keeps one process (docs/how-to/two-machines.md)",
        )

    def _tell(self, site: SiteSettings, own: SiteData) -> None:
        """Write into the site's log what leaves it of the labels, before it does."""
        if (spread := own.spread) is not None:
            self.log.info(
                "site %s tells the server of the numbers of its %d training samples: mean %g, deviation %g",
                site.name, len(own.train), spread.mean, spread.deviation,
            )  # fmt: skip
            self._tell_notes(site, own)
            return
        counts = np.bincount(own.examples.labels, minlength=len(own.examples.classes))
        told = ", ".join(
            f"{printable(name)} ({count})"
            for name, count in zip(own.examples.classes, counts, strict=True)
        )
        self.log.info(
            "site %s tells the server its classes: %s", site.name, printable(told, limit=2000)
        )
        self._tell_notes(site, own)

    def _tell_notes(self, site: SiteSettings, own: SiteData) -> None:
        for note in own.notes:
            self.log.info("site %s: %s", site.name, printable(note))


def _cut(order: Order, site: SiteSettings, config: RunConfig) -> Cut | None:
    """Where the order cuts the backbone; at roll call that is known where the site or the run has one cut."""
    if order.cut:
        return Cut.parse(order.cut)
    cuts = {site.cut} if site.cut else set(config.placement.cuts)
    return cuts.pop() if len(cuts) == 1 else None


def _not_held(site: SiteSettings, order: Order, config: RunConfig) -> Outgoing:
    """That the task is none of this site's. Raises ConfigError where it is ordered to work on it all the same."""
    if order.kind != "roll-call":
        raise ConfigError(
            f"site {site.name!r} does not hold task {config.task.name!r} and was ordered to {order.kind}; it must "
            f"not lose a task while the run lasts, see tasks in its node config"
        )
    return Outgoing(NotHeld(site=site.name, task=config.task.name))


def _record(site: SiteSettings, run: str) -> Record:
    """What a real site keeps of its samples. A run that is resumed is a new one to Flower, and gets a new list."""
    return Record(Path(site.state_dir or state.DEFAULT_FOLDER), site.name, run)


def _proxy_note(address: str) -> tuple[str, ...]:
    """That a proxy stands before the encoder, which gRPC does not say when it fails there."""
    variable = proxy_variable(address, os.environ)
    if not variable:
        return ()
    return (
        f"{variable} is set where the SuperNode runs, and catches the encoder's address {address}; if the encoder is not "
        f"reached, add its host to no_proxy there",
    )

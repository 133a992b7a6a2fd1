"""A site's side of a Flower message: do what the order says and answer. Called by client_app/app.py.

Imports nothing of the server: no strategy, no encoder host, no gRPC server.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from flwr.app import Context, Message, RecordDict

from fedsplit import __version__
from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.errors import BackboneError, ConfigError, FedsplitError, OverloadedError
from fedsplit.core.records import RoundMetrics
from fedsplit.federation import messages
from fedsplit.federation.messages import Answer, LocalOnly, Order, RollCall, Stream
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec
from fedsplit.model.split import SplitModel, device_part
from fedsplit.training import data
from fedsplit.training.round import Score, TrainSettings, WaitMeter, evaluate, train
from fedsplit.training.site_data import SiteData, SiteSettings, open_site
from fedsplit.transport.client import StreamEncoder
from fedsplit.transport.wiring import ClientTls


def answer(message: Message, context: Context) -> Message:
    """Carry out the order of a message; a typed error becomes a reply that names it."""
    try:
        order = messages.read(message.content, messages.ORDER, Order)
        content = _carry_out(order, message.content, context)
    except FedsplitError as err:
        name = str(context.node_config.get("site", ""))
        if not name and "partition-id" in context.node_config:
            name = f"site-{context.node_config['partition-id']}"
        return messages.fault_reply(err, message, site=name)
    return Message(content, reply_to=message)


def _carry_out(order: Order, content: RecordDict, context: Context) -> RecordDict:
    if order.fedsplit_version != __version__:
        raise ConfigError(
            f"the server runs fedsplit {order.fedsplit_version}, this site {__version__}; install the "
            f"same version on both"
        )
    site = SiteSettings.from_node(context.node_config, node_id=context.node_id)
    config = RunConfig.from_flat(order.config)
    if site.threads:
        torch.set_num_threads(site.threads)
    backbone = Backbone.find(config.backbone)
    if order.backbone_sha256 != backbone.sha256:
        raise BackboneError(
            f"site {site.name!r}: backbone {backbone.path} has digest {backbone.sha256[:12]}, the server's "
            f"has {order.backbone_sha256[:12]}; copy the server's model files to this site"
        )
    own = open_site(config, site, backbone, order.classes)
    if order.kind == "roll-call":
        return messages.write(messages.ANSWER, _roll_call(site, own, backbone))
    work = _Round(order, config, site, backbone, own)
    tensors = messages.from_arrays(content, messages.MODULE)
    received = messages.array_bytes(content)
    if order.kind == "local-only":
        return messages.write(messages.ANSWER, work.local_only(tensors))
    return work.federated(tensors, received)


def _roll_call(site: SiteSettings, own: SiteData, backbone: Backbone) -> RollCall:
    if site.cut is not None:
        site.cut.check(backbone.blocks)
    return RollCall(
        site=site.name,
        cut=str(site.cut) if site.cut is not None else "",
        classes=own.examples.classes,
        samples=len(own.train),
        test_samples=len(own.test),
        backbone_sha256=backbone.sha256,
        fedsplit_version=__version__,
        number=site.partition[0] if site.partition else -1,
    )


@dataclass(frozen=True)
class _Round:
    """One order with all that it needs."""

    order: Order
    config: RunConfig
    site: SiteSettings
    backbone: Backbone
    own: SiteData

    def federated(self, tensors: module.ModuleTensors, received: int) -> RecordDict:
        """Evaluate the global module, train it, evaluate it again; the delta and the numbers."""
        start = time.perf_counter()
        trains = self.order.kind == "train"
        with self._split_model(tensors) as (model, meter, stream):
            before = self._score(model, self.own.test, meter)
            loss = self._train(model, [self.order.round], meter) if trains else None
            after = self._score(model, self.own.test, meter) if trains else None
            names = {n for n, p in module.parameters(model.part).items() if p.requires_grad}
            now = module.read(model.part)
        content = RecordDict()
        if trains:
            delta = {n: now[n] - tensors[n] for n in names}
            content[messages.DELTA] = messages.to_arrays(delta)
        wait_s = meter.wait_s if meter else 0.0
        metrics = RoundMetrics(
            round=self.order.round,
            site=self.site.name,
            cut=self.order.cut,
            codec=self.config.codec,
            samples=len(self.own.train) if trains else 0,
            test_samples=before.total,
            correct_global=before.correct,
            correct_personal=after.correct if after else None,
            loss=loss,
            bytes_activation_up=stream.bytes_up if stream else 0,
            bytes_activation_down=stream.bytes_down if stream else 0,
            bytes_module_up=messages.array_bytes(content),
            bytes_module_down=received,
            steps=stream.steps if stream else 0,
            seconds_device=max(0.0, time.perf_counter() - start - wait_s),
            seconds_wait=wait_s,
            peak_rss_bytes=peak_rss_bytes(),
        )
        part = messages.write(messages.ANSWER, Answer(metrics=metrics))
        content[messages.ANSWER] = part[messages.ANSWER]
        return content

    def local_only(self, tensors: module.ModuleTensors) -> LocalOnly:
        """Train alone for as many epochs as the whole run has, then test at home and everywhere."""
        with self._split_model(tensors) as (model, meter, _):
            self._train(model, list(range(1, self.config.rounds + 1)), meter)
            own = self._score(model, self.own.test, meter)
            everywhere = self._score(model, self.own.test_everywhere, meter)
        return LocalOnly(
            site=self.site.name,
            correct_own=own.correct,
            total_own=own.total,
            correct_everywhere=everywhere.correct,
            total_everywhere=everywhere.total,
        )

    @contextmanager
    def _split_model(self, tensors: module.ModuleTensors) -> Iterator[tuple[Any, Any, Any]]:
        """(split model, wait meter or None, stream or None), the stream closed at the end."""
        cut = Cut.parse(self.order.cut)
        part = device_part(self.backbone, cut, ModuleSpec.of(self.config, self.order.classes or ()))
        module.load(part, tensors)
        if not self.config.trains_head(cut):
            module.freeze_head(part, cut.a)
        if self.order.stream is None:
            yield SplitModel(part, cut, None), None, None
            return
        with self._dial(self.order.stream) as stream:
            meter = WaitMeter(stream)
            yield SplitModel(part, cut, meter), meter, stream

    def _dial(self, how: Stream) -> StreamEncoder:
        """Open the round's stream; where the encoder is full, come back when it says so."""
        ca = self.site.encoder_tls_ca or how.ca_file
        # Half the round must be left for the work itself.
        give_up = time.monotonic() + self.config.deadline_s / 2
        while True:
            try:
                return StreamEncoder(
                    how.address,
                    how.token,
                    how.grant,
                    codec=self.config.codec,
                    tls=self._tls(ca) if how.tls else None,
                    max_in_flight=self.config.in_flight,
                    allow_insecure=self.config.encoder_insecure,
                )
            except OverloadedError as err:
                if time.monotonic() + err.retry_after_s > give_up:
                    raise
                time.sleep(err.retry_after_s)

    def _tls(self, ca: str) -> ClientTls | None:
        return ClientTls.of(ca or "system", self.site.encoder_tls_cert, self.site.encoder_tls_key)

    def _score(self, model: SplitModel, indices: Any, meter: WaitMeter | None) -> Score:
        batches = data.batches(
            self.own.examples, indices, self.own.transform, batch_size=self.config.batch_size
        )
        return evaluate(model, batches, in_flight=self.config.in_flight, meter=meter)

    def _train(self, model: SplitModel, rounds: list[int], meter: WaitMeter | None) -> float:
        """Train for the local epochs of all these rounds in one go."""
        factors = [self.config.learning_rate_factor(r) for r in rounds]
        settings = TrainSettings(
            epochs=self.config.local_epochs * len(rounds),
            learning_rate=self.config.learning_rate,
            lora_learning_rate=self.config.lora_learning_rate,
            optimizer=self.config.optimizer,
            weight_decay=self.config.weight_decay,
            in_flight=self.config.in_flight,
            schedule=tuple(f for f in factors for _ in range(self.config.local_epochs)),
        )
        return train(model, self._epoch, settings, meter=meter)

    def _epoch(self, epoch: int) -> Iterator[data.Batch]:
        # The order depends on the run's seed, the site and the round alone, so a resumed run and another
        # engine see the same batches.
        key = f"{self.config.seed}/{self.site.name}/{self.order.round}/{epoch}"
        return data.batches(
            self.own.examples,
            self.own.train,
            self.own.transform,
            batch_size=self.config.batch_size,
            seed=zlib.crc32(key.encode()),
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

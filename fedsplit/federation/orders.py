"""What each site is asked in a round: its order, the module tensors of its device, and its grant at the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import Message

from fedsplit import __version__
from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Grant
from fedsplit.federation import messages
from fedsplit.federation.endpoint import Endpoint
from fedsplit.federation.messages import Kind, Order, RollCall
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec, ModuleTensors


@dataclass(frozen=True)
class Site:
    """One site of the run."""

    name: str
    node_id: int
    cut: Cut
    call: RollCall


@dataclass(frozen=True, kw_only=True)
class Orders:
    """Makes the messages of a run."""

    run: str
    config: RunConfig
    backbone: Backbone
    spec: ModuleSpec
    sites: Sequence[Site]
    endpoint: Endpoint

    def version(self, round_: int) -> str:
        """The name under which a round's module is published to the encoder."""
        return f"{self.run}/{round_}"

    def deadline_s(self, kind: Kind) -> float:
        """How long sites have for one order; training alone is the whole run's work at once."""
        return self.config.deadline_s * (self.config.rounds if kind == "local-only" else 1)

    def messages(self, kind: Kind, round_: int, tensors: ModuleTensors) -> list[Message]:
        """One message a site."""
        return [self._message(site, kind, round_, tensors) for site in self.sites]

    def _message(self, site: Site, kind: Kind, round_: int, tensors: ModuleTensors) -> Message:
        stream = None
        if not site.cut.local(self.backbone.blocks):
            grant = self._grant(site, kind, round_)
            stream = self.endpoint.stream_for(grant, deadline_s=self.deadline_s(kind))
        order = Order(
            kind=kind,
            run=self.run,
            round=round_,
            fedsplit_version=__version__,
            config=self.config.flat_for_sites(),
            classes=self.spec.classes,
            cut=str(site.cut),
            backbone_sha256=self.backbone.sha256,
            stream=stream,
        )
        content = messages.write(messages.ORDER, order)
        held = module.device_names(self.backbone, self.spec, site.cut)
        content[messages.MODULE] = messages.to_arrays({n: tensors[n] for n in held})
        return Message(
            content,
            site.node_id,
            "evaluate" if kind == "evaluate" else "train",
            # A site that was away must not start on a round that is over.
            ttl=self.deadline_s(kind),
            group_id=str(round_),
        )

    def _grant(self, site: Site, kind: Kind, round_: int) -> Grant:
        epochs = self.config.local_epochs * (self.config.rounds if kind == "local-only" else 1)
        tests = sum(s.call.test_samples for s in self.sites)
        samples = epochs * site.call.samples + 3 * tests
        return Grant(
            run=self.run,
            site=site.name,
            task=self.config.task,
            round=round_,
            a=site.cut.a,
            b=site.cut.b,
            version=self.version(round_),
            backbone_sha256=self.backbone.sha256,
            fedsplit_version=__version__,
            max_batch=self.config.batch_size,
            max_tokens=self.backbone.max_tokens(self.config.image_size, self.config.max_length),
            # Twice what the round needs: last batches are smaller, and a retry must not run dry.
            max_steps=2 * (samples // self.config.batch_size + 1) + 64,
        )

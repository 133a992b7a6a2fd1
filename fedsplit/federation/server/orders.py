"""What each site is asked in a round: its order, the module tensors of its device, and its grant at the encoder."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import Message, RecordDict

from fedsplit import __version__
from fedsplit.core.aggregation import capped
from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.encoder import EncoderTraining, Grant
from fedsplit.core.lora_rules import Rule
from fedsplit.core.orders import HISTORY, MODULE, Order, OrderKind, RollCall
from fedsplit.federation import messages
from fedsplit.federation.server.books.replay_log import ReplayLog
from fedsplit.federation.server.endpoint import Endpoint
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec, ModuleTensors
from fedsplit.training.activation_cache import version_of as digest_of
from fedsplit.training.plan import Plan, plan
from fedsplit.training.replay import direction_seed


@dataclass
class Site:
    """One site of the run. It is its name; attendance.py says at which node it is."""

    name: str
    node_id: int
    cut: Cut
    rank: int
    call: RollCall


def round_name(round_: int) -> str:
    """For people: round 0 is what comes before the first one."""
    return f"round {round_}" if round_ else "the start"


# How long after its deadline an order still takes an answer: word of how late it is.
LATE_S = 60.0
# A site may take the steps of so many times the samples that it counts for.
STEPS_FOR = 10
# Orders that only test or measure.
_FORWARD: tuple[OrderKind, ...] = ("evaluate", "statistics", "calibrate")


@dataclass(frozen=True, kw_only=True)
class Orders:
    """Makes the messages of a run."""

    run: str
    run_key: str
    config: RunConfig
    backbone: Backbone
    spec: ModuleSpec
    rule: Rule
    sites: Sequence[Site]
    endpoint: Endpoint
    log: ReplayLog
    simulated: bool = False
    state_dir: str = ""
    ranks: dict[str, int] = field(default_factory=dict)
    """Ranks of the sites that have pruned their own."""
    repeated: set[int] = field(default_factory=set)
    """Rounds that are done once more."""

    def version(self, round_: int) -> str:
        """The name under which a round's module is published to the encoder.

        The second time it is another one: a site that still works on the first order must not step the new copies.
        """
        return f"{self.run}/{round_}" + ("/again" if round_ in self.repeated else "")

    def begin_again(self, round_: int) -> None:
        """The round is done once more: what came of it the first time is nothing to replay."""
        self.repeated.add(round_)
        self.log.forget(round_)

    def deadline_s(self, kind: OrderKind) -> float:
        """How long sites have for one order; training alone is the whole run's work at once."""
        return self.config.server.deadline_s * (
            self.config.train.rounds if kind == "local-only" else 1
        )

    def received(self, site: Site, tensors: ModuleTensors) -> ModuleTensors:
        """What a site receives of the module: the tensors of its device, at its rank."""
        held = module.device_names(self.backbone, self.spec, site.cut)
        return self.rule.for_site({n: tensors[n] for n in sorted(held)}, self.rank(site))

    def rank(self, site: Site) -> int:
        """A site's LoRA rank of now."""
        return self.ranks.get(site.name, site.rank)

    def plan(self, site: Site, round_: int) -> Plan:
        """What a site trains and sends in a round."""
        spec = replace(self.spec, rank=self.rank(site))
        return plan(self.config, self.backbone, spec, site.cut, round_)

    @property
    def all_local(self) -> bool:
        """Does no site need the encoder?"""
        return all(site.cut.local(self.backbone.blocks) for site in self.sites)

    def messages(
        self,
        kind: OrderKind,
        round_: int,
        tensors: ModuleTensors,
        sites: Sequence[Site] | None = None,
        *,
        only: Site | None = None,
    ) -> Iterator[Message]:
        """One message a site of `sites`, each made when it is asked for; or `only` for one of them, once more."""
        digests: dict[Cut, str] = {}
        chosen = self.sites if sites is None else sites
        weights = self.weights(chosen)
        for site in chosen if only is None else [only]:
            if site.cut not in digests:
                held = module.device_names(self.backbone, self.spec, site.cut)
                digests[site.cut] = digest_of({n: t for n, t in tensors.items() if n not in held})
            yield self._message(site, kind, round_, tensors, digests[site.cut], weights)

    def _message(
        self,
        site: Site,
        kind: OrderKind,
        round_: int,
        tensors: ModuleTensors,
        encoder_digest: str,
        weights: Mapping[str, int],
    ) -> Message:
        """`weights`: what the sites that are asked count for."""
        stream = None
        if not site.cut.local(self.backbone.blocks):
            grant = self._grant(site, kind, round_, weights)
            stream = self.endpoint.stream_for(grant, deadline_s=self.deadline_s(kind))
        order = Order(
            kind=kind,
            run=self.run,
            run_key=self.run_key,
            round=round_,
            fedsplit_version=__version__,
            config=self.config.flat_for_sites(),
            classes=self.spec.classes,
            scale=self.spec.numbers,
            cut=str(site.cut),
            rank=self.rank(site),
            backbone_sha256=self.backbone.sha256,
            stream=stream,
            encoder_digest=encoder_digest,
            # A simulation's sites wait for one another, and that is no lateness of theirs.
            deadline_s=0 if self.simulated else self.deadline_s(kind),
            state_dir=self.state_dir,
        )
        return Message(
            self._content(order, site, self.received(site, tensors)),
            site.node_id,
            "evaluate" if kind == "evaluate" else "train",
            # A site that was away must not start on a round that is over; one that is late may still say so.
            ttl=self.deadline_s(kind) + (0 if self.simulated else LATE_S),
            group_id=str(round_),
        )

    def _content(self, order: Order, site: Site, tensors: ModuleTensors) -> RecordDict:
        """The order with the module, or with what a site that kept an earlier one needs to get there."""
        known = self.log.since(site.name, order.round)
        module_bytes = sum(t.nbytes for t in tensors.values())
        if known is not None and sum(a.nbytes for a in known[1].values()) < module_bytes:
            held, arrays, history = known
            order = order.model_copy(
                update={
                    "held": held,
                    "history": tuple(history),
                    "module_digest": digest_of(tensors),
                }
            )
            content = messages.write(messages.ORDER, order)
            content[HISTORY] = messages.packed(arrays)
            return content
        content = messages.write(messages.ORDER, order)
        content[MODULE] = messages.packed(tensors)
        return content

    def weights(self, sites: Sequence[Site]) -> dict[str, int]:
        """What each of these sites counts for beside the others."""
        return capped({s.name: s.call.samples for s in sites}, self.config.server.max_site_share)

    def _grant(self, site: Site, kind: OrderKind, round_: int, weights: Mapping[str, int]) -> Grant:
        epochs = self.config.train.local_epochs * (
            self.config.train.rounds if kind == "local-only" else 1
        )
        if self.config.train.personalisation == "ditto":
            epochs *= 2
        # With a trained head each perturbed forward of the device is a step of its own.
        forwards = (
            2 * self.config.train.zo_queries + 1 if self.config.train.gradient != "exact" else 1
        )
        size = self.config.train.batch_size
        # What sites say of themselves is no ground to let them ask for anything.
        most = {name: STEPS_FOR * weight for name, weight in self.weights(self.sites).items()}
        epoch = math.ceil(min(site.call.samples, most[site.name]) / size)
        tests = sum(min(s.call.test_samples, self._most_tests(most[s.name])) for s in self.sites)
        steps = forwards * epochs * epoch + math.ceil(3 * tests / size)
        if self.config.train.keep_hardest < 1:
            steps += epoch
        return Grant(
            run=self.run,
            site=site.name,
            task=self.config.task.name,
            round=round_,
            a=site.cut.a,
            b=site.cut.b,
            version=self.version(round_),
            backbone_sha256=self.backbone.sha256,
            fedsplit_version=__version__,
            max_batch=self.config.train.batch_size,
            max_tokens=self.backbone.max_tokens(
                self.config.task.image_size, self.config.task.max_length, self.spec.prompts
            ),
            # Twice what the round needs: a retry must not run dry.
            max_steps=2 * steps + 64,
            training=None if kind in _FORWARD else self._training(site, kind, round_, weights),
        )

    def _most_tests(self, samples: int) -> int:
        """The most test samples that go with so many training samples, or more of each."""
        share = self.config.task.test_fraction
        return math.ceil(samples * max(1.0, share / (1 - share)))

    def _training(
        self, site: Site, kind: OrderKind, round_: int, weights: Mapping[str, int]
    ) -> EncoderTraining | None:
        """What the encoder trains for a site in a round."""
        c = self.config
        if c.placement.encoder_training == "frozen":
            return None
        # Sites draw directions of their own; sessions of a shared copy must agree on everything.
        zeroth = c.placement.encoder_training == "zeroth-order"
        seed = direction_seed(c, site=site.name, round_=round_) if zeroth else 0
        # Who trains alone shares no copy.
        alone = kind == "local-only" and c.placement.encoder_training == "shared"
        drawn = sampled_block(c, site=site.name, cut=site.cut, round_=round_)
        return EncoderTraining.of(
            c.train,
            "hosted" if alone else c.placement.encoder_training,
            round_,
            lora="B" if c.module.lora_aggregation == "ffa" else "both",
            weight=weights[site.name] / sum(weights.values()),
            leave=drawn if kind == "train" else 0,
            seed=seed,
        )


def sampled_block(config: RunConfig, *, site: str, cut: Cut, round_: int) -> int:
    """The block after which a site's steps of a round leave the encoder; 0 where blocks are not sampled."""
    if not config.placement.block_sampling:
        return 0
    key = zlib.crc32(f"{config.run.seed}/{site}/{round_}/block".encode())
    first = max(config.placement.block_sampling, cut.a + 1)
    return int(np.random.default_rng(key).integers(first, cut.b, endpoint=True))

"""Before the first round: wait for the sites, ask each who it is, deal the cuts.

A site that cannot take part is left out here, by name and with its reason; `min-sites` decides whether the
rest is enough. A site that does not hold the run's task is none of its sites: neither a fault nor an absence.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import Message
from flwr.common.logger import LOGGER_NAME
from flwr.serverapp import Grid

from fedsplit import __version__
from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.errors import FederationError, FedsplitError
from fedsplit.core.foreign import printable
from fedsplit.core.notes import fit
from fedsplit.core.versions import differences, installed
from fedsplit.federation import messages
from fedsplit.federation.exchange import Post, exchange
from fedsplit.federation.ledger import Ledger
from fedsplit.federation.messages import NotHeld, Order, RollCall
from fedsplit.federation.orders import Site
from fedsplit.model.backbone import Backbone

_log = logging.getLogger(LOGGER_NAME)


@dataclass(frozen=True, kw_only=True)
class RollCaller:
    """Finds out who takes part in a run."""

    run: str
    config: RunConfig
    backbone: Backbone
    grid: Grid
    ledger: Ledger
    simulated: bool
    """All nodes of a simulation are there from the start, so nobody waits for more."""
    on_waiting: Callable[[str], None]
    """Told how many sites are connected."""
    classes: tuple[str, ...] | None = None
    """The classes that are settled before the sites are asked; None: those of the settings, else the sites' own."""

    def sites(self) -> list[Site]:
        """Everyone who takes part, in the order in which cuts are dealt. Raises FederationError."""
        return self._roll_call(self._wait_for_nodes())

    def _wait_for_nodes(self) -> list[int]:
        wanted = self.config.sites or self.config.min_sites
        end = time.monotonic() + (0.0 if self.simulated else self.config.deadline_s)
        nodes: list[int] = []
        while len(nodes) < wanted:
            found = sorted(self.grid.get_node_ids())
            if found != nodes or not found:
                nodes = found
                of = f" of {wanted}" if len(nodes) <= wanted else ""
                text = f"{len(nodes)}{of} sites are connected"
                self.on_waiting(text)
                _log.info("%s", text)
            if time.monotonic() >= end:
                break
            time.sleep(0.5)
        if self.simulated and len(nodes) < wanted:
            raise FederationError(
                f"sites={wanted} are wanted, the simulation has {len(nodes)}; start it with "
                f"--federation-config 'num-supernodes={wanted}'"
            )
        if len(nodes) < self.config.min_sites:
            raise FederationError(
                f"{len(nodes)} sites are connected after {self.config.deadline_s:g} s, "
                f"min-sites={self.config.min_sites} are wanted; start flower-supernode on the missing ones"
            )
        for number in range(len(nodes), wanted):
            self.ledger.absent(0, f"(site {number + 1} of {wanted})", "it was not connected")
        return nodes

    def _roll_call(self, nodes: list[int]) -> list[Site]:
        """Ask every node who it is; deal the cuts in the order of the sites' numbers and names."""
        orders = {str(node): self._roll_call_order(node) for node in nodes}
        calls: dict[int, RollCall] = {}
        answered = set()
        without: list[str] = []
        for name, reply in exchange(
            Post(self.grid), orders.items(), deadline_s=self.config.deadline_s
        ):
            answered.add(name)
            if (other := self._not_held(reply)) is not None:
                without.append(other)
                continue
            fault = messages.fault_of(reply)
            try:
                call = self._call_of(reply)
            except FedsplitError as err:
                reason = str(err)
            else:
                if call.site not in {c.site for c in calls.values()}:
                    calls[int(name)] = call
                    continue
                reason = f"another site is called {call.site!r} too; give each its own name"
            who = fault.site if fault and fault.site else f"node {name}"
            self.ledger.absent(0, who, reason)
            _log.warning("%s left out: %s", who, reason)
        for name in sorted(orders.keys() - answered):
            self.ledger.absent(0, f"node {name}", "no answer to the roll call")
        if without and len(without) == len(nodes):
            raise FederationError(
                f"none of the {len(nodes)} sites holds task {self.config.task!r}; name it in task-holders, or in "
                f"tasks of a site's node config"
            )
        if len(calls) < self.config.min_sites:
            # Most reasons name their site themselves.
            why = "; ".join(
                f"{site}: {reason.removeprefix(f'site {site!r}: ')}"
                for _, site, reason in self.ledger.absences
            )
            others = (
                f" ({len(without)} more do not hold task {self.config.task!r})" if without else ""
            )
            raise FederationError(
                f"{len(calls)} of {len(nodes) - len(without)} sites can take part, "
                f"min-sites={self.config.min_sites} are wanted{others}{': ' if why else ''}{why}"
            )
        ordered = sorted(calls.items(), key=lambda item: (item[1].number, item[1].site))
        # Centralised training is one site's, which in simulation holds everybody's samples.
        ordered = ordered[: 1 if self.config.method == "centralised" else self.config.sites or None]
        return [self._site(node, call, i) for i, (node, call) in enumerate(ordered)]

    def _not_held(self, reply: Message) -> str | None:
        """The name of a site that does not hold the task; None for any other answer."""
        if reply.has_error() or messages.NOT_HELD not in reply.content.config_records:
            return None
        try:
            told = messages.read(reply.content, messages.NOT_HELD, NotHeld)
        except FedsplitError:
            return None  # An answer like any other that cannot be read.
        return told.site if told.task == self.config.task else None

    def _call_of(self, reply: Message) -> RollCall:
        """What a site says of itself. Raises FedsplitError when it cannot take part."""
        if (fault := messages.fault_of(reply)) is not None:
            raise FederationError(fault.message)
        call = messages.read(reply.content, messages.ANSWER, RollCall)
        if call.fedsplit_version != __version__:
            raise FederationError(
                f"it runs fedsplit {printable(call.fedsplit_version)}, the server {__version__}; install the same "
                f"version on both"
            )
        if call.cut:
            self._check_cut(Cut.parse(call.cut))
        if call.rank > self.config.lora_rank:
            raise FederationError(
                f"its lora-rank={call.rank} is above the run's lora-rank={self.config.lora_rank}, the largest; "
                f"lower it in the site's node config"
            )
        others = differences(call.versions, installed())
        return call.model_copy(update={"notes": fit([*others, *call.notes])})

    def _check_cut(self, cut: Cut) -> None:
        """Raise FederationError unless a site's own cut fits backbone and method."""
        placement = self.config.method_description.placement
        local = cut.local(self.backbone.blocks)
        if placement != "any" and local != (placement == "device"):
            wanted = "runs the whole model on the device" if placement == "device" else "is a split"
            raise FederationError(
                f"its cut={cut} does not fit method={self.config.method}, which {wanted}; leave cut out of the "
                f"site's node config"
            )

    def _roll_call_order(self, node: int) -> Message:
        order = Order(
            kind="roll-call",
            run=self.run,
            round=0,
            fedsplit_version=__version__,
            config=self.config.flat_for_sites(),
            classes=self.classes or self.config.class_names,
            cut="",
            rank=self.config.lora_rank,
            backbone_sha256=self.backbone.sha256,
            stream=None,
        )
        return Message(messages.write(messages.ORDER, order), node, "query", group_id="0")

    def _site(self, node: int, call: RollCall, place: int) -> Site:
        cuts, ranks = self.config.cuts_on(self.backbone.blocks), self.config.ranks
        cut = Cut.parse(call.cut) if call.cut else cuts[place % len(cuts)]
        self.ledger.calls[call.site] = call
        for note in call.notes:
            _log.info("%s: %s", call.site, note)
        self.ledger.cuts[call.site] = str(cut)
        return Site(call.site, node, cut, call.rank or ranks[place % len(ranks)], call)

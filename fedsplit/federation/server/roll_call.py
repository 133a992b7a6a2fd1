"""Before the first round: wait for the sites, ask each who it is, deal the cuts.

A node is asked as soon as it is connected. A site that cannot take part is left out here, by name and with its reason;
`min-sites` decides whether the rest is enough. No site, and so neither a fault nor an absence: one that does not hold the
run's task, one that `roster` does not name, and a node that is gone before it has said its name (where a SuperNode was
killed, Flower takes its number for connected for a minute more).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.common.logger import LOGGER_NAME
from flwr.serverapp import Grid

from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.errors import FederationError, FedsplitError
from fedsplit.core.foreign import printable
from fedsplit.core.notes import by_reason, fit
from fedsplit.core.orders import RollCall
from fedsplit.federation.server.between_sites import differences_between
from fedsplit.federation.server.books.ledger import Ledger
from fedsplit.federation.server.exchange import POLL_S, Post, gone
from fedsplit.federation.server.orders import Site
from fedsplit.federation.server.question import Question

_log = logging.getLogger(LOGGER_NAME)

_CONNECT_POLL_S = 0.5
# Once all sites that are wanted have answered: how long the other nodes that were asked may still say who they are.
GRACE_S = 15.0


@dataclass
class Heard:
    """What the nodes have said so far, in the order in which they answered."""

    here: set[int] = field(default_factory=set)
    """Nodes that were connected at the last look."""
    asked: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)
    """Asked, and not connected any more."""
    silent: set[int] = field(default_factory=set)
    """Asked, and no answer in time."""
    calls: dict[int, RollCall] = field(default_factory=dict)
    without: dict[int, str] = field(default_factory=dict)
    """Names of sites that do not hold the task."""
    faults: dict[int, tuple[str, str]] = field(default_factory=dict)
    """(name or "", reason) of those that cannot take part."""

    @property
    def answers(self) -> int:
        """How many nodes have answered, whatever they said."""
        return len(self.calls) + len(self.without) + len(self.faults)

    @property
    def names(self) -> set[str]:
        """The sites that have answered."""
        told = {call.site for call in self.calls.values()} | set(self.without.values())
        return told | {name for name, _ in self.faults.values() if name}


@dataclass(frozen=True, kw_only=True)
class RollCaller:
    """Finds out who takes part in a run."""

    question: Question
    grid: Grid
    ledger: Ledger
    on_waiting: Callable[[str], None]
    """Told how many sites are connected."""
    known: Mapping[str, int] = field(default_factory=dict)
    """Names of sites and the nodes that had them in the run before."""
    asked: set[int] = field(default_factory=set)
    """Every node that was asked and is not gone, once `sites` has been called."""
    claims: dict[int, RollCall] = field(default_factory=dict)
    """Those of them that say a name which another one has."""

    @property
    def config(self) -> RunConfig:
        """The run's settings."""
        return self.question.config

    def sites(self) -> list[Site]:
        """Everyone who takes part, in the order in which cuts are dealt. Raises FederationError."""
        if self.question.simulated:
            self._check_simulation(len(list(self.grid.get_node_ids())))
        heard = self._gather()
        nodes = heard.asked - heard.gone
        self.asked.update(nodes)
        if len(nodes) < self.config.server.min_sites:
            raise FederationError(
                f"{len(nodes)} sites are connected after {self.config.server.deadline_s:g} s, "
                f"min-sites={self.config.server.min_sites} are wanted; start flower-supernode on the missing ones"
            )
        calls = self._named(heard)
        self._note_absences(heard)
        self._check_enough(heard, len(calls))
        ordered = sorted(calls.items(), key=lambda item: (item[1].number, item[1].site))
        # Centralised training is one site's, which in simulation holds everybody's samples.
        gathers = self.config.run.method_description.gathers
        most = 1 if gathers else len(ordered)
        if self.config.server.sites and not self.config.server.roster_names:
            most = min(most, self.config.server.sites)
        if not gathers:
            for _, call in ordered[most:]:
                self._absent(
                    call.site,
                    f"sites={most} are wanted and {len(ordered)} answered, the first by name take part; name those "
                    f"that are to in roster, or raise sites",
                )
        part = ordered[:most]
        self._tell_between(part)
        return [self.note(self.placed(node, call, i)) for i, (node, call) in enumerate(part)]

    def _tell_between(self, part: list[tuple[int, RollCall]]) -> None:
        """What differs between sites joins the notes of those that it is about."""
        for sites, text in differences_between({call.site: call for _, call in part}):
            for i, (node, call) in enumerate(part):
                if call.site in sites:
                    part[i] = node, call.model_copy(update={"notes": fit([text, *call.notes])})

    def _check_simulation(self, nodes: int) -> None:
        wanted = self.config.server.wanted_sites
        if nodes < wanted:
            raise FederationError(
                f"sites={wanted} are wanted, the simulation has {nodes}; start it with "
                f"--federation-config 'num-supernodes={wanted}'"
            )

    def _gather(self) -> Heard:
        """Ask every node as it comes, until all that are wanted have answered or the time is over."""
        post, heard = Post[int](self.grid), Heard()
        deadline_s = self.config.server.deadline_s
        end = time.monotonic() + (0.0 if self.question.simulated else deadline_s)
        complete_at: float | None = None
        shown = ""
        while True:
            heard.here = set(self.grid.get_node_ids())
            # Who comes back after it was gone, as a computer that slept does, is asked anew.
            heard.asked -= heard.gone - heard.here
            for node in sorted(heard.here - heard.asked):
                heard.asked.add(node)
                heard.gone.discard(node)
                if not post.send(node, self.question.order(node)):
                    heard.gone.add(node)
            shown = self._show(len(heard.here), shown)
            before = heard.answers
            for sent, reply in post.replies():
                self._hear(sent.whose, reply, heard)
            now = time.monotonic()
            awaited = any(sent.age_s < deadline_s for sent in post.out.values())
            if self._complete(heard):
                complete_at = now if complete_at is None else complete_at
                # Where all that are connected are wanted, all of them are waited for.
                grace = GRACE_S if self.config.server.expected_sites else deadline_s
                if not awaited or now - complete_at > grace:
                    break
            elif now >= end and not awaited:
                break
            if heard.answers == before:
                time.sleep(POLL_S if post.out else _CONNECT_POLL_S)
        heard.silent = {sent.whose for sent in post.out.values()}
        return heard

    def _complete(self, heard: Heard) -> bool:
        """Have all the sites that are wanted answered, well or not?"""
        if roster := self.config.server.roster_names:
            nameless = sum(1 for name, _ in heard.faults.values() if not name)
            return len(set(roster) - heard.names) <= nameless
        return heard.answers >= self.config.server.wanted_sites

    def _show(self, nodes: int, shown: str) -> str:
        """Tell how many are connected, once a change."""
        wanted = self.config.server.wanted_sites
        of = f" of {wanted}" if nodes <= wanted else ""
        if (text := f"{nodes}{of} sites are connected") != shown:
            self.on_waiting(text)
            _log.info("%s", text)
        return text

    def _hear(self, node: int, reply: Message, heard: Heard) -> None:
        if gone(reply):
            heard.gone.add(node)
            _log.info("node %s was gone before it said its name", node)
        elif (other := self.question.not_held(reply)) is not None:
            heard.without[node] = other
        else:
            try:
                heard.calls[node] = self.question.call_of(reply)
            except FedsplitError as err:
                heard.faults[node] = (self.question.name_of(reply), str(err))

    def _named(self, heard: Heard) -> dict[int, RollCall]:
        """One node a name: who has it is who had it in the run before, else who said it first. All others are told."""
        calls: dict[int, RollCall] = {}
        for name in dict.fromkeys(call.site for call in heard.calls.values()):
            if self.config.server.roster_names and name not in self.config.server.roster_names:
                _log.info("%s passed over: roster does not name it", printable(name))
                continue
            claims = [node for node, call in heard.calls.items() if call.site == name]
            # Stable: the first of those that are alike.
            claims.sort(key=lambda n: (n not in heard.here, n != self.known.get(name)))
            calls[claims[0]] = heard.calls[claims[0]]
            for node in claims[1:]:
                if node in heard.here:
                    self.claims[node] = heard.calls[node]
                    self._absent(
                        f"node {node}",
                        f"another site is called {name!r} too; give each its own name",
                    )
            if self.known.get(name, claims[0]) != claims[0]:
                self._tell(
                    f"{printable(name)}: another node than in the run before says this name; where its SuperNode was "
                    f"not restarted without a key, look who it is"
                )
        if not self.question.simulated:
            _log.info(
                "names are what the nodes say: in this run each is held by the node that has it now, which only a key "
                "of its SuperNode binds to a machine"
            )
        return calls

    def _note_absences(self, heard: Heard) -> None:
        roster = self.config.server.roster_names
        for node, (name, reason) in heard.faults.items():
            if not roster or not name or name in roster:
                self._absent(name or f"node {node}", reason)
        if self._complete(heard):
            for node in sorted(heard.silent):
                _log.warning("node %s has not said who it is and takes no part", node)
        else:
            for node in sorted(heard.silent):
                self._absent(f"node {node}", "no answer to the roll call")
        nodes, wanted = len(heard.asked - heard.gone), self.config.server.wanted_sites
        if roster:
            for name in roster:
                if name not in heard.names:
                    self._absent(name, "it was not connected, or did not answer the roll call")
        else:
            for number in range(nodes, wanted):
                self._absent(f"(site {number + 1} of {wanted})", "it was not connected")

    def _check_enough(self, heard: Heard, useful: int) -> None:
        nodes, without = len(heard.asked - heard.gone), len(heard.without)
        if without and without == nodes:
            raise FederationError(
                f"none of the {nodes} sites holds task {self.config.task.name!r}; name it in task-holders, in "
                f"tasks of a site's node config, or as the task in a site.toml"
            )
        if useful >= self.config.server.min_sites:
            return
        told = by_reason((site, reason) for _, site, reason in self.ledger.absences)
        why = "; ".join(f"{', '.join(sorted(sites))}: {reason}" for reason, sites in told.items())
        others = f" ({without} more do not hold task {self.config.task.name!r})" if without else ""
        raise FederationError(
            f"{useful} of {nodes - without} sites can take part, "
            f"min-sites={self.config.server.min_sites} are wanted{others}{': ' if why else ''}{why}"
        )

    def _absent(self, who: str, reason: str) -> None:
        self.ledger.absent(0, who, reason)
        _log.warning("%s left out: %s", printable(who), printable(reason))

    def _tell(self, note: str) -> None:
        self.ledger.note(note)
        _log.warning("%s", note)

    def placed(self, node: int, call: RollCall, place: int) -> Site:
        """The site that a node is, with the cut and the rank that are dealt to its place in the row."""
        cuts, ranks = self.config.cuts_on(self.question.backbone.blocks), self.config.module.ranks
        cut = Cut.parse(call.cut) if call.cut else cuts[place % len(cuts)]
        return Site(call.site, node, cut, call.rank or ranks[place % len(ranks)], call)

    def note(self, site: Site) -> Site:
        """Write a site of the run into its books."""
        self.ledger.calls[site.name] = site.call
        for note in site.call.notes:
            _log.info("%s: %s", site.name, note)
        self.ledger.cuts[site.name] = str(site.cut)
        return site

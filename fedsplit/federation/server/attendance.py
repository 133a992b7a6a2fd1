"""Where the sites of a run are while it lasts: a SuperNode that is restarted comes back under another number.

A site is its name. Nodes that were not there before are asked for theirs, beside a round's own
messages; one that says a name of the run takes that site's place once the node that had it is gone,
never before: who shouts a name must not push out the site that has it. One that says another name is newcomers.py's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from fedsplit.core.errors import FedsplitError
from fedsplit.core.foreign import printable
from fedsplit.core.orders import RollCall
from fedsplit.federation.server.books.ledger import Ledger
from fedsplit.federation.server.exchange import POLL_S, Post, gone
from fedsplit.federation.server.newcomers import Newcomers
from fedsplit.federation.server.orders import Site
from fedsplit.federation.server.question import Question

# How often Flower is asked for its nodes while a round waits.
LOOK_S = 3.0


class Attendance:
    """The sites of a run and the nodes that they are at now."""

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        asked: Iterable[int],
        claims: Mapping[int, RollCall],
        grid: Grid,
        question: Question,
        ledger: Ledger,
        on_update: Callable[[str], None],
    ) -> None:
        """`sites` is what the roll call found among the nodes `asked`; `claims`: other nodes that say a site's name."""
        self.sites = list(sites)
        """Grows between rounds, where newcomers join."""
        self.newcomers: Newcomers | None = None
        """Whoever says a name that is not of the run; None: it can take part in the next one."""
        self._grid, self._question, self._ledger = grid, question, ledger
        self._say = on_update
        self._seen = set(asked)
        self._post = Post[int](grid)
        self._claims: dict[int, RollCall] = {}
        """Nodes that say the name of a site whose own node is still connected."""
        self._next_look = 0.0
        for node, call in claims.items():
            if _by_name(self.sites, call.site) is not None:
                self._claim(node, call)

    def look(self) -> list[Site]:
        """The sites that are at another node since the last look. Takes no time where nobody is new."""
        if self._question.simulated or time.monotonic() < self._next_look:
            return []
        self._next_look = time.monotonic() + LOOK_S
        here = set(self._grid.get_node_ids())
        for node in sorted(here - self._seen):
            if self._post.send(node, self._question.order(node)):
                self._seen.add(node)
        for sent, reply in self._post.replies():
            self._hear(sent.whose, reply)
        return [site for node in list(self._claims) if (site := self._settled(node, here))]

    def begin_round(self) -> None:
        """Take in the newcomers that are still connected."""
        self.look()
        if self.newcomers is not None:
            self.newcomers.take_in(set(self._grid.get_node_ids()))

    def wait_for(self, count: int, *, timeout_s: float) -> int:
        """Wait until `count` sites are connected, by whatever node; how many are."""
        end = time.monotonic() + timeout_s
        while True:
            self.look()
            here = set(self._grid.get_node_ids())
            found = sum(site.node_id in here for site in self.sites)
            if found >= count or time.monotonic() >= end:
                return found
            time.sleep(POLL_S)

    def _hear(self, node: int, reply: Message) -> None:
        if gone(reply):
            # It is asked anew where it comes back.
            self._seen.discard(node)
            return
        if self._question.not_held(reply) is not None:
            return
        try:
            call = self._question.call_of(reply)
        except FedsplitError as err:
            self._say(f"a node that came while the run lasts takes no part: {printable(str(err))}")
        else:
            self._claim(node, call)

    def _claim(self, node: int, call: RollCall) -> None:
        """A node says that it is a site."""
        site = _by_name(self.sites, call.site)
        if site is None and self.newcomers is not None:
            self._say(self.newcomers.hear(node, call))
        elif site is None:
            self._say(
                f"{printable(call.site)} came while the run lasts; it can take part in the next one"
            )
        elif (call.cut, call.rank) != (site.call.cut, site.call.rank):
            self._say(
                f"{site.name} came back with another cut or lora-rank in its node config; it can take part in the next "
                f"run, or in this one with what it had"
            )
        else:
            self._claims[node] = call
            if site.node_id in set(self._grid.get_node_ids()):
                self._say(
                    f"another node says that it is {site.name}, which is connected; it takes its place only when that "
                    f"is gone (about a minute after a SuperNode was killed)"
                )

    def _settled(self, node: int, here: Iterable[int]) -> Site | None:
        """The site that the node now is, if it is one."""
        if node not in here:
            del self._claims[node]
            self._seen.discard(node)
            return None
        site = _by_name(self.sites, self._claims[node].site)
        assert site is not None
        if site.node_id in here:
            return None
        # Should the node that it was come back, it is asked again, as any that says this name.
        self._seen.discard(site.node_id)
        site.node_id, site.call = node, self._claims.pop(node)
        self._ledger.calls[site.name] = site.call
        self._say(f"{site.name} is back, as another node")
        return site


def _by_name(sites: Sequence[Site], name: str) -> Site | None:
    return next((site for site in sites if site.name == name), None)

"""Sites that come while a run lasts: who of them may join, and from when.

A newcomer takes part from the next round on, never inside one: a round's orders, grants and weights are over the sites that it
began with. attendance.py hears of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fedsplit.core.config import RunConfig
from fedsplit.core.foreign import printable
from fedsplit.core.orders import RollCall
from fedsplit.federation.server.orders import Site

Place = Callable[[int, RollCall, int], Site]
"""(node, what it said, its place in the row in which cuts are dealt) -> a site of the run."""


@dataclass(kw_only=True)
class Newcomers:
    """Those that wait for the next round."""

    config: RunConfig
    classes: Sequence[str]
    """The run's, which are settled."""
    sites: list[Site]
    """The run's, to which newcomers are added."""
    place: Place
    joined: Callable[[Site], None]
    """Told of each that takes part from now on."""
    _waiting: dict[str, tuple[int, RollCall]] = field(default_factory=dict)

    def hear(self, node: int, call: RollCall) -> str:
        """A node that says a name which the run has not: what comes of it, in words."""
        name = printable(call.site)
        if why := self._why_not(node, call):
            return f"{name} came while the run lasts and takes no part in it: {why}"
        self._waiting[call.site] = node, call
        return f"{name} came while the run lasts; it takes part from the next round on"

    def take_in(self, here: set[int]) -> None:
        """Before a round: those that are still connected are sites of the run from now on."""
        for node, call in self._waiting.values():
            if node in here:
                site = self.place(node, call, len(self.sites))
                self.sites.append(site)
                self.joined(site)
        self._waiting.clear()

    def _why_not(self, node: int, call: RollCall) -> str:
        server, method = self.config.server, self.config.run.method_description
        present = len(self.sites) + len(self._waiting)
        if server.roster_names and call.site not in server.roster_names:
            return "roster does not name it"
        if server.sites and not server.roster_names and present >= server.sites:
            return f"sites={server.sites} are wanted, and they are here"
        if method.gathers or method.alone:
            return f"method={self.config.run.method} has no rounds in which sites work together"
        if (waiting := self._waiting.get(call.site)) is not None and waiting[0] != node:
            return f"node {waiting[0]} says that name too, and said it first"
        if self.config.task.target == "class" and (other := set(call.classes) - set(self.classes)):
            names = ", ".join(printable(name, limit=40) for name in sorted(other)[:3])
            return f"it has classes that the run was not begun with ({names}); it can take part in the next run"
        return self._does_not_fit(call)

    def _does_not_fit(self, call: RollCall) -> str:
        """Some ways of averaging were settled for the cuts and ranks that the run began with."""
        c = self.config
        one_cut = c.placement.encoder_training == "shared" or c.train.gradient != "exact"
        if not one_cut and c.module.lora_aggregation == "plain":
            return ""
        new = self.place(0, call, len(self.sites))
        if any((new.cut, new.rank) == (site.cut, site.rank) for site in self.sites):
            return ""
        return (
            f"its cut={new.cut} and lora-rank={new.rank} are not those that the run began with, and its way of averaging "
            f"was settled for those; it can take part in the next run"
        )

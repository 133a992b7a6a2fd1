"""Rounds as scalars: a site that kept the module of an earlier round catches up by replaying what came since.

With zeroth order at the device an update is one number a step and direction, so the rounds that a site missed are
KBs where the module is MBs. The server keeps the scalars of every round it ran and knows what each site holds;
the site does the server's own arithmetic over them (training/replay.py) and checks the digest of what it arrives at. A site whose
arithmetic comes out otherwise (another processor's last bit) says so and is sent the module from then on.

Only where every tensor of an update can be made again by everyone: one cut, one rank, plain averages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.orders import Round

Scalars = NDArray[np.float32]


def replayable(config: RunConfig, cuts: Sequence[Cut], ranks: Sequence[int]) -> bool:
    """Can a site make every other site's update again?"""
    return (
        config.train.gradient == "zeroth-order"
        and len(set(cuts)) == 1
        and len(set(ranks)) == 1
        and config.module.lora_aggregation in ("plain", "ffa")
        and (config.server.server_optimizer, config.server.robust_rule) == ("mean", "mean")
        and config.server.server_learning_rate == 1
    )


@dataclass
class ReplayLog:
    """The scalars of all rounds, and the module version that each site holds."""

    usable: bool
    _rounds: dict[int, list[tuple[str, int, Scalars]]] = field(default_factory=dict)
    _weights: dict[int, dict[str, int]] = field(default_factory=dict)
    _held: dict[str, int] = field(default_factory=dict)
    _full_only: set[str] = field(default_factory=set)

    def add(self, round_: int, site: str, samples: int, scalars: Scalars) -> None:
        """An update that was taken. What the site was sent for this round it holds."""
        if self.usable:
            self._rounds.setdefault(round_, []).append((site, samples, scalars))
            self._held[site] = round_ - 1

    def forget(self, round_: int) -> None:
        """The round is done again. The module that it started from is still what its sites hold."""
        self._rounds.pop(round_, None)
        self._weights.pop(round_, None)

    def settle(self, round_: int, weights: Mapping[str, int]) -> None:
        """Which of the round's updates were averaged, and for how many samples each counted."""
        if self.usable:
            kept = [u for u in self._rounds.get(round_, []) if u[0] in weights]
            self._rounds[round_] = kept
            self._weights[round_] = dict(weights)

    def clear(self) -> None:
        """The module is no longer what the rounds make of it: whole modules until new rounds have been."""
        self._rounds.clear()
        self._weights.clear()

    def failed(self, site: str) -> None:
        """The site could not catch up: it is sent whole modules from now on."""
        self._full_only.add(site)

    def since(self, site: str, round_: int) -> tuple[int, dict[str, Scalars], list[Round]] | None:
        """(version held, scalars by name, who they are of) for a site's order of `round_`; None: send the module."""
        held = self._held.get(site)
        if not self.usable or held is None or site in self._full_only:
            return None
        missed = range(held + 1, round_)
        if any(r not in self._weights or r not in self._rounds for r in missed):
            return None  # A resumed run has forgotten them.
        arrays: dict[str, Scalars] = {}
        rounds: list[Round] = []
        for r in missed:
            told = sorted(self._rounds[r], key=lambda update: update[0])
            arrays |= {f"{r}/{i}": scalars for i, (_, _, scalars) in enumerate(told)}
            weights = self._weights[r]
            sites = tuple((name, samples, weights[name]) for name, samples, _ in told)
            rounds.append(Round(number=r, sites=sites))
        return held, arrays, rounds

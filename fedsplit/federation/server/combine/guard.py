"""Keeps one site's update from undoing what the others learn: bounds on how far it moves, and a step back after harm.

Two bounds. AdamW's steps have a length that its own formulas limit, so an update beyond that was not trained as the
settings say. And no update may move `max-update-ratio` times as far as the median of the round's sites and of the
accepted updates of the rounds before, which is what protects two sites, of which neither is a majority. Measured
ratios of honest sites are in docs/log.md. An update beyond a bound is refused by name, not cut to size: a cut one
still pulls in its own direction as hard as the bound allows.

A step back. Sites test the module that they receive. Where most of them do much worse by the task's
scoring than chance explains (core/scores.py), or cannot train on it at all, the round that made it
is undone, once: the same again is taken as the training's own course. The farthest of the undone
updates is named.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedsplit.core.aggregation import Update, capped
from fedsplit.core.config import RunConfig
from fedsplit.core.records import RoundMetrics
from fedsplit.core.scores import CLASS_SCORES, Scoring, Tally, added
from fedsplit.model.module import ModuleTensors

# The most that one step of AdamW moves a value, in learning rates: by Cauchy and Schwarz
# (1 - b1) / sqrt(1 - b2) / sqrt(1 - b1^2 / b2), at torch's b1 = 0.9 and b2 = 0.999.
ADAMW_STEP = 7.3
# Rounds whose accepted updates say what is usual.
MEMORY = 3
# Fewer updates than this have no majority.
QUORUM = 3
# From so many times the usual length on, an undone update no longer says what is usual.
SUSPECT = 3.0

_Norms = dict[str, float]


@dataclass
class Version:
    """A module, how the sites tested it, and what the server's optimiser held."""

    module: ModuleTensors
    tests: dict[str, Tally] = field(default_factory=dict)
    """By site."""
    optimizer: ModuleTensors = field(default_factory=dict)
    round: int = 0


class Guard:
    """Judges the updates of a run's rounds, and the modules that came of them."""

    def __init__(
        self, config: RunConfig, classifier: Collection[str], scoring: Scoring = CLASS_SCORES
    ) -> None:
        """`classifier`: first parts of the names of its tensors, which have a learning rate of their own."""
        self._config = config
        self._scoring = scoring
        self._classifier = frozenset(classifier)
        self._accepted: list[tuple[int, str, _Norms]] = []
        self._good: Version | None = None
        self._undone = 0

    def within(
        self, round_: int, updates: Sequence[Update], refuse: Callable[[int, str, str], None]
    ) -> list[Update]:
        """The updates that keep the bounds, each with what it counts for; `refuse(round, site, why)` is told the others."""
        reasons = {u.site: self._too_far(round_, u) if self._bounds else "" for u in updates}
        norms = {u.site: self._norms(round_, u) for u in updates}
        if self._bounds:
            for site, (ratio, part) in self._ratios(norms).items():
                if ratio > self._config.server.max_update_ratio:
                    reasons[site] = reasons[site] or (
                        f"its {part} moves {ratio:.3g} times as far as is usual in this run (the median of its sites), "
                        f"max-update-ratio={self._config.server.max_update_ratio:g}; look at that site's data and learning "
                        f"rate"
                    )
        for site, why in sorted(reasons.items()):
            if why:
                refuse(round_, site, f"update of site {site!r} refused: {why}")
        good = [u for u in updates if not reasons[u.site]]
        self._accepted = [a for a in self._accepted if round_ - MEMORY < a[0] < round_]
        self._accepted += [(round_, u.site, norms[u.site]) for u in good]
        weights = capped({u.site: u.samples for u in good}, self._config.server.max_site_share)
        return [
            u if weights[u.site] == u.samples else replace(u, samples=weights[u.site]) for u in good
        ]

    def undo(
        self, tested: Version, rows: Sequence[RoundMetrics], stuck: Collection[str], asked: int
    ) -> tuple[Version, str] | None:
        """What to go back to and why, where the module that a round sent out does harm; else it is the good one now.

        `rows` are the round's numbers, `stuck` the sites of the `asked` ones that could not train on the module.
        """
        tested.tests = {row.site: row.tested for row in rows}
        harm = (
            ""
            if self._good is None or not self._config.server.step_back
            else self._harm(self._good, tested, stuck, asked)
        )
        if harm and not self._undone:
            good = self._good
            assert good is not None
            self._undone += 1
            return good, f"{harm}; round {good.round} is gone on from{self._suspect(tested.round)}"
        if not harm and tested.module is not (self._good and self._good.module):
            self._undone = 0
        if tested.tests:
            self._good = tested
        return None

    def _harm(self, good: Version, now: Version, stuck: Collection[str], asked: int) -> str:
        """What the module of `now` did to most sites; empty where it did no harm."""
        if asked > 1 and 2 * len(stuck) > asked:
            return (
                f"{len(stuck)} of {asked} sites could not train on the module of round {now.round}"
            )
        both = sorted(good.tests.keys() & now.tests.keys())
        lost = [s for s in both if self._scoring.lost(good.tests[s], now.tests[s])]
        if len(both) < 2 or 2 * len(lost) <= len(both):
            return ""
        scores = (self._scoring.scores(added(t.tests[s] for s in both)) for t in (good, now))
        before, after = (self._scoring.shown(s[self._scoring.main]) if s else "?" for s in scores)
        return (
            f"{len(lost)} of {len(both)} sites {self._scoring.harm} by the module of round {now.round} "
            f"({before} to {after})"
        )

    def _suspect(self, round_: int) -> str:
        """Whose update of the undone round was the farthest from the others'; it no longer says what is usual."""
        norms = {site: n for r, site, n in self._accepted if r == round_}
        if len(norms) < 2:
            return ""
        ratios: dict[str, float] = {}
        for site, mine in norms.items():
            others = [n for other, n in norms.items() if other != site]
            ratios[site] = max(
                (
                    _ratio(value, [n[part] for n in others if part in n])
                    for part, value in mine.items()
                ),
                default=0.0,
            )
        site = max(sorted(ratios), key=lambda s: ratios[s])
        if ratios[site] >= SUSPECT:
            self._accepted = [a for a in self._accepted if a[1] != site]
        return f"; {site}'s update moved the farthest, {ratios[site]:.3g} times the median of the others'"

    def _too_far(self, round_: int, update: Update) -> str:
        """Why no training by the run's settings gives this update; empty where one may."""
        c = self._config
        if (
            c.train.optimizer != "adamw"
            or c.train.weight_decay
            or c.train.gradient != "exact"
            or self._prunes
        ):
            return ""
        batches = math.ceil(update.samples / c.train.batch_size)
        steps = math.ceil(batches / c.train.accumulate) * (
            c.train.local_epochs + c.train.local_loss_epochs
        )
        # What a site kept for itself between two averages comes in one.
        factor = (
            c.train.learning_rate_factor(round_) if c.train.sync_every == 1 else c.train.sync_every
        )
        for name, delta in update.delta.items():
            most = ADAMW_STEP * self._rate(name) * factor * steps
            moved = float(np.abs(delta).max()) if delta.size else 0.0
            if moved > most * 1.001:
                return (
                    f"{name} moves by {moved:.3g}, {steps} steps at the run's learning rate move at most {most:.3g}; look "
                    f"at that site"
                )
        return ""

    @property
    def _bounds(self) -> bool:
        """A robust rule stands updates of any length, and wants all that came: it is counted on how many there are."""
        return (
            self._config.server.max_update_ratio > 0 and self._config.server.robust_rule == "mean"
        )

    @property
    def _prunes(self) -> bool:
        """Components that a site prunes go to zero at once, however long they were: no step of an optimiser."""
        return self._config.module.rank_pruning < 1

    def _rate(self, name: str) -> float:
        c = self._config
        return (
            c.train.learning_rate
            if self._part(name) == "classifier"
            else c.train.lora_learning_rate or c.train.learning_rate
        )

    def _part(self, name: str) -> str:
        return "classifier" if name.split(".", 1)[0] in self._classifier else "module"

    def _norms(self, round_: int, update: Update) -> _Norms:
        """Root mean square of what classifier and module move by, without the schedule of the learning rate."""
        squares: dict[str, tuple[float, int]] = {}
        for name, delta in update.delta.items():
            total, size = squares.get(self._part(name), (0.0, 0))
            wide = delta.astype(np.float64)
            squares[self._part(name)] = (total + float(np.vdot(wide, wide)), size + delta.size)
        factor = self._config.train.learning_rate_factor(round_) or 1.0
        return {
            part: math.sqrt(total / max(size, 1)) / factor
            for part, (total, size) in squares.items()
        }

    def _ratios(self, norms: Mapping[str, _Norms]) -> dict[str, tuple[float, str]]:
        """Each site's largest ratio to what is usual, and of which part."""
        found: dict[str, tuple[float, str]] = {}
        for part in ("classifier",) if self._prunes else ("classifier", "module"):
            now = {site: n[part] for site, n in norms.items() if part in n}
            usual = [*now.values(), *(n[part] for _, _, n in self._accepted if part in n)]
            if len(usual) >= QUORUM:
                for site, value in now.items():
                    found[site] = max(found.get(site, (0.0, "")), (_ratio(value, usual), part))
        return found


def _ratio(value: float, usual: Sequence[float]) -> float:
    """How many medians; 0 where there is none to compare with."""
    median = statistics.median(usual) if usual else 0.0
    return value / median if median else 0.0

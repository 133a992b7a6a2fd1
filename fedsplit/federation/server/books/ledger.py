"""Keeps a run's account: who answered when, what it cost, who was left out and why; makes the summary."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fedsplit import __version__
from fedsplit.core.config import RunConfig
from fedsplit.core.notes import fit
from fedsplit.core.orders import LocalOnly, RollCall
from fedsplit.core.records import LeftOut, Outcome, RoundMetrics, SiteSummary, Summary
from fedsplit.core.scores import CLASS_SCORES, Scores, Scoring, Tally, added, recall_of, together
from fedsplit.model.backbone import Backbone

Absence = tuple[int, str, str]
"""(round, site, reason); round 0 is all that comes before the first round."""


@dataclass
class Ledger:
    """All metrics of a run so far, and the absences."""

    config: RunConfig
    backbone: Backbone
    run: str
    calls: dict[str, RollCall] = field(default_factory=dict)
    cuts: dict[str, str] = field(default_factory=dict)
    metrics: list[RoundMetrics] = field(default_factory=list)
    absences: list[Absence] = field(default_factory=list)
    local_only: dict[str, LocalOnly] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What the run itself found odd, a sentence each."""
    started: float = field(default_factory=time.monotonic)
    wall_before_s: float = 0.0
    """Wall time of the run before it was resumed."""
    scoring: Scoring = CLASS_SCORES
    classes: tuple[str, ...] = ()
    """The run's, in the order of its confusion matrices."""

    def note(self, text: str) -> None:
        """Note what the run itself found odd."""
        self.notes = fit([*self.notes, text])

    def absent(self, round_: int, site: str, reason: str) -> None:
        """Note that a site had no part in a round."""
        self.absences.append((round_, site, reason))

    def back(self, round_: int, site: str) -> None:
        """Take back that a site was lost in a round: it is asked once more."""
        self.absences = [a for a in self.absences if a[:2] != (round_, site)]

    def forget(self, round_: int) -> list[Absence]:
        """Drop what the run's sites did in a round that is done again; the absences that went with it."""
        self.metrics = [m for m in self.metrics if m.round != round_]
        gone = [a for a in self.absences if a[0] == round_ and a[1] in self.calls]
        self.absences = [a for a in self.absences if a not in gone]
        return gone

    def explain(self, round_: int, site: str, reason: str) -> None:
        """Put a better reason in place of the one of an absence."""
        self.absences = [
            (r, s, reason if (r, s) == (round_, site) else why) for r, s, why in self.absences
        ]

    def wall_s(self) -> float:
        """Wall time of the run so far."""
        return self.wall_before_s + time.monotonic() - self.started

    @contextmanager
    def standing_by(self) -> Iterator[None]:
        """Time inside is not the run's: another one has its turn."""
        since = time.monotonic()
        try:
            yield
        finally:
            self.started += time.monotonic() - since

    def scores_of_round(self, round_: int) -> Scores | None:
        """Scores of the module as sites received it in a round, over all test samples."""
        tests = (m.tested for m in self.metrics if m.round == round_ and round_ > 0)
        return self.scoring.scores(added(tests))

    def summary(self, *, rounds_done: int, outcome: Outcome, reason: str) -> Summary:
        """The run in numbers. A run that lost a site is never complete."""
        if outcome == "complete" and self.absences:
            outcome = "partial"
            lost = sorted({site for _, site, _ in self.absences})
            reason = f"not every site took part in every round: {', '.join(lost)}"
        curve = [self.scores_of_round(r) for r in range(1, rounds_done + 2)]
        last = [m.confusion for m in self.metrics if m.round == rounds_done + 1]
        confusion = together(c for c in last if c is not None)
        alone = [self.scoring.scores(o.everywhere) for o in self.local_only.values()]
        return Summary(
            run=self.run,
            task=self.config.task.name,
            method=self.config.run.method,
            backbone=self.config.placement.backbone,
            backbone_sha256=self.backbone.sha256,
            fedsplit_version=__version__,
            rounds=self.config.train.rounds,
            rounds_done=rounds_done,
            sites=tuple(self._site(name) for name in sorted(self.calls)),
            target=self.scoring.target,
            scores=curve[-1],
            scores_start=curve[0],
            start="module" if self.config.run.start_module else self.config.module.classifier_start,
            scores_personal=self.scoring.scores(self._personal()),
            scores_by_round=tuple(s for s in curve if s is not None),
            scores_local_only=_mean([s for s in alone if s is not None]),
            confusion=confusion,
            recall=recall_of(confusion, self.classes),
            bytes_activation=sum(
                m.bytes_activation_up + m.bytes_activation_down for m in self.metrics
            ),
            bytes_module=sum(m.bytes_module_up + m.bytes_module_down for m in self.metrics),
            flops_device=sum(m.flops_device for m in self.metrics),
            bytes_full_model=self._full_model_bytes(),
            wall_s=self.wall_s(),
            outcome=outcome,
            left_out=self._left_out(),
            reason=reason,
            module="module",
            notes=self.notes,
        )

    def _personal(self) -> Tally:
        """Each site's own model on its own test samples, over all sites that have one."""
        last: dict[str, Tally] = {}
        for row in sorted(self.metrics, key=lambda m: m.round):
            if (test := row.tested_personal) is not None:
                last[row.site] = test
        alone = {name: o.own for name, o in self.local_only.items()}
        return added((last or alone).values())

    def _full_model_bytes(self) -> int:
        trained = sum(1 for m in self.metrics if m.loss is not None)
        return 2 * trained * self.backbone.weight_bytes()

    def _left_out(self) -> tuple[LeftOut, ...]:
        grouped: dict[tuple[str, str], list[int]] = defaultdict(list)
        for round_, site, reason in self.absences:
            grouped[site, reason].append(round_)
        return tuple(
            LeftOut(site=site, rounds=tuple(sorted(rounds)), reason=reason)
            for (site, reason), rounds in sorted(grouped.items())
        )

    def _site(self, name: str) -> SiteSummary:
        every = sorted((m for m in self.metrics if m.site == name), key=lambda m: m.round)
        # Before the first round statistics may have travelled; nothing was tested then.
        rows = [m for m in every if m.round > 0]
        trained = [test for m in rows if (test := m.tested_personal) is not None]
        alone = self.local_only.get(name)
        scores = self.scoring.scores
        return SiteSummary(
            name=name,
            cut=self.cuts[name],
            samples=self.calls[name].samples,
            test_samples=self.calls[name].test_samples,
            target=self.scoring.target,
            scores_before=scores(rows[0].tested) if rows else None,
            scores=scores(rows[-1].tested) if rows else None,
            scores_personal=scores(trained[-1]) if trained else None,
            scores_local_only=scores(alone.everywhere) if alone else None,
            scores_local_only_personal=scores(alone.own) if alone else None,
            confusion=rows[-1].confusion if rows else None,
            recall=recall_of(rows[-1].confusion, self.classes) if rows else None,
            bytes_up=sum(m.bytes_activation_up + m.bytes_module_up for m in every),
            bytes_down=sum(m.bytes_activation_down + m.bytes_module_down for m in every),
            seconds_device=sum(m.seconds_device for m in every),
            seconds_wait=sum(m.seconds_wait for m in every),
            peak_rss_bytes=max((m.peak_rss_bytes for m in every), default=0),
            flops_device=sum(m.flops_device for m in every),
            backbone_loads=_loads(every),
            notes=self.calls[name].notes,
            rounds_missed=len({r for r, site, _ in self.absences if site == name and r > 0}),
        )


def _loads(metrics: list[RoundMetrics]) -> int:
    """A process that had the part from before the run has loaded it once as well."""
    of: dict[str, int] = defaultdict(int)
    for m in metrics:
        of[m.process] += m.backbone_loads
    return sum(max(1, loads) for loads in of.values())


def _mean(scores: list[Scores]) -> Scores | None:
    """Each score's mean over the sites."""
    return {n: sum(s[n] for s in scores) / len(scores) for n in scores[0]} if scores else None

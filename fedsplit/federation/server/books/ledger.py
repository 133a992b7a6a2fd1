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
from fedsplit.model.backbone import Backbone


@dataclass
class Ledger:
    """All metrics of a run so far, and the absences."""

    config: RunConfig
    backbone: Backbone
    run: str
    calls: dict[str, RollCall] = field(default_factory=dict)
    cuts: dict[str, str] = field(default_factory=dict)
    metrics: list[RoundMetrics] = field(default_factory=list)
    absences: list[tuple[int, str, str]] = field(default_factory=list)
    """(round, site, reason); round 0 is the roll call."""
    local_only: dict[str, LocalOnly] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What the run itself found odd, a sentence each."""
    started: float = field(default_factory=time.monotonic)
    wall_before_s: float = 0.0
    """Wall time of the run before it was resumed."""

    def note(self, text: str) -> None:
        """Note what the run itself found odd."""
        self.notes = fit([*self.notes, text])

    def absent(self, round_: int, site: str, reason: str) -> None:
        """Note that a site had no part in a round."""
        self.absences.append((round_, site, reason))

    def back(self, round_: int, site: str) -> None:
        """Take back that a site was lost in a round: it is asked once more."""
        self.absences = [a for a in self.absences if a[:2] != (round_, site)]

    def forget(self, round_: int) -> list[tuple[int, str, str]]:
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

    def accuracy_of_round(self, round_: int) -> float | None:
        """Global accuracy of the module as sites received it in a round, over all test samples."""
        rows = [m for m in self.metrics if m.round == round_ and round_ > 0]
        total = sum(m.test_samples for m in rows)
        return sum(m.correct_global for m in rows) / total if total else None

    def summary(self, *, rounds_done: int, outcome: Outcome, reason: str) -> Summary:
        """The run in numbers. A run that lost a site is never complete."""
        if outcome == "complete" and self.absences:
            outcome = "partial"
            lost = sorted({site for _, site, _ in self.absences})
            reason = f"not every site took part in every round: {', '.join(lost)}"
        curve = [self.accuracy_of_round(r) for r in range(1, rounds_done + 2)]
        known = tuple(a for a in curve if a is not None)
        shares = (
            _share(o.correct_everywhere, o.total_everywhere) for o in self.local_only.values()
        )
        alone = [share for share in shares if share is not None]
        return Summary(
            run=self.run,
            task=self.config.task,
            method=self.config.method,
            backbone=self.config.backbone,
            backbone_sha256=self.backbone.sha256,
            fedsplit_version=__version__,
            rounds=self.config.rounds,
            rounds_done=rounds_done,
            sites=tuple(self._site(name) for name in sorted(self.calls)),
            accuracy_global=curve[-1],
            accuracy_global_start=curve[0],
            start="module" if self.config.start_module else self.config.classifier_start,
            accuracy_personal=self._personal(),
            accuracy_by_round=known,
            accuracy_local_only=sum(alone) / len(alone) if alone else None,
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

    def _personal(self) -> float | None:
        """Right answers of each site's own model on its own test samples, over all sites that have one."""
        if self.local_only:
            alone = self.local_only.values()
            if not any(m.correct_personal is not None for m in self.metrics):
                return _share(sum(o.correct_own for o in alone), sum(o.total_own for o in alone))
        last: dict[str, RoundMetrics] = {}
        for row in self.metrics:
            if row.correct_personal is not None:
                last[row.site] = max(row, last.get(row.site, row), key=lambda m: m.round)
        return _share(
            sum(m.correct_personal or 0 for m in last.values()),
            sum(m.test_samples for m in last.values()),
        )

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
        trained = [m for m in rows if m.correct_personal is not None]
        alone = self.local_only.get(name)
        return SiteSummary(
            name=name,
            cut=self.cuts[name],
            samples=self.calls[name].samples,
            test_samples=self.calls[name].test_samples,
            accuracy_before=_share(rows[0].correct_global, rows[0].test_samples) if rows else None,
            accuracy=_share(rows[-1].correct_global, rows[-1].test_samples) if rows else None,
            accuracy_personal=_share(trained[-1].correct_personal, trained[-1].test_samples)
            if trained
            else None,
            accuracy_local_only=_share(alone.correct_everywhere, alone.total_everywhere)
            if alone
            else None,
            accuracy_local_only_personal=_share(alone.correct_own, alone.total_own)
            if alone
            else None,
            bytes_up=sum(m.bytes_activation_up + m.bytes_module_up for m in every),
            bytes_down=sum(m.bytes_activation_down + m.bytes_module_down for m in every),
            seconds_device=sum(m.seconds_device for m in every),
            seconds_wait=sum(m.seconds_wait for m in every),
            peak_rss_bytes=max((m.peak_rss_bytes for m in every), default=0),
            flops_device=sum(m.flops_device for m in every),
            notes=self.calls[name].notes,
            rounds_missed=len({r for r, site, _ in self.absences if site == name and r > 0}),
        )


def _share(correct: int | None, total: int) -> float | None:
    return None if correct is None or not total else correct / total

"""The first page: what the module saves and when it is paid back, how sure that is, what it rests on, what was assumed."""

from __future__ import annotations

from dataclasses import dataclass

from fedsplit.core.records import Summary
from fedsplit.report.costs import UNITS, Costs
from fedsplit.report.page import pictures
from fedsplit.report.page.blocks import (
    Big,
    Bigs,
    Block,
    Cell,
    Code,
    Items,
    Picture,
    Section,
    Table,
    Text,
    Tone,
    row,
)
from fedsplit.report.page.shown import Shown
from fedsplit.report.page.subject import Subject
from fedsplit.report.roi import Quantity, Return
from fedsplit.report.tables import lost_sites
from fedsplit.report.units import NONE, human_bytes, human_seconds, interval, percent

_MOST_SWINGS = 6
_TAKEN = 9
"""Standing assumptions that words.toml has: assumption.1 and on."""


@dataclass(frozen=True)
class Boss:
    """The part of the report for who decides."""

    shown: Shown
    subject: Subject
    costs: Costs | None
    found: Return

    def sections(self) -> list[Section]:
        """The first page, and what follows on it."""
        say = self.shown.say
        first = Section(say("boss"), (*self._lead(), *self._warnings()), level=1)
        if self.costs is None or not self.costs.values:
            return [first, Section(say("how-to-costs"), self._how_to())]
        return [
            first,
            Section(say("how-sure"), self._how_sure()),
            Section(say("rests-on"), self._rests_on()),
            Section(say("assumed-title"), self._assumed()),
        ]

    def _lead(self) -> list[Block]:
        figures, say = self.found.figures, self.shown.say
        blocks: list[Block] = []
        if "hours-saved" in figures:
            blocks.append(Text(self._verdict(), tone="lead"))
        blocks.append(Bigs(tuple(self._big(key, lead=True) for key in ("index", "payback"))))
        if more := [k for k in ("hours-saved", "net", "once") if k in figures]:
            blocks.append(Bigs((*(self._big(key) for key in more), *self._measured()[:1])))
        else:
            blocks += [Text(say("counts-only"), tone="note"), Bigs(tuple(self._measured()))]
        return blocks

    def _verdict(self) -> str:
        figures, say, shown = self.found.figures, self.shown.say, self.shown
        today = shown.hours(figures["hours-today"].value)
        saved = figures["hours-saved"].value
        if saved <= 0:
            return say("verdict.none", today=today, more=shown.hours(-saved))
        text = say("verdict.hours", today=today, saved=shown.hours(saved))
        payback = figures.get("payback")
        if payback is None:
            return text
        if payback.value == float("inf"):
            return text + say("verdict.never")
        text += say("verdict.payback", months=shown.months(payback.value))
        return text + (say("verdict.may-be-never") if payback.high == float("inf") else "")

    def _big(self, key: str, *, lead: bool = False) -> Big:
        say, shown = self.shown.say, self.shown
        label = say(f"figure.{key}")
        figure = self.found.figures.get(key)
        if figure is None:
            names = [say(f"cost.{k}") for k in self.found.missing[key]]
            return Big(label, NONE, "", note=say("needs", keys=shown.some(names, 6)), lead=lead)
        return Big(
            label,
            shown.figure(figure),
            shown.bounds(figure),
            note=say(f"formula.{key}"),
            assumed=figure.assumed,
            refs=shown.refs(figure, self.found.quantities),
            lead=lead,
        )

    def _measured(self) -> list[Big]:
        """What the runs measured, whatever anything costs: the score first."""
        shown, say = self.shown, self.shown.say
        bigs: list[Big] = []
        for run, part in self.subject.told:
            one = part.summary
            if one.scores is not None:
                name = shown.score_name(one.scoring)
                many = len(self.subject.told) > 1
                before = (
                    say("untrained")
                    if one.untrained
                    else shown.score(one.scores_start, one.scoring)
                )
                bigs.append(
                    Big(
                        f"{name} ({one.task})" if many else name,
                        shown.score(one.scores, one.scoring),
                        self._interval(one),
                        note=say("score-note", n=f"{one.tested:,}", before=before),
                        refs=shown.sources.ref(shown.measured(run.name, "summary.json")),
                    )
                )
        runs = self.subject.runs
        parts = [part.summary for run in runs for part in run.parts]
        refs = shown.sources.ref(*(shown.measured(run.name, "summary.json") for run in runs[:20]))
        moved = sum(p.bytes_activation + p.bytes_module for p in parts)
        worked = sum(site.seconds_device for p in parts for site in p.sites)
        samples = sum(site.samples for _, p in self.subject.told for site in p.summary.sites)
        bigs += [
            Big(say("count.samples"), f"{samples:,}", "", refs=refs),
            Big(say("count.traffic"), human_bytes(moved), "", refs=refs),
            Big(say("count.device"), human_seconds(worked), "", refs=refs),
        ]
        return bigs

    def _interval(self, one: Summary) -> str:
        if one.scores is None or one.scoring.target != "class" or not one.tested:
            return ""
        low, high = interval(one.scores[one.scoring.main], one.tested)
        say = self.shown.say
        return say("interval-of", text=say("bounds", low=percent(low), high=percent(high)))

    def _warnings(self) -> list[Block]:
        say, found = self.shown.say, self.found
        texts: list[str] = []
        for run, part in self.subject.told:
            one = part.summary
            name = f"{run.name} / {one.task}" if len(self.subject.told) > 1 else run.name
            if part.going_on:
                texts.append(
                    say("warn.going-on", run=name, done=one.rounds_done, rounds=one.rounds)
                )
            elif one.outcome == "failed":
                texts.append(say("warn.failed", run=name, reason=one.reason or NONE))
            elif one.outcome == "partial" or lost_sites(one):
                texts.append(
                    say("warn.partial", run=name, sites=self.shown.some(lost_sites(one)) or NONE)
                )
            if one.scores is not None and one.scores_start is not None and not one.untrained:
                scoring = one.scoring
                if scoring.gain(one.scores_start[scoring.main], one.scores[scoring.main]) < 0:
                    texts.append(
                        say(
                            "warn.worse",
                            run=name,
                            gain=self.shown.gain(one.scores_start, one.scores, scoring),
                        )
                    )
        if "index" in found.figures:
            for term, keys in found.not_counted.items():
                if term in ("alarms", "upkeep"):
                    names = self.shown.some([say(f"cost.{k}") for k in keys])
                    texts.append(say("warn.not-counted", term=say(f"term.{term}"), keys=names))
        return [Text(text, tone="warning") for text in texts]

    def _how_to(self) -> tuple[Block, ...]:
        say = self.shown.say
        lang = " --lang ja" if say.lang == "ja" else ""
        empty = (
            say("how-to.empty", file=self.shown.costs)
            if self.costs is not None
            else say("how-to.none")
        )
        keys = [
            Cell(say(f"cost.{key}"))
            for key in ("seconds-a-part", "parts-a-month", "reinspected-share")
        ]
        money = [Cell(say(f"cost.{key}")) for key in ("hour-cost", "machine-cost", "engineer-days")]
        return (
            Text(empty),
            Code(f"fedsplit report --costs-template{lang} > costs.toml"),
            Text(say("how-to.fill")),
            Items(tuple(keys)),
            Text(say("how-to.money")),
            Items(tuple(money)),
            Text(say("how-to.again")),
            Code(f"fedsplit report {say('how-to.run')} --costs costs.toml{lang}"),
        )

    def _how_sure(self) -> tuple[Block, ...]:
        say, shown, found = self.shown.say, self.shown, self.found
        used = {key for figure in found.figures.values() for key in figure.uses}
        count = {
            source: sum(found.quantities[key].source == source for key in used)
            for source in ("own", "assumed", "measured")
        }
        blocks: list[Block] = [
            Text(
                say(
                    "sure.values",
                    n=len(used),
                    own=count["own"],
                    assumed=count["assumed"],
                    measured=count["measured"],
                )
            ),
            Text(say("sure.bounds")),
        ]
        unranged = [
            say(f"cost.{k}")
            for k in sorted(used)
            if not found.quantities[k].ranged and found.quantities[k].source != "measured"
        ]
        if unranged:
            blocks.append(Text(say("sure.unranged", keys=shown.some(unranged)), tone="note"))
        for key in ("payback", "index"):
            swings = found.swings.get(key, ())
            figure = found.figures.get(key)
            if figure is None or not swings:
                continue
            drawn = [s for s in swings if max(s.at_low, s.at_high) < float("inf")][:_MOST_SWINGS]
            endless = [
                say(f"cost.{s.key}") for s in swings if max(s.at_low, s.at_high) == float("inf")
            ]
            if endless:
                blocks.append(Text(say("sure.endless", keys=shown.some(endless)), tone="warning"))
            if drawn and figure.value < float("inf"):
                blocks.append(
                    Picture(
                        pictures.swings(
                            [say(f"cost.{s.key}") for s in drawn],
                            [(s.at_low, s.at_high) for s in drawn],
                            figure.value,
                            low=say("at-low"),
                            high=say("at-high"),
                            axis=say(f"figure.{key}")
                            + ("" if key == "index" else say("in-months")),
                            shares=key == "index",
                        ),
                        say("sure.picture", figure=say(f"figure.{key}")),
                        shown.refs(figure, found.quantities),
                    )
                )
        return tuple(blocks)

    def _rests_on(self) -> tuple[Block, ...]:
        say, found = self.shown.say, self.found
        hours = [
            k
            for k in found.figures
            if k.startswith("hours-") and k not in ("hours-today", "hours-saved")
        ]
        gains = [k for k in found.figures if k.startswith("gain-")]
        once = [k for k in found.figures if k.startswith("once-")]
        blocks: list[Block] = []
        for title, keys in (
            ("table.hours", ["hours-today", *hours, "hours-saved", "index"]),
            ("table.gains", [*gains, "net"]),
            ("table.once", [*once, "once", "payback"]),
        ):
            if rows := [self._figure_row(key) for key in keys if key in found.figures]:
                head = tuple(say(f"column.{c}") for c in ("figure", "value", "low", "high"))
                blocks.append(Table(columns=head, rows=tuple(rows), title=say(title)))
        rows = [self._quantity_row(found.quantities[key]) for key in self._in_order()]
        head = tuple(
            say(f"column.{c}") for c in ("input", "value", "low", "high", "source", "where")
        )
        return (
            *blocks,
            Table(columns=head, rows=tuple(rows), title=say("table.inputs"), left=(0, 4, 5)),
        )

    def _in_order(self) -> list[str]:
        order = [*UNITS, "run-gigabytes", "run-device-hours"]
        return [key for key in order if key in self.found.quantities]

    def _figure_row(self, key: str) -> tuple[Cell, ...]:
        shown, figure = self.shown, self.found.figures[key]
        strong = key in ("hours-saved", "index", "net", "once", "payback")
        tone: Tone = "strong" if strong else ""
        refs = shown.refs(figure, self.found.quantities)
        return (
            Cell(shown.say(f"figure.{key}"), tone, refs, assumed=figure.assumed),
            Cell(shown.figure(figure), tone),
            Cell(shown.figure(figure, figure.low)),
            Cell(shown.figure(figure, figure.high)),
        )  # fmt: skip

    def _quantity_row(self, one: Quantity) -> tuple[Cell, ...]:
        say, shown = self.shown.say, self.shown
        where = f"run {one.run}" if one.source == "measured" else f"{shown.costs}:{one.line}"
        if one.measured is not None:
            where += say("overruled", value=shown.of_unit(one.key, one.measured))
        low, high = (shown.of_unit(one.key, x) if one.ranged else NONE for x in (one.low, one.high))
        return row([
            Cell(say(f"cost.{one.key}"), refs=shown.sources.ref(shown.source(one)), hint=one.note),
            shown.of_unit(one.key, one.value), low, high,
            Cell(say(one.source), assumed=one.source == "assumed"), where,
        ])  # fmt: skip

    def _assumed(self) -> tuple[Block, ...]:
        say, shown, found = self.shown.say, self.shown, self.found
        assumed = [
            found.quantities[k] for k in self._in_order() if found.quantities[k].source == "assumed"
        ]
        blocks: list[Block] = []
        if assumed:
            blocks.append(Text(say("assumed.values")))
            blocks.append(
                Items(
                    tuple(
                        Cell(shown.source(q), refs=shown.sources.ref(shown.source(q)))
                        for q in assumed
                    )
                )
            )
        else:
            blocks.append(Text(say("assumed.no-values")))
        if found.not_counted:
            blocks.append(Text(say("assumed.not-counted")))
            blocks.append(
                Items(
                    tuple(
                        Cell(
                            say(
                                "not-counted",
                                term=say(f"term.{t}"),
                                keys=shown.some([say(f"cost.{k}") for k in keys]),
                            )
                        )
                        for t, keys in found.not_counted.items()
                    )
                )
            )
        blocks.append(Text(say("assumed.always")))
        blocks.append(Items(tuple(Cell(say(f"assumption.{i}")) for i in range(1, _TAKEN + 1))))
        return tuple(blocks)

"""How good the module is: scores by site before and after, their course, and what is taken for what."""

from __future__ import annotations

from dataclasses import dataclass

from fedsplit.core.scores import Scores
from fedsplit.report import scores as score_words
from fedsplit.report.page import pictures
from fedsplit.report.page.blocks import Block, Cell, Picture, Table, Text, Tone, row
from fedsplit.report.page.pictures import Line, Whisker
from fedsplit.report.page.shown import Shown
from fedsplit.report.page.subject import Part, Run
from fedsplit.report.units import NONE, interval

_MOST_CONFUSED = 15


@dataclass(frozen=True)
class Scored:
    """The scores of one part."""

    shown: Shown
    run: Run
    part: Part

    @property
    def summary_ref(self) -> tuple[int, ...]:
        """The number of summary.json among the sources."""
        return self.shown.sources.ref(self.shown.measured(self.run.name, "summary.json"))

    @property
    def metrics_ref(self) -> tuple[int, ...]:
        """The number of metrics.jsonl."""
        return self.shown.sources.ref(self.shown.measured(self.run.name, "metrics.jsonl"))

    def scores(self) -> tuple[Block, ...]:
        """Each site's score before and now, with what else was measured, and a picture."""
        say, shown, one = self.shown.say, self.shown, self.part.summary
        if not one.sites or all(site.scores is None for site in one.sites):
            return (Text(say("no-scores"), tone="note"),)
        scoring, shares = one.scoring, one.scoring.target == "class"
        more = list(score_words.others(one.scores, scoring))
        alone = any(site.scores_local_only_personal is not None for site in one.sites)
        head = [
            say(f"column.{c}") for c in ("site", "trained-on", "tested-on", "before", "now", "gain")
        ]
        head += [*more, *([say("column.alone")] if alone else [])]
        rows = []
        for site in one.sites:
            n, rest = site.test_samples, score_words.others(site.scores, scoring)
            before = (
                say("untrained") if one.untrained else shown.score(site.scores_before, scoring, n)
            )
            gain = NONE if one.untrained else shown.gain(site.scores_before, site.scores, scoring)
            cells: list[str | Cell] = [
                site.name, f"{site.samples:,}", f"{n:,}", before,
                Cell(shown.score(site.scores, scoring, n), "strong"),
                Cell(gain, self._gain_tone(site.scores_before, site.scores)),
                *(rest.get(name, NONE) for name in more),
            ]  # fmt: skip
            if alone:
                cells.append(shown.score(site.scores_local_only_personal, scoring, n))
            rows.append(row(cells))
        rest = score_words.others(one.scores, scoring)
        before = (
            say("untrained")
            if one.untrained
            else shown.score(one.scores_start, scoring, one.tested)
        )
        whole: list[str | Cell] = [
            Cell(say("all-sites"), "strong"), f"{sum(s.samples for s in one.sites):,}", f"{one.tested:,}", before,
            Cell(shown.score(one.scores, scoring, one.tested), "strong"),
            Cell(NONE if one.untrained else shown.gain(one.scores_start, one.scores, scoring),
                 self._gain_tone(one.scores_start, one.scores)),
            *(rest.get(name, NONE) for name in more),
        ]  # fmt: skip
        if alone:
            whole.append(NONE)
        rows.append(row(whole))
        name = shown.score_name(scoring)
        table = Table(
            columns=tuple(head), rows=tuple(rows), refs=self.summary_ref,
            title=say("scores.title" if shares else "scores.title-number", score=name),
        )  # fmt: skip
        whisker = [
            Whisker(
                site.name,
                None
                if one.untrained
                else _span(site.scores_before, scoring.main, site.test_samples, shares),
                _span(site.scores, scoring.main, site.test_samples, shares),
            )
            for site in one.sites
        ]
        picture = pictures.whiskers(
            whisker, before=say("column.before"), now=say("column.now"), shares=shares, axis=name
        )
        blocks: list[Block] = [
            table,
            Picture(
                picture,
                say("scores.picture" if shares else "scores.picture-number", score=name),
                self.summary_ref,
            ),
        ]
        if one.untrained:
            blocks.append(Text(say("untrained-why"), tone="note"))
        if shares:
            blocks.append(Text(say("interval-why"), tone="note"))
        if one.scores_local_only is not None and one.scores is not None:
            gain = shown.gain(one.scores_local_only, one.scores, scoring)
            blocks.append(Text(say("together", gain=gain), refs=self.summary_ref))
        return tuple(blocks)

    def _gain_tone(self, before: Scores | None, now: Scores | None) -> Tone:
        one = self.part.summary
        if before is None or now is None or one.untrained:
            return ""
        gain = one.scoring.gain(before[one.scoring.main], now[one.scoring.main])
        return "good" if gain > 0 else "bad" if gain < 0 else ""

    def curves(self) -> tuple[Block, ...]:
        """Score and loss by round."""
        say, one, metrics = self.shown.say, self.part.summary, self.part.metrics
        if not one.scores_by_round:
            return ()
        scoring, main = one.scoring, one.scoring.main
        lines = [
            Line(
                say("all-sites"),
                [(i, s[main]) for i, s in enumerate(one.scores_by_round)],
                strong=True,
            )
        ]
        losses: list[Line] = []
        by_round: dict[int, list[tuple[float, int]]] = {}
        for site in sorted({m.site for m in metrics}):
            rows = sorted((m for m in metrics if m.site == site), key=lambda m: m.round)
            points = [
                (m.round - 1, s[main])
                for m in rows
                if (s := m.scoring.scores(m.tested)) is not None
            ]
            lines.append(Line(site, points))
            trained = [(m.round, m.loss) for m in rows if m.loss is not None]
            losses.append(Line(site, trained))
            for m in rows:
                if m.loss is not None:
                    by_round.setdefault(m.round, []).append((m.loss, m.samples))
        name = self.shown.score_name(scoring)
        blocks: list[Block] = [
            Picture(
                pictures.curves(
                    lines, axis=name, rounds=say("rounds-trained"), shares=scoring.target == "class",
                    others=say("single-sites"),
                ),
                say("curve.picture", score=name), (*self.summary_ref, *self.metrics_ref),
            )
        ]  # fmt: skip
        if len(by_round) > 1:
            mean = [
                (r, sum(x * n for x, n in found) / max(1, sum(n for _, n in found)))
                for r, found in sorted(by_round.items())
            ]
            losses.append(Line(say("all-sites"), mean, strong=True))
            svg = pictures.curves(
                losses,
                axis=say("loss"),
                rounds=say("round"),
                shares=False,
                others=say("single-sites"),
            )
            blocks.append(Picture(svg, say("loss.picture"), self.metrics_ref))
        return tuple(blocks)

    def confusion(self) -> tuple[Block, ...]:
        """Recall and precision by class, and what is confused most often; what there is to say where a run kept none."""
        say, found = self.shown.say, self.part.confusion
        if found is None:
            if self.part.summary.target != "class":
                return ()
            return (Text(say("no-confusion"), tone="note"),)
        counts, classes = found.counts, found.classes
        rows = []
        for i, name in enumerate(classes):
            n, right = sum(counts[i]), counts[i][i]
            called = sum(counts[j][i] for j in range(len(classes)))
            rows.append(row([name, f"{n:,}", f"{right:,}", _rate(right, n), _rate(right, called)]))
        head = tuple(
            say(f"column.{c}") for c in ("class", "tested-on", "right", "recall", "precision")
        )
        wrong = sorted(
            ((counts[i][j], i, j) for i in range(len(classes)) for j in range(len(classes)) if i != j and counts[i][j]),
            reverse=True,
        )[:_MOST_CONFUSED]  # fmt: skip
        picture = pictures.confusion(
            found, true=say("true-class"), predicted=say("predicted-class")
        )
        blocks: list[Block] = [
            Picture(picture, say("confusion.picture"), self.summary_ref),
            Table(
                columns=head, rows=tuple(rows), title=say("recall.title"), refs=self.summary_ref,
                tight=len(classes) > 30,
            ),
        ]  # fmt: skip
        if wrong and len(classes) > 2:
            blocks.append(
                Table(
                    columns=tuple(say(f"column.{c}") for c in ("true", "taken-for", "times")),
                    rows=tuple(row([classes[i], classes[j], f"{n:,}"]) for n, i, j in wrong),
                    left=(0, 1), title=say("confused.title"), refs=self.summary_ref,
                )
            )  # fmt: skip
        return tuple(blocks)


def _span(
    scores: Scores | None, main: str, n: int, shares: bool
) -> tuple[float, float, float] | None:
    if scores is None or n < 1:
        return None
    value = scores[main]
    return (value, *interval(value, n)) if shares else (value, value, value)


def _rate(count: int, of: int) -> str:
    if not of:
        return NONE
    low, high = interval(count / of, of)
    return f"{100 * count / of:.1f} % ({100 * low:.0f}-{100 * high:.0f})"

"""The engineer's part about one task of a run: what was trained on what by whom, scores, costs, absences, what left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedsplit.core.config import RunConfig
from fedsplit.core.notes import by_reason
from fedsplit.core.scores import Scores
from fedsplit.report import scores as score_words
from fedsplit.report.page import left, pictures
from fedsplit.report.page.blocks import Block, Cell, Picture, Section, Table, Text, facts, row
from fedsplit.report.page.pictures import Line, Whisker
from fedsplit.report.page.shown import Shown
from fedsplit.report.page.subject import Part, Run
from fedsplit.report.tables import lost_sites
from fedsplit.report.units import NONE, factor_less, human_bytes, human_seconds, interval

_KINDS = ("bytes_activation_up", "bytes_activation_down", "bytes_module_up", "bytes_module_down")
_HIDDEN = {"encoder-secret-file", "encoder-tls-cert", "encoder-tls-key", "encoder-tls-ca", "runs-dir", "encoder-address",
           "encoder-bind", "resume", "run-name"}  # fmt: skip
"""Settings that are places on the server's machine: a report goes from hand to hand."""
_MOST_CONFUSED = 15


@dataclass(frozen=True)
class Engineer:
    """The details of one part."""

    shown: Shown
    run: Run
    part: Part
    several: bool

    def sections(self) -> list[Section]:
        """All of it; what was not measured is said, not left out silently."""
        say = self.shown.say
        name = f"{self.run.name} / {self.part.summary.task}" if self.several else self.run.name
        parts = [
            ("what", self._what()),
            ("scores", self._scores()),
            ("curves", self._curves()),
            ("confusion", self._confusion()),
            ("traffic", self._traffic()),
            ("absent", self._absent()),
            ("left", left.blocks(self.shown, self.run.name, self.part)),
            ("notes", self._notes()),
            ("settings", self._settings()),
        ]
        return [
            Section(say("details", name=name), (), level=1, new_page=True),
            *(Section(say(f"section.{key}"), blocks) for key, blocks in parts if blocks),
        ]

    @property
    def _summary_ref(self) -> tuple[int, ...]:
        return self.shown.sources.ref(self.shown.measured(self.run.name, "summary.json"))

    @property
    def _metrics_ref(self) -> tuple[int, ...]:
        return self.shown.sources.ref(self.shown.measured(self.run.name, "metrics.jsonl"))

    @property
    def _config_ref(self) -> tuple[int, ...]:
        return self.shown.sources.ref(self.shown.say("source.config", run=self.run.name))

    def _what(self) -> tuple[Block, ...]:
        say, shown, one, part = self.shown.say, self.shown, self.part.summary, self.part
        samples = sum(site.samples for site in one.sites)
        rounds = say("rounds-of", done=one.rounds_done, rounds=one.rounds)
        pairs: list[tuple[str, str | Cell]] = [
            (say("fact.task"), one.task),
            (say("fact.outcome"), Cell(self._outcome(), _tone(one.outcome, part.going_on))),
            (say("fact.backbone"), f"{_last(one.backbone)} · sha256 {one.backbone_sha256[:16]}…"),
            (say("fact.method"), self._method()),
            (say("fact.target"), self._target()),
            (say("fact.data"), self._data(samples)),
            (
                say("fact.rounds"),
                rounds if part.going_on else f"{rounds}, {human_seconds(one.wall_s)}",
            ),
            (say("fact.when"), shown.date(self.run.ended)),
            (say("fact.by"), self.run.by or say("by-unknown")),
        ]
        return (facts(pairs, refs=(*self._summary_ref, *self._config_ref)),)

    def _outcome(self) -> str:
        one, say = self.part.summary, self.shown.say
        if self.part.going_on:
            return say("outcome.going-on")
        worst = "partial" if one.outcome == "complete" and lost_sites(one) else one.outcome
        return say(f"outcome.{worst}") + (f": {one.reason}" if one.reason else "")

    def _method(self) -> str:
        config = self.part.config
        words = [self.part.summary.method]
        if config:
            words.append(f"module {config.get('module', NONE)}")
            if config.get("module") == "lora":
                words.append(f"rank {config.get('lora-rank')}")
            words.append(f"device-training {config.get('device-training')}")
            words.append(f"encoder-training {config.get('encoder-training')}")
        return ", ".join(map(str, words))

    def _target(self) -> str:
        say, part = self.shown.say, self.part
        if part.summary.target == "number":
            mean, deviation = part.scale.get("mean"), part.scale.get("deviation")
            known = isinstance(mean, float | int) and isinstance(deviation, float | int)
            return say("target.number", scale=f"{mean:.4g} ± {deviation:.4g}" if known else NONE)
        if not part.classes:
            return say("target.unknown")
        return say("target.classes", n=len(part.classes), names=self.shown.some(part.classes, 20))

    def _data(self, samples: int) -> str:
        say, sites = self.shown.say, self.part.summary.sites
        source = str(self.part.config.get("data", ""))
        text = say("data", n=f"{samples:,}", sites=len(sites))
        # In deployment each site has a source of its own; in simulation one is dealt out.
        return f"{text} ({_last(source)})" if source else text

    def _scores(self) -> tuple[Block, ...]:
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
            columns=tuple(head), rows=tuple(rows), refs=self._summary_ref,
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
                self._summary_ref,
            ),
        ]
        if one.untrained:
            blocks.append(Text(say("untrained-why"), tone="note"))
        if shares:
            blocks.append(Text(say("interval-why"), tone="note"))
        if one.scores_local_only is not None and one.scores is not None:
            gain = shown.gain(one.scores_local_only, one.scores, scoring)
            blocks.append(Text(say("together", gain=gain), refs=self._summary_ref))
        return tuple(blocks)

    def _gain_tone(self, before: Scores | None, now: Scores | None) -> Any:
        one = self.part.summary
        if before is None or now is None or one.untrained:
            return ""
        gain = one.scoring.gain(before[one.scoring.main], now[one.scoring.main])
        return "good" if gain > 0 else "bad" if gain < 0 else ""

    def _curves(self) -> tuple[Block, ...]:
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
                say("curve.picture", score=name), (*self._summary_ref, *self._metrics_ref),
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
            blocks.append(Picture(svg, say("loss.picture"), self._metrics_ref))
        return tuple(blocks)

    def _confusion(self) -> tuple[Block, ...]:
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
            Picture(picture, say("confusion.picture"), self._summary_ref),
            Table(
                columns=head, rows=tuple(rows), title=say("recall.title"), refs=self._summary_ref,
                tight=len(classes) > 30,
            ),
        ]  # fmt: skip
        if wrong and len(classes) > 2:
            blocks.append(
                Table(
                    columns=tuple(say(f"column.{c}") for c in ("true", "taken-for", "times")),
                    rows=tuple(row([classes[i], classes[j], f"{n:,}"]) for n, i, j in wrong),
                    left=(0, 1), title=say("confused.title"), refs=self._summary_ref,
                )
            )  # fmt: skip
        return tuple(blocks)

    def _traffic(self) -> tuple[Block, ...]:
        say, one, metrics = self.shown.say, self.part.summary, self.part.metrics
        if not one.sites:
            return ()
        head = tuple(
            say(f"column.{c}")
            for c in ("site", "cut", "sent", "received", "worked", "waited", "memory", "loads")
        )
        rows = [
            row([
                site.name, site.cut, human_bytes(site.bytes_up), human_bytes(site.bytes_down),
                human_seconds(site.seconds_device), human_seconds(site.seconds_wait),
                human_bytes(site.peak_rss_bytes), f"{site.backbone_loads:,}",
            ])
            for site in one.sites
        ]  # fmt: skip
        sums = [
            sum(getattr(s, f) for s in one.sites)
            for f in ("bytes_up", "bytes_down", "seconds_device", "seconds_wait")
        ]
        rows.append(
            row([
                Cell(say("all-sites"), "strong"), "", human_bytes(sums[0]), human_bytes(sums[1]),
                human_seconds(sums[2]), human_seconds(sums[3]), "", "",
            ])
        )  # fmt: skip
        blocks: list[Block] = [Table(columns=head, rows=tuple(rows), refs=self._summary_ref)]
        moved = one.bytes_activation + one.bytes_module
        pairs: list[tuple[str, str | Cell]] = [
            (say("fact.activations"), human_bytes(one.bytes_activation)),
            (say("fact.module"), human_bytes(one.bytes_module)),
        ]
        if one.bytes_full_model:
            compared = factor_less(moved, one.bytes_full_model)
            pairs.append(
                (
                    say("fact.full"),
                    f"{human_bytes(one.bytes_full_model)} ({say('compared', factor=compared)})",
                )
            )
        blocks.append(facts(pairs, refs=self._summary_ref))
        if metrics:
            names = [site.name for site in one.sites]
            values = [
                [float(sum(getattr(m, kind) for m in metrics if m.site == name)) for kind in _KINDS]
                for name in names
            ]
            labels = [say(f"kind.{kind}") for kind in _KINDS]
            svg = pictures.stacks(names, values, labels, axis=say("bytes-axis"))
            blocks.append(Picture(svg, say("traffic.picture"), self._metrics_ref))
        times = [[site.seconds_device, site.seconds_wait] for site in one.sites]
        svg = pictures.stacks(
            [s.name for s in one.sites], times, [say("column.worked"), say("column.waited")],
            axis=say("seconds-axis"), seconds=True,
        )  # fmt: skip
        blocks.append(Picture(svg, say("times.picture"), self._summary_ref))
        return tuple(blocks)

    def _absent(self) -> tuple[Block, ...]:
        say, one = self.shown.say, self.part.summary
        if not one.left_out and not lost_sites(one):
            text = (
                say("absent.going-on")
                if self.part.going_on
                else say("absent.none", n=len(one.sites))
            )
            return (Text(text, refs=self._summary_ref),)
        rows = [
            row([
                Cell(entry.site, "bad"),
                self.shown.some([self._round(r) for r in entry.rounds], 20), entry.reason,
            ])
            for entry in one.left_out
        ]  # fmt: skip
        told = {entry.site for entry in one.left_out}
        rows += [
            row([Cell(site.name, "bad"), say("n-rounds", n=site.rounds_missed), NONE])
            for site in one.sites
            if site.rounds_missed and site.name not in told
        ]
        head = tuple(say(f"column.{c}") for c in ("site", "rounds", "why"))
        return (Table(columns=head, rows=tuple(rows), left=(0, 1, 2), refs=self._summary_ref),)

    def _round(self, number: int) -> str:
        if number == 0:
            return self.shown.say("roll-call")
        return self.shown.say("last-test") if number > self.part.summary.rounds else str(number)

    def _notes(self) -> tuple[Block, ...]:
        say, one = self.shown.say, self.part.summary
        pairs = [(say("the-run"), note) for note in one.notes]
        pairs += [(site.name, note) for site in one.sites for note in site.notes]
        if not pairs:
            return ()
        rows = [row([self.shown.some(sites, 10), note]) for note, sites in by_reason(pairs).items()]
        head = (say("column.site"), say("column.note"))
        return (Table(columns=head, rows=tuple(rows), left=(0, 1), refs=self._summary_ref),)

    def _settings(self) -> tuple[Block, ...]:
        say, part = self.shown.say, self.part
        blocks: list[Block] = []
        if not part.config:
            blocks.append(Text(say("no-config"), tone="warning"))
        else:
            usual = RunConfig.defaults()
            other = {
                key: value
                for key, value in part.config.items()
                if key not in _HIDDEN and (key not in usual or usual[key] != value)
            }
            head = (say("column.setting"), say("column.value"), say("column.default"))
            rows = [
                row([key, _place(key, value), _place(key, usual.get(key, NONE))])
                for key, value in sorted(other.items())
            ]
            if rows:
                blocks.append(
                    Table(
                        columns=head, rows=tuple(rows), left=(0, 1, 2), title=say("settings.title"),
                        refs=self._config_ref, tight=True,
                    )
                )  # fmt: skip
            blocks.append(Text(say("settings.rest"), tone="note"))
        versions: Mapping[str, Any] = part.versions or {"fedsplit": part.summary.fedsplit_version}
        text = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        blocks.append(Text(say("versions", text=text), refs=self._config_ref))
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


def _last(path: str) -> str:
    """A folder's own name: where it lies on the server is nobody's affair."""
    kind, colon, rest = path.partition(":")
    if colon and "/" in rest:
        return f"{kind}:{rest.rstrip('/').rsplit('/', 1)[-1]}"
    return path.rstrip("/").rsplit("/", 1)[-1]


def _place(key: str, value: Any) -> str:
    text = "" if value is None else str(value)
    return _last(text) if key in ("backbone", "data", "start-module") else text


def _tone(outcome: str, going_on: bool) -> Any:
    return "strong" if going_on else {"complete": "good", "failed": "bad"}.get(outcome, "bad")

"""The engineer's part about one task of a run: what was trained on what by whom, scores, costs, absences, what left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedsplit.core.config import RunConfig
from fedsplit.core.notes import by_reason
from fedsplit.report.page import left, pictures
from fedsplit.report.page.blocks import Block, Cell, Picture, Section, Table, Text, facts, row
from fedsplit.report.page.scored import Scored
from fedsplit.report.page.shown import Shown
from fedsplit.report.page.subject import Part, Run
from fedsplit.report.tables import lost_sites
from fedsplit.report.units import NONE, factor_less, human_bytes, human_seconds

_KINDS = ("bytes_activation_up", "bytes_activation_down", "bytes_module_up", "bytes_module_down")
_HIDDEN = {"encoder-secret-file", "encoder-tls-cert", "encoder-tls-key", "encoder-tls-ca", "runs-dir", "encoder-address",
           "encoder-bind", "resume", "run-name"}  # fmt: skip
"""Settings that are places on the server's machine: a report goes from hand to hand."""


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
            ("scores", self.scored.scores()),
            ("curves", self.scored.curves()),
            ("confusion", self.scored.confusion()),
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

    @cached_property
    def scored(self) -> Scored:
        """How good the module is."""
        return Scored(self.shown, self.run, self.part)

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
        return (facts(pairs, refs=(*self.scored.summary_ref, *self._config_ref)),)

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
        blocks: list[Block] = [Table(columns=head, rows=tuple(rows), refs=self.scored.summary_ref)]
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
        blocks.append(facts(pairs, refs=self.scored.summary_ref))
        if metrics:
            names = [site.name for site in one.sites]
            values = [
                [float(sum(getattr(m, kind) for m in metrics if m.site == name)) for kind in _KINDS]
                for name in names
            ]
            labels = [say(f"kind.{kind}") for kind in _KINDS]
            svg = pictures.stacks(names, values, labels, axis=say("bytes-axis"))
            blocks.append(Picture(svg, say("traffic.picture"), self.scored.metrics_ref))
        times = [[site.seconds_device, site.seconds_wait] for site in one.sites]
        svg = pictures.stacks(
            [s.name for s in one.sites], times, [say("column.worked"), say("column.waited")],
            axis=say("seconds-axis"), seconds=True,
        )  # fmt: skip
        blocks.append(Picture(svg, say("times.picture"), self.scored.summary_ref))
        return tuple(blocks)

    def _absent(self) -> tuple[Block, ...]:
        say, one = self.shown.say, self.part.summary
        if not one.left_out and not lost_sites(one):
            text = (
                say("absent.going-on")
                if self.part.going_on
                else say("absent.none", n=len(one.sites))
            )
            return (Text(text, refs=self.scored.summary_ref),)
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
        return (
            Table(columns=head, rows=tuple(rows), left=(0, 1, 2), refs=self.scored.summary_ref),
        )

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
        return (Table(columns=head, rows=tuple(rows), left=(0, 1), refs=self.scored.summary_ref),)

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

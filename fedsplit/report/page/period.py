"""A federation's part: the runs of a period, what they cost together, and what the audit log holds of it."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime

from fedsplit.core.foreign import printable
from fedsplit.core.scores import SCORINGS
from fedsplit.report.page.blocks import Block, Cell, Section, Table, Text, row
from fedsplit.report.page.shown import Shown
from fedsplit.report.page.subject import Run, Subject
from fedsplit.report.tables import lost_sites
from fedsplit.report.units import NONE, human_bytes, human_seconds

_MOST_EVENTS = 200
_KNOWN = ("time", "what", "who")
_COUNTED = ("run-started", "run-ended", "renewed", "node-key-added")
"""Events that are counted alone: runs have a table of their own, and the others are many."""
_MOST_VERSIONS = 200


def sections(shown: Shown, subject: Subject) -> list[Section]:
    """The runs, then the log."""
    say = shown.say
    title = say("period.since", since=subject.since) if subject.since else say("period.all")
    blocks: list[Block] = (
        [_runs(shown, subject.runs)] if subject.runs else [Text(say("period.none"))]
    )
    blocks += [Text(say("period.unread", why=why), tone="warning") for why in subject.unread]
    return [
        Section(say("period"), (Text(title), *blocks), level=1, new_page=True),
        *versions(shown, subject),
        *([Section(say("audit"), _events(shown, subject))] if subject.audit else []),
    ]


def versions(shown: Shown, subject: Subject) -> list[Section]:
    """What became of the modules: versions with their aliases, and who moved these."""
    say = shown.say
    if not subject.versions:
        return []
    refs = shown.sources.ref(say("source.registry"))
    head = ("version", "aliases", "run", "created", "digest", "parents", "sites", "now")
    rows = []
    for one in subject.versions[-_MOST_VERSIONS:]:
        scoring = SCORINGS[one.target]
        tested = sum(site.test_samples for site in one.sites)
        scores = one.metrics if scoring.main in one.metrics else None
        rows.append(row([
            Cell(one.name, "strong" if one.aliases else ""), shown.some(one.aliases) or NONE, one.run or NONE,
            _stamp(shown, one.created), one.digest[:12], shown.some([p[:12] for p in one.parents], 3) or NONE,
            f"{len(one.sites)}", shown.score(scores, scoring, tested),
        ]))  # fmt: skip
    blocks: list[Block] = [
        Table(
            columns=tuple(say(f"column.{c}") for c in head), rows=tuple(rows), left=(0, 1, 2, 4, 5),
            refs=refs, tight=True,
        )
    ]  # fmt: skip
    if subject.moves:
        names = {one.digest: one.name for one in subject.versions}
        moved = [
            row([
                _stamp(shown, move.at), move.task, move.alias, names.get(move.digest, move.digest[:12]),
                say(f"move.{move.kind}"), move.by or NONE, move.why or NONE,
            ])
            for move in reversed(subject.moves[-_MOST_VERSIONS:])
        ]  # fmt: skip
        columns = tuple(
            say(f"column.{c}") for c in ("when", "task", "alias", "version", "event", "by", "why")
        )
        blocks.append(
            Table(
                columns=columns, rows=tuple(moved), left=(1, 2, 3, 4, 5, 6), title=say("moves.title"),
                refs=refs, tight=True,
            )
        )  # fmt: skip
    return [Section(say("section.versions"), tuple(blocks))]


def _stamp(shown: Shown, at: float) -> str:
    return shown.stamp(datetime.fromtimestamp(at, UTC)) if at else NONE


def _runs(shown: Shown, runs: tuple[Run, ...]) -> Table:
    say = shown.say
    head = tuple(
        say(f"column.{c}")
        for c in (
            "run",
            "task",
            "ended",
            "by",
            "outcome",
            "sites",
            "before",
            "now",
            "moved",
            "worked",
        )
    )
    rows, moved, worked = [], 0, 0.0
    for run in runs:
        for part in run.parts:
            one = part.summary
            worst = "partial" if one.outcome == "complete" and lost_sites(one) else one.outcome
            state = "going-on" if part.going_on else worst
            size = one.bytes_activation + one.bytes_module
            seconds = sum(site.seconds_device for site in one.sites)
            moved, worked = moved + size, worked + seconds
            before = (
                say("untrained") if one.untrained else shown.score(one.scores_start, one.scoring)
            )
            rows.append(
                row([
                    Cell(run.name, refs=shown.sources.ref(shown.measured(run.name, "summary.json"))),
                    one.task, shown.stamp(run.ended), run.by or NONE,
                    Cell(say(f"outcome.{state}"), "good" if state == "complete" else "bad"),
                    f"{len(one.sites)}", before,
                    Cell(shown.score(one.scores, one.scoring, one.tested), "strong"),
                    human_bytes(size), human_seconds(seconds),
                ])
            )  # fmt: skip
    total: list[str | Cell] = [
        Cell(say("together-sum"), "strong"),
        *[""] * 7,
        human_bytes(moved),
        human_seconds(worked),
    ]
    rows.append(row(total))
    return Table(columns=head, rows=tuple(rows), left=(0, 1, 3, 4), tight=True)


def _events(shown: Shown, subject: Subject) -> tuple[Block, ...]:
    say = shown.say
    refs = shown.sources.ref(say("source.audit"))
    counts = Counter(printable(line.get("what"), limit=40) for line in subject.audit)
    head = (say("column.event"), say("column.times"))
    table = Table(
        columns=head,
        rows=tuple(row([what, f"{n:,}"]) for what, n in counts.most_common()),
        refs=refs,
    )
    told = [line for line in subject.audit if line.get("what") not in _COUNTED]
    rows = []
    for line in reversed(told[-_MOST_EVENTS:]):
        details = "; ".join(
            f"{printable(k, limit=40)}: {printable(v, limit=120)}"
            for k, v in line.items()
            if k not in _KNOWN and k not in ("serial", "code", "key")
        )
        rows.append(row([
            printable(line.get("time", ""), limit=40)[:16].replace("T", " "), printable(line.get("what"), limit=40),
            printable(line.get("who"), limit=80), details,
        ]))  # fmt: skip
    if not rows:
        return (table,)
    columns = tuple(say(f"column.{c}") for c in ("time", "event", "who", "details"))
    return table, Table(columns=columns, rows=tuple(rows), left=(1, 2, 3), refs=refs, tight=True)

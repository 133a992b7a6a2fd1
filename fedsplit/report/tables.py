"""A run's summary as tables that the people at the sites can read, in honest words.

Rich renderables only; printing is the CLI's. A run that lost a site is never called a success, and
the site is named.
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedsplit.core.notes import by_reason
from fedsplit.core.records import LeftOut, Outcome, SiteSummary, Summary, TasksSummary
from fedsplit.core.scores import Scores
from fedsplit.report import scores as score_words
from fedsplit.report.units import NONE, factor_less, human_bytes, human_seconds

_COLOURS = {"complete": "green", "partial": "yellow", "failed": "red"}


def lost_sites(summary: Summary) -> tuple[str, ...]:
    """Names of the sites that took no part or missed a round, each once."""
    missed = [s.name for s in summary.sites if s.rounds_missed]
    return tuple(dict.fromkeys([entry.site for entry in summary.left_out] + missed))


def exit_text(summary: Summary) -> str:
    """How the run ended, in a sentence or two, with the names of the sites it lost."""
    lost = lost_sites(summary)
    done = f"{summary.rounds_done} of {summary.rounds} rounds"
    if summary.outcome == "failed":
        text = f"Run {summary.run} failed after {done}: {summary.reason or 'no reason was given'}"
        return _and_lost(text, lost)
    if lost or summary.outcome == "partial":
        text = f"Run {summary.run} is partial ({done}): its numbers stand for a subset of the sites or rounds."
        reason = f" {summary.reason}" if summary.reason else ""
        return _and_lost(text + reason, lost)
    return f"Run {summary.run} is complete: all {len(summary.sites)} sites took part in all {summary.rounds} rounds."


def summary_view(summary: Summary) -> RenderableType:
    """Everything a person wants to see after a run: sites, costs, the whole, who was left out."""
    headline = Text(exit_text(summary), style=f"bold {_COLOURS[_worst(summary)]}")
    tables = []
    if summary.sites and summary.rounds_done:
        tables += [_score_table(summary), _cost_table(summary)]
    if summary.rounds_done:
        # Before the first round is through there are no numbers, only the reason.
        tables.append(_global_block(summary))
    if summary.left_out:
        tables.append(_left_out_table(summary.left_out, summary.rounds))
    if summary.notes or any(site.notes for site in summary.sites):
        tables.append(_notes_table(summary))
    return Group("", headline, *(part for table in tables for part in ("", table)))


def tasks_exit_text(summary: TasksSummary) -> str:
    """How a run of several tasks ended: how many are complete, and what became of each of the others."""
    complete = [task for task in summary.tasks if _worst(task) == "complete"]
    text = f"Run {summary.run}: {len(complete)} of {len(summary.tasks)} tasks are complete."
    others = [exit_text(task) for task in summary.tasks if task not in complete]
    return "\n".join([text, *others])


def tasks_view(summary: TasksSummary) -> RenderableType:
    """Each task's own view, then one table of all tasks."""
    table = _table("All tasks", "Task", "Sites", "Before", "Now", "Rounds", "Outcome")
    for task in summary.tasks:
        table.add_row(
            Text(task.task), str(len(task.sites)), _before(task, task.scores_start, task.tested),
            Text(score_words.main(task.scores, task.scoring, task.tested), style="bold"), f"{task.rounds_done} of {task.rounds}",
            Text(_worst(task), style=f"bold {_COLOURS[_worst(task)]}"),
        )  # fmt: skip
    return Group(*(summary_view(task) for task in summary.tasks), "", table)


def _worst(summary: Summary) -> Outcome:
    return "partial" if summary.outcome == "complete" and lost_sites(summary) else summary.outcome


def _and_lost(text: str, lost: tuple[str, ...]) -> str:
    text = text.rstrip()
    text = text if text.endswith((".", "!", "?")) else f"{text}."
    return f"{text} Left out: {', '.join(lost)}." if lost else text


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="dim", box=None
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0)
    table.pad_edge = False
    return table


def _score_table(summary: Summary) -> Table:
    """The main score of each site, and beside the present one the others."""
    scoring = summary.scoring
    more = list(score_words.others(summary.scores, scoring))
    shares = scoring.target == "class"
    interval = " (in brackets its 95 % interval)" if shares else " (in the unit of the numbers)"
    table = _table(
        f"{_capital(scoring.main)} on each site's own test samples{interval}",
        "Site", "Cut", "Trains on", "Tests on", "Before", "Now", *more, "Own model", "Alone", "Rounds missed",
    )  # fmt: skip
    for site in summary.sites:
        n = site.test_samples
        rest = score_words.others(site.scores, scoring)
        table.add_row(
            Text(site.name), site.cut, f"{site.samples:,}", f"{n:,}", _before(summary, site.scores_before, n),
            Text(score_words.main(site.scores, scoring, n), style="bold"), *(rest.get(name, NONE) for name in more),
            score_words.main(site.scores_personal, scoring, n),
            score_words.main(site.scores_local_only_personal, scoring, n), _missed(site),
        )  # fmt: skip
    known = {site.name for site in summary.sites}
    for name in (n for n in lost_sites(summary) if n not in known):
        table.add_row(Text(name), *[NONE] * (7 + len(more)), Text("took no part", style="bold red"))
    return table


def _capital(score: str) -> str:
    words = score_words.title(score)
    return words[0].upper() + words[1:]


def _before(summary: Summary, scores: Scores | None, n: int) -> str:
    """The score before training; a classifier of zeros names one class always, which is nothing to compare with."""
    return "untrained" if summary.untrained else score_words.main(scores, summary.scoring, n)


def _missed(site: SiteSummary) -> Text:
    return Text(str(site.rounds_missed), style="bold red" if site.rounds_missed else "")


def _cost_table(summary: Summary) -> Table:
    table = _table(
        "What it cost each site",
        "Site", "Sent", "Received", "Device worked", "Waited for server", "Peak memory",
    )  # fmt: skip
    for site in summary.sites:
        table.add_row(
            Text(site.name), human_bytes(site.bytes_up), human_bytes(site.bytes_down),
            human_seconds(site.seconds_device), human_seconds(site.seconds_wait),
            human_bytes(site.peak_rss_bytes),
        )  # fmt: skip
    return table


def _global_block(summary: Summary) -> Table:
    table = Table(title="The whole federation", title_justify="left", title_style="bold", box=None)
    table.show_header = table.pad_edge = False
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    moved = summary.bytes_activation + summary.bytes_module
    tested = summary.tested
    rows = {
        _capital(summary.scoring.main): f"{_before(summary, summary.scores_start, tested)} -> "
        f"{score_words.whole(summary.scores, summary.scoring, tested)} on the {tested:,} test samples of the sites that "
        "answered",
        "Each site alone": _alone(summary),
        "Activations moved": human_bytes(summary.bytes_activation),
        "Module moved": human_bytes(summary.bytes_module),
        "Full-model FedAvg": f"{human_bytes(summary.bytes_full_model)} for the same rounds; "
        f"this run moved {factor_less(moved, summary.bytes_full_model)}",
        "Rounds": f"{summary.rounds_done} of {summary.rounds}, {human_seconds(summary.wall_s)} from the roll call to the "
        "last test",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _alone(summary: Summary) -> str:
    alone, together, scoring = summary.scores_local_only, summary.scores, summary.scoring
    if alone is None:
        return "not measured (compare-local-only=true measures it)"
    text = f"{score_words.main(alone, scoring)} on average, on the same samples"
    if together is None:
        return text
    gain = scoring.gain(alone[scoring.main], together[scoring.main])
    gained = "training together gained" + ("" if scoring.target == "class" else ":")
    verdict = gained if gain > 0 else "training together did not help:"
    return f"{text}; {verdict} {score_words.difference(gain, scoring)}"


def _left_out_table(left_out: tuple[LeftOut, ...], summary_rounds: int) -> Table:
    table = _table("Left out", "Site", "Rounds", "Why")
    table.columns[0].no_wrap = False
    table.columns[2].justify = "left"
    # The end of a reason is often the file's name, so long words fold and are not cut.
    table.columns[2].overflow = "fold"
    # Nine sites with one fault are one row.
    same: dict[tuple[int, ...], list[LeftOut]] = {}
    for entry in left_out:
        same.setdefault(entry.rounds, []).append(entry)
    for number, entries in same.items():
        rounds = ", ".join(_round_name(r, summary_rounds) for r in number)
        for reason, sites in by_reason((e.site, e.reason) for e in entries).items():
            table.add_row(Text(", ".join(sites), style="bold red"), rounds, Text(reason))
    return table


def _notes_table(summary: Summary) -> Table:
    """What the run and its sites told; a note that several share stands once, with all of them."""
    sites = summary.sites
    told: dict[str, list[str]] = {note: ["the run"] for note in summary.notes}
    for site in sites:
        for note in site.notes:
            told.setdefault(note, []).append(site.name)
    table = _table("What the sites noted", "Site", "Note")
    table.columns[0].no_wrap = False
    table.columns[1].justify = "left"
    table.columns[1].overflow = "fold"
    for note, names in told.items():
        who = "all sites" if 1 < len(sites) == len(names) else ", ".join(names)
        table.add_row(Text(who), Text(note))
    return table


def _round_name(number: int, rounds: int) -> str:
    if number == 0:
        return "roll call"
    return "last test" if number > rounds else str(number)

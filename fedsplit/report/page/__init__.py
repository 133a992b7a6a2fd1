"""The report: one HTML file without outside parts, for the boss first and the engineer after, or the same as Markdown.

subject.py, measured.py             what it is about: runs as their files are, and what they measured
boss.py                             the first page; report/costs.py and report/roi.py have its values and figures
engineer.py, scored.py, left.py     a task of a run in detail
period.py                           a federation's runs, versions of modules, events
blocks.py, shown.py                 what a page is made of; numbers and names in a language (sentences: report/words.py)
pictures.py, write.py               SVG, by matplotlib; HTML and Markdown, where all is escaped
"""

from __future__ import annotations

from datetime import UTC, datetime

from fedsplit import __version__
from fedsplit.report import roi
from fedsplit.report.costs import Costs
from fedsplit.report.page import boss, period
from fedsplit.report.page.blocks import Mood, Page
from fedsplit.report.page.engineer import Engineer
from fedsplit.report.page.measured import measured
from fedsplit.report.page.shown import Shown
from fedsplit.report.page.subject import Subject
from fedsplit.report.roi import Return
from fedsplit.report.tables import lost_sites
from fedsplit.report.words import Words

__all__ = ["make_page"]


def make_page(subject: Subject, *, lang: str, costs: Costs | None = None) -> tuple[Page, Return]:
    """The page and the return on investment that it tells. Raises ConfigError where the costs are of other classes."""
    say = Words(lang)
    shown = Shown(
        say,
        currency=costs.currency if costs else "",
        costs=costs.path.name if costs else "costs.toml",
    )
    known = measured(subject, costs)
    if costs is not None:
        found = roi.returns(roi.quantities(costs, known))
    else:
        found = roi.returns({one.key: one for one in known})
    sections = boss.Boss(shown, subject, costs, found).sections()
    if subject.federation:
        sections += period.sections(shown, subject)
    told = subject.told
    for run, part in told:
        sections += Engineer(shown, run, part, several=len(told) > 1).sections()
    if not subject.federation:
        sections += period.versions(shown, subject)
    state, tone = _state(subject)
    page = Page(
        lang=lang,
        title=say("title", name=subject.title),
        subtitle=_subtitle(shown, subject),
        state=say(f"outcome.{state}") if state else "",
        tone=tone,
        sections=tuple(sections),
        sources=shown.sources.all,
        made=say("made", version=__version__, date=shown.date(datetime.now(UTC))),
    )
    return page, found


def _state(subject: Subject) -> tuple[str, Mood]:
    """How the run ended, at its worst; nothing for a federation's many."""
    if subject.federation:
        return "", ""
    parts = [part for _, part in subject.told]
    if any(part.going_on for part in parts):
        return "going-on", "warning"
    outcomes = {part.summary.outcome for part in parts}
    if "failed" in outcomes:
        return "failed", "bad"
    if "partial" in outcomes or any(lost_sites(part.summary) for part in parts):
        return "partial", "warning"
    return "complete", "good"


def _subtitle(shown: Shown, subject: Subject) -> str:
    say = shown.say
    tasks = sorted({part.summary.task for run in subject.runs for part in run.parts})
    sites = {site.name for run in subject.runs for part in run.parts for site in part.summary.sites}
    if subject.federation:
        return say(
            "subtitle.federation",
            runs=len(subject.runs),
            tasks=shown.some(tasks, 6),
            sites=len(sites),
        )
    return say(
        "subtitle.run",
        tasks=shown.some(tasks, 6),
        sites=len(sites),
        date=shown.date(subject.runs[0].ended),
    )

"""`fedsplit report`: a run, or a federation's runs, as one HTML file for the boss and the engineer. The work is `fedsplit.report.page`'s."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsplit.cli.console import Output
from fedsplit.cli.run import JsonFlag
from fedsplit.core.errors import ConfigError, RegistryError, RunDirError
from fedsplit.core.foreign import printable

if TYPE_CHECKING:
    from fedsplit.report.page.subject import Run, Subject

_NAME = "report.html"


def report(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="The run's folder, or its name with --federation."),
    ] = None,
    federation: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A federation folder: report all its runs.")
    ] = None,
    since: Annotated[
        str,
        typer.Option(
            metavar="DATE", help="Only runs that ended on this day (YYYY-MM-DD) or later."
        ),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Else report.html in the folder that is reported."),
    ] = None,
    md: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it as Markdown, too.")
    ] = None,
    lang: Annotated[str, typer.Option(metavar="en|ja", help="The language of the report.")] = "en",
    costs: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="What inspection costs at your plant.")
    ] = None,
    costs_template: Annotated[
        bool,
        typer.Option("--costs-template", help="Print a costs file with every key and no value."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a report: return on investment first, then what was trained, scores, costs, absences, what left the sites."""
    output = Output(as_json=as_json)
    if costs_template:
        from fedsplit.report.costs import template

        text = template(lang)
        if as_json:
            output.result({"costs_template": text})
        else:
            sys.stdout.write(text)
        return
    if run is None and federation is None:
        raise typer.BadParameter("name a run's folder, or a federation with --federation DIR")
    with output.if_long("drawing the report ..."):
        _write(run, federation, _day(since), out, md, lang, costs, output)


def _write(
    run: Path | None,
    federation: Path | None,
    since: date | None,
    out: Path | None,
    md: Path | None,
    lang: str,
    costs: Path | None,
    output: Output,
) -> None:
    from fedsplit.core.extras import extra
    from fedsplit.report.costs import Costs
    from fedsplit.report.page.subject import Subject, read_run
    from fedsplit.report.words import Words

    Words(lang)
    found = Costs.read(costs) if costs is not None else None
    if federation is not None:
        subject, folder = _of_federation(federation, run, since)
    else:
        assert run is not None
        if since is not None:
            raise ConfigError(
                "--since chooses among the runs of a federation; leave it out, or name --federation DIR"
            )
        one = read_run(run)
        subject, folder = Subject(title=one.name, runs=(one,)), run
    subject = _with_versions(subject, federation or folder.parent, output)
    with extra("server", "a report's pictures"):
        import fedsplit.report.page.pictures  # noqa: F401
    from fedsplit.report.page import make_page
    from fedsplit.report.page.write import as_html, as_markdown

    page, returns = make_page(subject, lang=lang, costs=found)
    target = out if out is not None else folder / _NAME
    _save(target, as_html(page))
    output.show(f"The report is in {target}")
    if md is not None:
        _save(md, as_markdown(page))
        output.show(f"and as Markdown in {md}")
    figures = {
        key: {
            "value": _number(f.value),
            "low": _number(f.low),
            "high": _number(f.high),
            "assumed": f.assumed,
        }
        for key, f in returns.figures.items()
    }
    output.result({
        "out": str(target), "md": str(md) if md is not None else None, "runs": [r.name for r in subject.runs],
        "figures": figures, "missing": {k: list(v) for k, v in returns.missing.items()}, "unread": list(subject.unread),
    })  # fmt: skip
    for why in subject.unread:
        output.note(f"not in the report: {why}")


def _with_versions(subject: Subject, start: Path, output: Output) -> Subject:
    """What the registry beside the runs has of them; a damaged one is told, and the report is made without it."""
    import dataclasses

    from fedsplit.registry.places import find_registry
    from fedsplit.registry.registry import ModuleRegistry

    if (place := find_registry(start)) is None:
        return subject
    try:
        with ModuleRegistry.open(place) as registry:
            versions, moves = registry.versions(), registry.history()
    except (RegistryError, ConfigError) as err:
        output.note(f"the registry of modules is not in the report: {err}")
        return subject
    names = {run.name for run in subject.runs}
    versions = [v for v in versions if v.run in names or any(run.name in names for run in v.runs)]
    tasks = {version.task for version in versions}
    return dataclasses.replace(
        subject, versions=tuple(versions), moves=tuple(m for m in moves if m.task in tasks)
    )


def _of_federation(path: Path, name: Path | None, since: date | None) -> tuple[Subject, Path]:
    """The runs of a federation that have ended since a day, or one of them, with what the audit log knows."""
    from fedsplit.plant.server import audit
    from fedsplit.plant.server.folder import FederationFolder
    from fedsplit.report.page.subject import Subject, read_run

    folder = FederationFolder.at(path)
    lines = list(audit.read(folder))
    by = {
        str(line.get("run")): printable(line.get("by", ""))
        for line in lines
        if line.get("what") == "run-started"
    }
    if name is not None:
        where = name if name.is_dir() else folder.runs / name
        one = read_run(where, by=by.get(where.name, ""))
        return Subject(title=one.name, runs=(one,)), where
    runs: list[Run] = []
    unread: list[str] = []
    for config in sorted(folder.runs.glob("*/config.json")):
        try:
            runs.append(read_run(config.parent, by=by.get(config.parent.name, "")))
        except RunDirError as err:
            unread.append(printable(err))
    if since is not None:
        first = datetime(since.year, since.month, since.day).astimezone()
        runs = [r for r in runs if r.ended >= first]
        lines = [line for line in lines if _at(line) >= first]
    runs.sort(key=lambda r: r.ended, reverse=True)
    subject = Subject(
        title=printable(folder.path.absolute().name), runs=tuple(runs), federation=True,
        since=since.isoformat() if since is not None else "", audit=_events(lines), unread=tuple(unread),
    )  # fmt: skip
    return subject, folder.path


def _events(lines: Sequence[Any]) -> list[Mapping[str, Any]]:
    return [line for line in lines if isinstance(line, dict)]


def _at(line: Any) -> datetime:
    try:
        return datetime.fromisoformat(str(line["time"])).astimezone(UTC)
    except (ValueError, KeyError, TypeError):
        return datetime.fromtimestamp(0, UTC)


def _day(text: str) -> date | None:
    """Raises ConfigError for what is no day."""
    if not text:
        return None
    try:
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", text):
            raise ValueError
        return date.fromisoformat(text)
    except ValueError as err:
        raise ConfigError(
            f"--since {printable(text, limit=40)} is no day; write it as 2026-04-01"
        ) from err


def _save(path: Path, text: str) -> None:
    from fedsplit.core.whole_files import write_whole

    try:
        write_whole(path, text)
    except OSError as err:
        raise RunDirError(
            f"{path} cannot be written: {err.strerror or err}; name another place with --out or --md"
        ) from err


def _number(value: float) -> float | None:
    """JSON has no infinity: a payback time of null is never."""
    return None if value == float("inf") else value

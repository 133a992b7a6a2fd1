"""`fedsplit status`: how a federation stands, live in the terminal, or once as JSON."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from fedsplit.cli.console import Output, console
from fedsplit.cli.run import JsonFlag

_EVERY_S = 1.0
LIGHTS = {
    "working": ("▶", "cyan"),
    "idle": ("●", "green"),
    "late": ("◔", "yellow"),
    "sleeping": ("☾", "blue"),
    "failing": ("✖", "bold red"),
    "refused": ("⊘", "red"),
    "invited": ("✉", "magenta"),
}


def status(
    federation: Annotated[
        Path, typer.Option(metavar="DIR", help="The federation folder.")
    ] = Path(),
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show a federation: services, sites, the run that goes on, who is late. Live in a terminal; Ctrl-C ends the view."""
    from rich.live import Live

    from fedsplit.plant.server.folder import FederationFolder
    from fedsplit.plant.server.status import federation_status

    folder = FederationFolder.at(federation)
    out = Output(as_json=as_json)
    now = federation_status(folder)
    if as_json:
        out.result(now.model_dump(mode="json"))
        return
    screen = console()
    if once or not screen.is_terminal:
        screen.print(view(now))
        return
    with Live(view(now), console=screen, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(_EVERY_S)
                live.update(view(federation_status(folder)), refresh=True)
        except KeyboardInterrupt:
            return


def view(now: Any) -> Any:
    """All of it as one renderable."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [_head(now), Text(), _sites(now)]
    for site in now.sites:
        for what in (site.drift, site.module_fault):
            if what:
                parts.append(
                    Text(
                        f"⚠ {site.name}, module {site.module or '(none)'}: {what}",
                        style="bold yellow",
                    )
                )
    if now.run is not None:
        parts += [Text(), _run(now.run)]
    if now.ended:
        parts += [Text(), _ended(now.ended)]
    return Group(*parts)


def _head(now: Any) -> Any:
    from rich.text import Text

    if not now.up:
        return Text.assemble((f"{now.address}  down", "bold red"), f"\n{now.message}")
    services = "  ".join(
        f"{name} {state}"
        + (f" (started again {now.restarts[name]} times)" if now.restarts.get(name) else "")
        for name, state in now.services.items()
    )
    sessions = f"  ({now.encoder.live_sessions} streams)" if now.encoder is not None else ""
    good = all(state == "up" for state in now.services.values())
    return Text.assemble(
        (f"{now.address}  up", "bold green" if good else "bold yellow"),
        f"\n{services}{sessions}",
    )


def _sites(now: Any) -> Any:
    from rich.table import Table
    from rich.text import Text

    from fedsplit.report.units import human_bytes, human_seconds

    if not now.sites:
        return Text("No site yet. Invite one: fedsplit federation add-site NAME")
    made = Table(box=None, pad_edge=False)
    for head in (
        "",
        "site",
        "state",
        "last seen",
        "round",
        "steps/s",
        "up",
        "down",
        "memory",
        "module",
        "",
    ):
        made.add_column(
            head,
            justify="right" if head in ("round", "steps/s", "up", "down", "memory") else "left",
        )
    for site in now.sites:
        light, style = LIGHTS[site.state]
        seen = "-" if site.last_seen_s is None else f"{human_seconds(site.last_seen_s)} ago"
        cells = (
            site.name, site.state, seen, str(site.round or "-"), f"{site.steps_per_s:.1f}" if site.steps_per_s else "-",
            human_bytes(site.bytes_up) if site.bytes_up else "-", human_bytes(site.bytes_down) if site.bytes_down else "-",
            human_bytes(site.rss_bytes) if site.rss_bytes else "-", site.module or "-", site.detail,
        )  # fmt: skip
        made.add_row(
            Text(light, style=style),
            *(Text(cell, style=style if i == 1 else "") for i, cell in enumerate(cells)),
        )
    return made


def _run(run: Any) -> Any:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    from fedsplit.report.units import human_bytes, human_seconds, percent

    left = f", about {human_seconds(run.left_s)} left" if run.left_s is not None else ""
    score = f", {run.score_name} {percent(run.score)}" if run.score is not None else ""
    line = Text(
        f"{run.name}: {run.phase}, round {run.round} of {run.rounds}, {len(run.replied)} of {len(run.sites)} answers"
        f"{score}, {human_bytes(run.bytes)} moved, {human_seconds(run.seconds)}{left}"
    )
    done = max(0, run.round - 1) * max(1, len(run.sites)) + len(run.replied)
    bar = ProgressBar(total=max(1, run.rounds * max(1, len(run.sites))), completed=done, width=60)
    return Group(line, bar, *([Text(run.message)] if run.message else []))


def _ended(runs: Any) -> Any:
    from rich.table import Table
    from rich.text import Text

    from fedsplit.report.units import human_bytes, human_seconds, percent

    styles = {"complete": "green", "partial": "yellow", "failed": "bold red"}
    made = Table(box=None, pad_edge=False)
    for head in ("run", "outcome", "when", "rounds", "score", "moved", "took", ""):
        made.add_column(head)
    for run in runs:
        when = f"{datetime.fromtimestamp(run.started).astimezone():%Y-%m-%d %H:%M}"
        cells = (
            when, f"{run.round} of {run.rounds}", f"{run.score_name} {percent(run.score)}" if run.score is not None else "-",
            human_bytes(run.bytes), human_seconds(run.seconds), run.message,
        )  # fmt: skip
        made.add_row(run.name, Text(run.phase, style=styles.get(run.phase, "")), *map(Text, cells))
    return made

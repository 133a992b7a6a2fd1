"""`fedsplit federation add-site | list | revoke | rotate`: who belongs to the federation of this machine's server.

They work whether the server is up or down: the registry is a file. What Flower has to forget goes at once where the
SuperLink is up, else at its next start.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsplit.cli.console import Output
from fedsplit.cli.run import JsonFlag
from fedsplit.core.errors import ConfigError, FederationError

if TYPE_CHECKING:
    from rich.table import Table

    from fedsplit.plant.join_code import JoinCode
    from fedsplit.plant.server.folder import FederationFolder
    from fedsplit.plant.server.registry import Registry, SiteRow

MAX_HOURS = 24 * 30
_UNITS = {"m": 1 / 60, "h": 1.0, "d": 24.0}

app = typer.Typer(
    help="The sites of a federation: who may join, who is there, who is out.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

FederationOption = Annotated[
    Path,
    typer.Option(
        "--federation",
        metavar="DIR",
        help="The federation folder; else the working directory.",
    ),
]
SiteName = Annotated[str, typer.Argument(metavar="NAME", help="The site's name.")]
Valid = Annotated[
    str,
    typer.Option(
        metavar="TIME",
        help="How long the code is good, e.g. 30m, 24h, 7d; else as federation.toml says.",
    ),
]


@app.command("add-site")
def add_site(
    name: SiteName,
    *,
    federation: FederationOption = Path(),
    valid: Valid = "",
    as_json: JsonFlag = False,
) -> None:
    """Invite a site: print a join code for it. A revoked site is invited again by its name."""
    with _registry(federation) as (folder, registry):
        hours = _hours(valid, folder)
        _show_code(Output(as_json=as_json), name, registry.add_site(name, hours), hours)


@app.command("rotate")
def rotate(
    name: SiteName,
    *,
    federation: FederationOption = Path(),
    valid: Valid = "",
    as_json: JsonFlag = False,
) -> None:
    """Print a new join code for a site, with which it joins again with new keys. The old keys cease then."""
    with _registry(federation) as (folder, registry):
        hours = _hours(valid, folder)
        _show_code(Output(as_json=as_json), name, registry.rotate(name, hours), hours, again=True)


@app.command("revoke")
def revoke(
    name: SiteName, *, federation: FederationOption = Path(), as_json: JsonFlag = False
) -> None:
    """Put a site out at once: its certificate, its node key and its codes are of no use any more."""
    from fedsplit.plant.server.node_keys import NodeKeys, of_folder
    from fedsplit.plant.server.runs import present

    out = Output(as_json=as_json)
    with _registry(federation) as (folder, registry):
        keys = registry.revoke(name)
        forgotten = not keys
        if keys:
            try:
                present(folder)
                node_keys = NodeKeys(folder, registry, lambda: of_folder(folder))
                forgotten = node_keys.forget(keys)
            except FederationError:
                forgotten = False
    out.show(f"{name} is revoked. Its certificate and its join codes are of no use any more.")
    if not forgotten:
        out.note("Flower's SuperLink is not up. It forgets the site's node key when it starts.")
    out.result({"site": name, "state": "revoked", "flower_told": forgotten})


@app.command("list")
def list_sites(*, federation: FederationOption = Path(), as_json: JsonFlag = False) -> None:
    """Show all sites: state, certificate, last report."""
    out = Output(as_json=as_json)
    with _registry(federation) as (_, registry):
        rows = registry.sites()
    if rows:
        out.show(_table(rows))
    else:
        out.show("No sites yet. `fedsplit federation add-site NAME` invites one.")
    out.result({"sites": [_record(row) for row in rows]})


@contextmanager
def _registry(path: Path) -> Iterator[tuple[FederationFolder, Registry]]:
    from fedsplit.plant.server.folder import FederationFolder
    from fedsplit.plant.server.registry import Registry

    folder = FederationFolder.at(path)
    with Registry(folder) as registry:
        yield folder, registry


def _hours(valid: str, folder: FederationFolder) -> float:
    """The time in `valid`, in hours. Raises ConfigError."""
    if not valid:
        return folder.settings.certificates.code_hours
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)([mhd])", valid.strip())
    hours = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 0 < hours <= MAX_HOURS:
        raise ConfigError(
            f"--valid {valid[:40]}: a time is wanted, up to {MAX_HOURS // 24} days, e.g. 30m, 24h or 7d"
        )
    return hours


def _show_code(
    out: Output, name: str, code: JoinCode, hours: float, *, again: bool = False
) -> None:
    expires = time.time() + hours * 3600
    text = code.text()
    more = "--again --dir SITE" if again else "--data SOURCE --task NAME"
    out.note(
        f"Join code of {name}, good for one use until {_day(expires)}. Who has it can join as {name}: send it by a way "
        f"that only the site's people read. On the site's machine:\n\n    fedsplit site join CODE {more}\n"
    )
    if not out.as_json:
        # With --json it stands in the object alone: stderr goes to logs.
        out.show(text)
    out.result(
        {"site": name, "code": text, "expires": round(expires, 3), "expires_at": _iso(expires)}
    )


def _table(rows: list[SiteRow]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("site", "state", "certificate ends", "last seen", "does", "version"):
        table.add_column(heading)
    for row in rows:
        told = row.report
        cells = (
            row.name,
            _state(row),
            _day(row.certificate_ends) if row.state == "member" else "-",
            _day(row.last_seen) if row.last_seen else "never",
            told.state if told and row.state == "member" else "-",
            told.fedsplit_version if told else "-",
        )
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _state(row: SiteRow) -> str:
    if row.state == "invited":
        return f"invited until {_day(row.code_expires)}" if row.code_expires else "invitation over"
    if row.state == "member" and row.certificate_ends < time.time():
        return "member, certificate over"
    return row.state


def _record(row: SiteRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "state": row.state,
        "certificate_name": row.common_name,
        "certificate_serial": row.serial,
        "certificate_ends": row.certificate_ends,
        "code_expires": row.code_expires,
        "joined": row.joined,
        "last_seen": row.last_seen,
        "version": row.report.fedsplit_version if row.report else "",
        "report": row.report.model_dump() if row.report else None,
    }


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")

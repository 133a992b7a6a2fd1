"""`fedsplit site clean`: what a site keeps, as a table, and what of it goes. The work is `fedsplit.plant.site.clean`'s."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from fedsplit.cli.console import Output
from fedsplit.cli.run import JsonFlag
from fedsplit.cli.site_folder import SiteArgument, site_folder

if TYPE_CHECKING:
    from fedsplit.plant.site.clean import Kept


def clean(
    site: SiteArgument = None,
    *,
    apply: Annotated[
        bool, typer.Option("--apply", help="Remove what goes; else it is only listed.")
    ] = False,
    all_backbones: Annotated[
        bool,
        typer.Option(
            "--all-backbones", help="Remove every backbone; the next run needs its own again."
        ),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """List what the site keeps, with sizes, and what goes by the retention settings of site.toml.

    Exit codes: 0 listed or removed, 1 something could not be removed, 2 no site folder.
    """
    from fedsplit.plant.site.clean import kept, remove

    out = Output(as_json=as_json)
    folder = site_folder(site)
    found = kept(folder, all_backbones=all_backbones)
    out.show(_shown(found, folder.path))
    freed, faults = remove(folder, found) if apply else (0, [])
    for fault in faults:
        out.note(fault)
    goes = sum(one.bytes for one in found if one.goes)
    if apply:
        out.note(f"{freed / 1e6:,.1f} MB were freed")
    elif goes:
        out.note(
            f"{goes / 1e6:,.1f} MB would go: fedsplit site clean {shlex.quote(str(folder.path))} --apply"
        )
    out.result(
        {
            "folder": str(folder.path),
            "kept": [
                {
                    "kind": one.kind,
                    "path": one.path.relative_to(folder.path).as_posix(),
                    "bytes": one.bytes,
                    "changed": one.changed,
                    "goes": one.goes,
                }
                for one in found
            ],
            "freed_bytes": freed,
            "errors": faults,
        }
    )
    if faults:
        raise typer.Exit(1)


def _shown(found: list[Kept], below: Path) -> Table:
    """One line a thing, by kind, the newest first; the last line sums."""
    from fedsplit.plant.site.clean import KINDS

    table = Table(box=None, header_style="dim")
    table.add_column("Kept")
    table.add_column("Where", overflow="fold")
    table.add_column("MB", justify="right")
    table.add_column("Changed")
    table.add_column("Goes")
    for one in sorted(found, key=lambda k: (KINDS.index(k.kind), -k.changed)):
        table.add_row(
            one.kind,
            Text(one.path.relative_to(below).as_posix()),
            f"{one.bytes / 1e6:,.1f}",
            time.strftime("%Y-%m-%d", time.localtime(one.changed)),
            one.goes,
        )
    table.add_row("", "in all", f"{sum(one.bytes for one in found) / 1e6:,.1f}", "", "")
    return table

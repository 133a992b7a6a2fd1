"""`fedsplit doctor`: looks at a server or a site, says what is wrong and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedsplit.cli.console import Output
from fedsplit.cli.run import JsonFlag

_STYLES = {"green": "green", "yellow": "yellow", "red": "bold red"}
_LIGHTS = {"green": "ok", "yellow": "look", "red": "wrong"}


def doctor(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A federation folder or a site folder.")
    ] = Path(),
    as_json: JsonFlag = False,
) -> None:
    """Look at a server or a site: clock, ports, keys, versions, disk, line, data. Changes nothing.

    Exit code 1 where something is red.
    """
    from fedsplit.plant import checks

    out = Output(as_json=as_json)
    found = []
    with out.if_long("looking ..."):
        for check in _checks(folder):
            found.append(check)
    out.show(table(found))
    level = checks.worst(found)
    out.show(
        {
            "green": "All is well.",
            "yellow": "It works; see the yellow lines.",
            "red": "Something is wrong; see the red lines.",
        }[level]
    )
    out.result(checks.as_json(found))
    if level == "red":
        raise typer.Exit(1)


def _checks(folder: Path) -> Any:
    """Whose folder it is decides what is looked at. Raises ConfigError for one that is neither."""
    from fedsplit.core.errors import ConfigError
    from fedsplit.plant.server.folder import SETTINGS as FEDERATION
    from fedsplit.plant.site.folder import SETTINGS as SITE

    if (folder / FEDERATION).is_file():
        from fedsplit.plant.server.doctor import server_checks

        return server_checks(folder)
    if (folder / SITE).is_file():
        from fedsplit.plant.site.doctor import site_checks

        return site_checks(folder)
    raise ConfigError(
        f"{folder.absolute()} is neither a federation folder ({FEDERATION}) nor a site folder ({SITE}); give one of them: "
        f"fedsplit doctor DIR"
    )


def table(found: list[Any]) -> Any:
    """The checks as a table with lights."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False)
    made.add_column("")
    made.add_column("check")
    made.add_column("found", overflow="fold", ratio=3)
    made.add_column("what to do", overflow="fold", ratio=2)
    for check in found:
        light = Text(_LIGHTS[check.level], style=_STYLES[check.level])
        made.add_row(light, Text(check.name), Text(check.found), Text(check.do))
    return made

"""`fedsplit data`: read a source exactly as a site would, and show what is in it before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedsplit.cli.console import Output
from fedsplit.cli.run import JsonFlag


def data(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="As the setting data, e.g. folder:PATH or csv:PATH."),
    ],
    backbone: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Look with a backbone's eyes: sizes, tokens, unknown words."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting that reading depends on, e.g. label-column=defect.",
        ),
    ] = None,
    sheet: Annotated[
        Path, typer.Option(metavar="FILE", help="Where the contact sheet of the images goes.")
    ] = Path("contact-sheet.png"),
    as_json: JsonFlag = False,
) -> None:
    """Show classes or numbers, sizes, pixel range, text lengths, doubles, the split and what would be left out. Trains nothing.

    Exit codes: 0 the source can be read, 2 it cannot.
    """
    from fedsplit.cli.checks import of_source
    from fedsplit.cli.data_view import shown
    from fedsplit.core.config import parse_set
    from fedsplit.core.errors import BackboneError, ConfigError, DataError
    from fedsplit.report.survey import SITE, survey

    out = Output(as_json=as_json)
    flat: dict[str, Any] = {**parse_set(settings or []), "data": source}
    if backbone is not None:
        flat["backbone"] = backbone
    try:
        found = survey(flat, backbone=backbone is not None, sheet=sheet)
    except (BackboneError, ConfigError, DataError) as err:
        fault = of_source(err, SITE)
        if not as_json:
            raise fault from err
        out.result(
            {
                "source": source,
                "classes": {},
                "notes": [],
                "errors": str(fault).splitlines(),
                "range": None,
            }
        )
        raise typer.Exit(2) from fault
    out.show(shown(found))
    out.result(found.record())

"""`fedsplit wheelhouse`: what a machine without a network needs to install fedsplit. The work is plant/wheelhouse.py's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import click
import typer

from fedsplit.cli.console import Output
from fedsplit.cli.run import JsonFlag

EXTRAS = ("server", "simulation")


def wheelhouse(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that is new, empty or a wheelhouse.")
    ],
    platform: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="linux-x86_64, linux-aarch64, windows-amd64 or macos-arm64."
        ),
    ],
    python: Annotated[
        str, typer.Option(metavar="X.Y", help="The machine's Python; else this one's.")
    ] = f"{sys.version_info.major}.{sys.version_info.minor}",
    extra: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="server or simulation, for more than a site; may be repeated."
        ),
    ] = None,
    index: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="A package index to look in too, e.g. that of PyTorch's builds without CUDA.",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Gather the wheels for an install without a network, in the versions of this machine.

    Exit codes: 0 gathered, 1 a wheel cannot be had, 2 wrong usage.
    """
    from fedsplit.plant.wheelhouse import gather

    if unknown := [name for name in extra or [] if name not in EXTRAS]:
        raise click.UsageError(f"--extra {unknown[0]!r} is not known; use one of {', '.join(EXTRAS)}")  # fmt: skip
    out = Output(as_json=as_json)
    out.note(f"looking for the wheels for {platform}, Python {python} ...")
    found = gather(
        folder.expanduser().absolute(),
        platform=platform,
        python=python,
        extras=tuple(extra or ()),  # type: ignore[arg-type]
        indexes=tuple(index or ()),
    )
    size = sum(found.wheels.values())
    out.show(f"{len(found.wheels)} wheels, {size / 1e6:,.0f} MB, are in {found.folder}")
    for note in found.notes:
        out.show(f"Note: {note}")
    out.show(f"Take the folder to the machine and run there, in it:\n  {found.command}")
    out.result(
        {
            "folder": str(found.folder),
            "platform": platform,
            "python": python,
            "wheels": found.wheels,
            "bytes": size,
            "command": found.command,
            "notes": found.notes,
        }
    )

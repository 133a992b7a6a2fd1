"""Which site folder a command means."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedsplit.plant.site.folder import SiteFolder

DEFAULT = Path("site")
SiteArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[SITE]",
        help="The site folder; else the working directory if it is one, else ./site.",
    ),
]


def site_folder(path: Path | None) -> SiteFolder:
    """The site folder that is meant. Raises ConfigError."""
    from fedsplit.plant.site.folder import SETTINGS, SiteFolder

    if path is None:
        here = Path.cwd()
        path = here if (here / SETTINGS).is_file() else DEFAULT
    return SiteFolder.at(path)

"""`fedsplit site fetch`: brings a site's parts of the backbone while a bar shows how far it is. Joining does so too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from fedsplit.cli.console import Output
from fedsplit.cli.run import JsonFlag
from fedsplit.cli.site_folder import SiteArgument, site_folder
from fedsplit.core.cut import Cut, parse_cuts
from fedsplit.core.errors import BackboneError, ConfigError, PlantError

if TYPE_CHECKING:
    from fedsplit.plant.site.folder import SiteFolder


def fetch(
    site: SiteArgument = None,
    *,
    cut: Annotated[
        str,
        typer.Option(
            metavar="A,B", help="Bring what this cut needs; else the site's own, if it has one."
        ),
    ] = "",
    as_json: JsonFlag = False,
) -> None:
    """Bring the parts of the backbone that a cut needs from the server, and those again that the disk has damaged.

    Exit codes: 0 all is here, 1 the server refused or is away, 2 wrong settings, no space, or wrong bytes, 4 the site is no
    member any more.
    """
    out = Output(as_json=as_json)
    folder = site_folder(site)
    cuts = parse_cuts(cut) if cut else _cuts(folder.settings.site.cut)
    out.result(_fetched(folder, cuts, out))


def at_join(folder: SiteFolder, cut: str, out: Output) -> SiteFolder:
    """Fetch for a site that has just become a member; its folder as it is then.

    Raises BackboneError, ConfigError and PlantError that say that it is one.
    """
    from fedsplit.plant.site.folder import SiteFolder

    try:
        _fetched(folder, _cuts(cut), out)
        return SiteFolder.at(folder.path)
    except (BackboneError, ConfigError, PlantError) as err:
        raise type(err)(
            f"{err}. The site is a member all the same; go on with: fedsplit site fetch {folder.path}"
        ) from err


def _cuts(text: str) -> tuple[Cut | None, ...]:
    """The cuts that a setting names; (None,) where it leaves them to the runs."""
    try:
        return parse_cuts(text)
    except ConfigError:
        return (None,)


def _fetched(folder: SiteFolder, cuts: tuple[Cut | None, ...], out: Output) -> dict[str, Any]:
    from fedsplit.model.store import BackboneStore
    from fedsplit.plant.site.calls import open_client
    from fedsplit.plant.site.fetch import fetch_backbone, note_backbone

    store = BackboneStore(folder.backbones)
    bar = Progress(
        TextColumn("Backbone"), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
        console=out.stderr, disable=not out.stderr.is_terminal,
    )  # fmt: skip
    with open_client(folder) as client, bar:
        line = bar.add_task("backbone", total=None)

        def progress(here: int, in_all: int) -> None:
            bar.update(line, completed=here, total=in_all)

        path = [
            fetch_backbone(store, client, cut, progress=progress, say=out.note) for cut in cuts
        ][-1]
    note_backbone(folder, path.name)
    if None in cuts:
        out.note(
            "Backbone: the site has no cut of its own, so the first run brings the tensors that it needs (now: fedsplit site "
            "fetch --cut A,B)"
        )
    size = store.total_bytes()
    out.note(f"Backbone: digest {path.name[:12]}, {size / 1e6:,.1f} MB on this machine")
    return {
        "backbone_sha256": path.name,
        "cuts": [str(cut) for cut in cuts if cut],
        "folder": str(path),
        "bytes": size,
    }

"""`fedsplit site join | run | executor | clean | install | uninstall`: what is done on a site's machine. The work is `plant.site`'s."""

from __future__ import annotations

import os
import shlex
import sys
import threading
import time
from pathlib import Path
from typing import Annotated

import click
import typer

from fedsplit.cli import site_fetch, site_kept, site_service
from fedsplit.cli.console import Output
from fedsplit.cli.run import JsonFlag
from fedsplit.cli.site_folder import DEFAULT, SiteArgument, site_folder

app = typer.Typer(
    help="A machine that is a site of a federation.", no_args_is_help=True, rich_markup_mode=None
)
app.command("fetch")(site_fetch.fetch)
app.command("clean")(site_kept.clean)
app.command("install")(site_service.install)
app.command("uninstall")(site_service.uninstall)


@app.command()
def join(
    code: Annotated[
        str,
        typer.Argument(
            metavar="CODE",
            help="The join code that `fedsplit federation add-site` printed; - reads it from standard input.",
        ),
    ],
    *,
    folder: Annotated[
        Path, typer.Option("--dir", metavar="SITE", help="The site folder: a new or empty one.")
    ] = DEFAULT,
    data: Annotated[
        str, typer.Option(metavar="SOURCE", help="The site's own data, e.g. folder:/data/line-a.")
    ] = "",
    task: Annotated[
        str, typer.Option(metavar="NAME", help="The task that the data is for, e.g. inspection.")
    ] = "",
    cut: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="Leave blocks A to B-1 to the server; else as the server's runs say.",
        ),
    ] = "",
    text_column: Annotated[
        str, typer.Option(metavar="NAME", help="The column of a table that holds the text.")
    ] = "",
    label_column: Annotated[
        str, typer.Option(metavar="NAME", help="The column of a table that holds the label.")
    ] = "",
    classes: Annotated[
        str, typer.Option(metavar="A,B", help="The only names of classes that may leave the site.")
    ] = "",
    pixel_max: Annotated[
        float, typer.Option(min=0, help="The pixel value that is white; 0: found from the images.")
    ] = 0.0,
    again: Annotated[
        bool, typer.Option("--again", help="New keys for a site that is a member as it is.")
    ] = False,
    no_fetch: Annotated[
        bool,
        typer.Option("--no-fetch", help="Leave the backbone to a later `fedsplit site fetch`."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Make this machine a site: check it, make its keys here, have them signed.

    Exit codes: 0 joined, 1 the server refused or is away, or the doctor found something red, 2 wrong use, settings or data.
    """
    from fedsplit.cli.doctor import table
    from fedsplit.plant.checks import as_json as as_json_object
    from fedsplit.plant.checks import worst
    from fedsplit.plant.join_code import JoinCode
    from fedsplit.plant.site.doctor import site_checks
    from fedsplit.plant.site.join import join as joined
    from fedsplit.plant.site.wish import Wish

    out = Output(as_json=as_json)
    reading = {
        "text-column": text_column,
        "label-column": label_column,
        "classes": classes,
        "pixel-max": str(pixel_max) if pixel_max else "",
    }
    wish = Wish(
        code=JoinCode.parse(sys.stdin.readline() if code == "-" else code),
        folder=folder,
        data=data,
        task=task,
        cut=cut,
        reading={key: value for key, value in reading.items() if value},
        again=again,
    )
    made = joined(wish, out.note)
    here = made.folder if no_fetch else site_fetch.at_join(made.folder, made.cut, out)
    site = here.settings.site
    out.note(
        f"Site {site.name!r} is {'a member again' if made.again else 'a member'} of the federation at {site.address}"
    )
    found = list(site_checks(made.folder.path, joining=True))
    out.show(table(found))
    path = shlex.quote(str(made.folder.path))
    out.note(f"Start it: fedsplit site run {path}, or as a service: fedsplit site install {path}")
    out.result(
        {
            "site": site.name,
            "folder": str(made.folder.path),
            "address": site.address,
            "again": made.again,
            "samples": made.seen.samples,
            "classes": made.seen.classes,
            "notes": list(made.seen.notes),
            "backbone_sha256": site.backbone_sha256,
            "cut": made.cut,
            **as_json_object(found),
        }
    )
    if worst(found) == "red":
        out.note("The site is a member, and something is red above: see to it before the first run")
        raise typer.Exit(1)


@app.command()
def run(site: SiteArgument = None, as_json: JsonFlag = False) -> None:
    """Keep the site up, in the foreground, until Ctrl-C. With --json one object is printed when it is ready.

    Exit codes: 0 ended on request, 1 a service does not start, 2 wrong settings, data, certificate or clock, 4 the site is
    no member any more.
    """
    from fedsplit.core.errors import FedsplitError
    from fedsplit.plant.logs import JsonLines
    from fedsplit.plant.site.run import run as keep_up
    from fedsplit.plant.supervisor import stop_on_signals

    out = Output(as_json=as_json)
    folder = site_folder(site)
    settings = folder.settings.site

    log = JsonLines(folder.logs / "supervisor.jsonl", "supervisor")

    def say(text: str) -> None:
        log.write(text)
        out.note(f"{time.strftime('%H:%M:%S')}  {text}")

    def ready() -> None:
        say(f"site {settings.name!r} is ready: it takes orders from {settings.address}")
        out.result(
            {
                "site": settings.name,
                "address": settings.address,
                "folder": str(folder.path),
                "pid": os.getpid(),
            }
        )

    say(f"site {settings.name!r} starts: task {settings.task}, data {settings.data}")
    stop = threading.Event()
    with log, stop_on_signals(stop):
        try:
            keep_up(folder, stop, say=say, ready=ready)
        except FedsplitError as err:
            log.write(f"{type(err).__name__}: {err}", level="error")
            raise
        say(f"site {settings.name!r} has ended")


@app.command()
def executor(
    *,
    supernode: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="--host and --port of the SuperNode.")
    ],
    secret_file: Annotated[
        Path, typer.Option(metavar="FILE", help="Its --superexec-auth-secret-file.")
    ],
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="Its --superlink.")] = "",
    node_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its --auth-supernode-private-key.")
    ] = None,
    ca: Annotated[Path | None, typer.Option(metavar="PEM", help="Its --root-certificates.")] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where it says what it does, and notes the order at hand for the next executor.",
        ),
    ] = None,
) -> None:
    """Without a site folder: carry out the orders of a SuperNode in one process that lives on, until Ctrl-C.

    The SuperNode runs with --isolation process. With --superlink and --node-key an order is dropped once its run is over.
    """
    if bool(superlink) != (node_key is not None):
        raise click.UsageError("--superlink and --node-key go together; give both or neither")
    from fedsplit.plant.site.runtime import Place, serve

    serve(
        lambda: Place(
            supernode,
            secret_file,
            doing=state_dir / "runtime.json" if state_dir else None,
            note=state_dir / "order" if state_dir else None,
            superlink=superlink,
            node_key=node_key,
            ca=ca,
        )
    )

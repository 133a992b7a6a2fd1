"""`fedsplit server`: a federation folder is made, its server is started, ended, and made a service of the machine.

The work is `fedsplit.plant.server`'s and `fedsplit.plant.install`'s. Each command loads what it needs.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

from fedsplit.cli.as_service import AsService, NameOption
from fedsplit.cli.as_service import install as install_service
from fedsplit.cli.as_service import uninstall as uninstall_service
from fedsplit.cli.console import Output
from fedsplit.cli.run import JsonFlag

if TYPE_CHECKING:
    from fedsplit.plant.server.folder import FederationFolder

UNIT = "fedsplit-server"
NOT_UP = 1
"""Exit code of `server down` where nothing was up."""

app = typer.Typer(
    help="The server of a federation on this machine.", no_args_is_help=True, rich_markup_mode=None
)
FolderArgument = Annotated[
    Path, typer.Argument(metavar="[DIR]", help="The federation folder; else the working directory.")
]


@app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that is new or empty.")],
    *,
    host: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="The name or address under which sites find this machine."
        ),
    ],
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="The one port that sites dial.")
    ] = 8443,
    bind: Annotated[
        str, typer.Option(metavar="ADDRESS", help="The address to listen on; else every one.")
    ] = "",
    backbone: Annotated[
        str, typer.Option(metavar="DIR", help="A model folder or the bundled one's name.")
    ] = "vit-glyphs",
    site_days: Annotated[
        int,
        typer.Option(
            min=1, max=3650, metavar="DAYS", help="How long a site's certificate is valid."
        ),
    ] = 30,
    server_days: Annotated[
        int, typer.Option(min=1, max=3650, metavar="DAYS", help="How long the server's is.")
    ] = 397,
    code_hours: Annotated[
        float,
        typer.Option(min=0.02, max=720, metavar="HOURS", help="How long a join code is valid."),
    ] = 24.0,
    proxy: Annotated[
        str,
        typer.Option(
            click_type=click.Choice(["nginx", "own"]),
            help="nginx: `server up` runs it. own: you run a proxy of your own at the port.",
        ),
    ] = "nginx",
    certificate: Annotated[
        Path | None,
        typer.Option(metavar="PEM", help="Your own certificate for the port, its CAs behind it."),
    ] = None,
    certificate_key: Annotated[Path | None, typer.Option(metavar="PEM", help="Its key.")] = None,
    ca: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Your own CA that signs sites' certificates.")
    ] = None,
    ca_key: Annotated[Path | None, typer.Option(metavar="PEM", help="Its key.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a federation folder: CA, certificate, secrets and a commented federation.toml. Starts nothing.

    Exit codes: 0 made, 2 what was given cannot be used, 1 the disk is full or cannot be written. Then nothing is left.
    """
    from fedsplit.plant.server.init import Wanted, make_folder
    from fedsplit.plant.server.preflight import outlook

    out = Output(as_json=as_json)
    _check_pairs(certificate, certificate_key, ca, ca_key)
    wanted = Wanted(
        host=host,
        port=port,
        bind=bind,
        backbone=_backbone(backbone),
        site_days=site_days,
        server_days=server_days,
        code_hours=code_hours,
        proxy=proxy,
        certificate=str(certificate.resolve()) if certificate else "",
        certificate_key=str(certificate_key.resolve()) if certificate_key else "",
        ca=ca,
        ca_key=ca_key,
    )  # fmt: skip
    made = make_folder(folder, wanted)
    for note in outlook(made):
        out.note(f"note: {note}")
    shown = shlex.quote(str(folder))
    out.show(
        f"{made.path} is a federation folder now, for sites that dial {host}, port {port}.\n"
        f"Keep a copy of it at another place: who loses ca/ca-key.pem must have every site join again.\n\n"
        f"Next:  fedsplit server up {shown}\n"
        f"then:  fedsplit federation add-site NAME --federation {shown}"
    )
    out.result({"folder": str(made.path), "host": host, "port": port})


@app.command("up")
def up(folder: FolderArgument = Path(), as_json: JsonFlag = False) -> None:
    """Run the whole server in the foreground, until Ctrl-C, SIGTERM or `fedsplit server down`.

    Exit codes: 0 it was ended, 1 it could not start, 2 the folder or its settings cannot be used.
    """
    from fedsplit.cli.server_view import view
    from fedsplit.core.extras import check_extra
    from fedsplit.plant.logs import JsonLines
    from fedsplit.plant.server.folder import FederationFolder
    from fedsplit.plant.server.up import CHORE_S, Chores, server_of
    from fedsplit.plant.supervisor import stop_on_signals

    out = Output(as_json=as_json)
    check_extra("server", "the server of a federation", "matplotlib", "prometheus_client")
    place = FederationFolder.at(folder)
    stop = threading.Event()
    with JsonLines(place.logs / "supervisor.jsonl", "supervisor") as log:

        def say(text: str) -> None:
            log.write(text)
            out.note(text)

        with _translated(place), stop_on_signals(stop), server_of(place, say) as server:
            address = f"{place.settings.server.host}:{place.settings.server.port}"
            with view(server, out):
                say(f"starting the server of {place.path} for sites that dial {address}")

                def ready() -> None:
                    say("the server is up; end it with Ctrl-C or `fedsplit server down`")
                    out.result({"address": address, "folder": str(place.path), **server.state()})

                chores = Chores(place, server, say)
                server.run(stop, on_up=ready, chore=chores, chore_s=CHORE_S)
            say("the server has ended")


@app.command("down")
def down(folder: FolderArgument = Path(), as_json: JsonFlag = False) -> None:
    """End the server that is up, wherever it was started, and wait for it. A service of systemd starts it again: use systemctl.

    Exit codes: 0 it has ended, 1 none was up or it cannot be ended, 2 this is no federation folder.
    """
    from fedsplit.plant.server.folder import FederationFolder
    from fedsplit.plant.server.up import end_server

    out = Output(as_json=as_json)
    place = FederationFolder.at(folder)
    pid = end_server(place)
    out.show(
        f"the server of {place.path} (process {pid}) and all its services have ended"
        if pid
        else f"no server is up in {place.path}; nothing was done"
    )
    out.result({"folder": str(place.path), "ended": pid is not None, "pid": pid})
    if pid is None:
        raise typer.Exit(NOT_UP)


@app.command("install")
def install(
    folder: FolderArgument = Path(), name: NameOption = UNIT, as_json: JsonFlag = False
) -> None:
    """Make the server a service of systemd, which starts with the machine: of the whole machine as root, else of this user.

    Without systemd the unit's text is written into the folder, and the command says what to do with it.
    """
    from fedsplit.plant.server.folder import FederationFolder

    place = FederationFolder.at(folder)
    backbone = Path(place.settings.backbone.path)
    what = AsService(
        kind="server",
        folder=place,
        name=name,
        start="fedsplit server up",
        unit_file=place.path / "deploy" / f"{name}.service",
        reads=[backbone] if backbone.is_absolute() else [],
        port=place.settings.server.port,
    )
    install_service(what, Output(as_json=as_json))


@app.command("uninstall")
def uninstall(name: NameOption = UNIT, as_json: JsonFlag = False) -> None:
    """End the service and take it away. The federation folder stays as it is."""
    uninstall_service(name, "the federation folder is as it was", Output(as_json=as_json))


@app.command("services")
def services(folder: FolderArgument = Path(), as_json: JsonFlag = False) -> None:
    """Print each service's command line, for a service manager of your own. Writes nginx.conf and Flower's configuration."""
    from fedsplit.plant.server.folder import FederationFolder
    from fedsplit.plant.server.up import planned

    out = Output(as_json=as_json)
    place = FederationFolder.at(folder)
    with _translated(place):
        found = planned(place, out.note)
    shared = dict(found[0].env)
    out.show(
        "\n".join(
            [
                f"# All run in {place.path}, with this environment:",
                *(f"export {k}={shlex.quote(v)}" for k, v in sorted(shared.items())),
                *(f"\n# {s.name}\n{shlex.join(s.command)}" for s in found),
            ]
        )
    )
    records = [{"name": s.name, "command": s.command, "port": s.port} for s in found]
    out.result({"folder": str(place.path), "environment": shared, "services": records})


@app.command("nginx-conf")
def nginx_conf(folder: FolderArgument = Path()) -> None:
    """Print what a proxy of your own has to do, as a configuration of nginx."""
    from fedsplit.plant.server.folder import FederationFolder
    from fedsplit.plant.server.up import sample_of_nginx

    place = FederationFolder.at(folder)
    with _translated(place):
        sys.stdout.write(sample_of_nginx(place))


def _check_pairs(
    certificate: Path | None, certificate_key: Path | None, ca: Path | None, ca_key: Path | None
) -> None:
    if (certificate is None) != (certificate_key is None):
        raise click.UsageError(
            "--certificate and --certificate-key go together; give both or neither"
        )
    if (ca is None) != (ca_key is None):
        raise click.UsageError("--ca and --ca-key go together; give both or neither")


def _backbone(name: str) -> str:
    """The backbone as the settings name it, once it is known that it can be used. Raises BackboneError."""
    from fedsplit.model.backbone import Backbone

    found = Backbone.find(name)
    return str(found.path.resolve()) if Path(name).exists() else name


@contextlib.contextmanager
def _translated(folder: FederationFolder) -> Iterator[None]:
    """A folder that cannot be written, in words."""
    from fedsplit.core.errors import ServiceError

    try:
        yield
    except OSError as err:
        where = err.filename or folder.path
        raise ServiceError(
            f"{where} cannot be written or read: {err.strerror or err}; the server's user must own {folder.path}, and its "
            "disk must have room"
        ) from err

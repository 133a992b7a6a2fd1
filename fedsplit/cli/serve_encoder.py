"""`fedsplit encoder serve`: the frozen encoder as a service of its own. The work is `fedsplit.trunk`'s.

`fedsplit encoder grant` is encoder_grant.py's.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedsplit.cli import encoder_grant
from fedsplit.cli.console import Output
from fedsplit.cli.run import JsonFlag
from fedsplit.core.errors import ConfigError
from fedsplit.core.throttle import Throttle, ThrottledWarnings

app = typer.Typer(
    help="The server's part of the backbone.", no_args_is_help=True, rich_markup_mode=None
)


@app.callback()
def _encoder() -> None:
    """The server's part of the backbone."""


app.command("grant")(encoder_grant.grant)


@app.command()
def serve(
    *,
    backbone: Annotated[
        str, typer.Option(metavar="DIR", help="A model folder or the bundled one's name.")
    ],
    secret_file: Annotated[
        Path, typer.Option(metavar="FILE", help="The key that signs the sites' tokens.")
    ],
    bind: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where to listen.")
    ] = "127.0.0.1:9095",
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="PEM", help="The server's certificate.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="PEM", help="Its key.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Sites must show a certificate of this CA.")
    ] = None,
    proxy_secret_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A proxy that shares this secret tells who a site is; sites come through it alone.",
        ),
    ] = None,
    revoked_file: Annotated[
        Path | None,
        typer.Option(metavar="JSON", help="Names and serial numbers that are not let in."),
    ] = None,
    stats_file: Annotated[
        Path | None,
        typer.Option(metavar="JSON", help="Write counters there every two seconds."),
    ] = None,
    registry: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The registry of the modules that sites may predict with."
        ),
    ] = None,
    allow_insecure: Annotated[
        bool, typer.Option("--allow-insecure", help="Serve without TLS beyond loopback.")
    ] = False,
    new_secret: Annotated[
        bool, typer.Option("--new-secret", help="Write a fresh secret file if there is none.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="CPU threads to compute with; else all.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Serve a backbone's blocks to the sites until SIGTERM or Ctrl-C."""
    out = Output(as_json=as_json)
    _check_files(tls_cert=tls_cert, tls_key=tls_key, tls_client_ca=tls_client_ca)
    if new_secret and not secret_file.exists():
        from fedsplit.transport.keys import write_new_key

        write_new_key(secret_file)
        out.note(
            f"wrote a fresh secret to {secret_file}; the ServerApp needs it too, the sites do not"
        )
    if not secret_file.is_file():
        raise ConfigError(f"there is no secret file {secret_file}; --new-secret writes a fresh one")
    from fedsplit.model.threads import limit_threads

    limit_threads(threads or 0)
    # On stderr, for whoever runs the service: journald and log files keep it.
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(ThrottledWarnings(Throttle()))
    # gRPC's own lines about a taken port say less than our error, and say it first.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from fedsplit.model.backbone import Backbone
    from fedsplit.trunk.process import serve_encoder

    sha256 = Backbone.find(backbone).sha256

    def ready(address: str) -> None:
        out.result({"address": address, "backbone_sha256": sha256})
        out.note(f"serving {backbone} ({sha256[:12]}) at {address}; stop with Ctrl-C")

    serve_encoder(
        backbone=backbone, bind=bind, secret_file=secret_file, tls_cert=tls_cert, tls_key=tls_key,
        tls_client_ca=tls_client_ca, allow_insecure=allow_insecure,
        proxy_secret_file=proxy_secret_file, revoked_file=revoked_file, stats_file=stats_file, registry=registry,
        on_ready=ready,
    )  # fmt: skip


def _check_files(**files: Path | None) -> None:
    faults = [
        f"--{n.replace('_', '-')} {p}: no such file"
        for n, p in files.items()
        if p and not p.is_file()
    ]
    if (files["tls_cert"] is None) != (files["tls_key"] is None):
        faults.append("--tls-cert and --tls-key go together; give both or neither")
    if files["tls_client_ca"] is not None and files["tls_cert"] is None:
        faults.append(
            "--tls-client-ca needs --tls-cert and --tls-key: clients are checked within TLS"
        )
    if faults:
        raise ConfigError(
            "the encoder's TLS settings have faults:\n" + "\n".join(f"  - {f}" for f in faults)
        )

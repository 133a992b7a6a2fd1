"""`fedsplit encoder grant`: lets a device predict with an encoder that belongs to no federation."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from fedsplit.cli.console import Output
from fedsplit.cli.run import JsonFlag
from fedsplit.core.errors import ConfigError


def grant(
    *,
    module: Annotated[
        str,
        typer.Option(
            metavar="M",
            help="A module of the registry: TASK, TASK@ALIAS, TASK#3, a digest, or its folder.",
        ),
    ],
    registry: Annotated[
        Path, typer.Option(metavar="DIR", help="The registry that the encoder serves.")
    ],
    secret_file: Annotated[
        Path, typer.Option(metavar="FILE", help="The key that the encoder was started with.")
    ],
    address: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the device dials the encoder.")
    ],
    site: Annotated[
        str,
        typer.Option(metavar="NAME", help="Whom the grant is for; stands in the encoder's log."),
    ],
    cut: Annotated[
        str, typer.Option(metavar="A,B", help="The blocks that the encoder runs: A to B - 1.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Write the grant there.")],
    minutes: Annotated[
        float,
        typer.Option(min=0.1, max=60 * 24 * 366, metavar="N", help="How long it is good for."),
    ] = 60.0,
    rows: Annotated[
        int, typer.Option(min=1, max=10**9, metavar="N", help="How many inputs in all.")
    ] = 100_000,
    rows_per_minute: Annotated[
        int,
        typer.Option(min=1, max=10**6, metavar="N", help="How many a minute; faster ones wait."),
    ] = 6_000,
    tls: Annotated[
        bool,
        typer.Option(
            "--tls", help="The encoder has a certificate that the device's own roots know."
        ),
    ] = False,
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            metavar="PEM", help="The CA that signed the encoder's certificate; goes into the grant."
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a grant to predict: a file with which `fedsplit predict --grant FILE` uses the encoder. It holds a secret.

    It allows forwards of one module at one cut, and nothing that trains.
    """
    from fedsplit.core.cut import Cut
    from fedsplit.core.encoder import Grant, Inference
    from fedsplit.core.foreign import checked_name
    from fedsplit.predict.found import find_module
    from fedsplit.predict.grant_file import GrantFile
    from fedsplit.registry.registry import ModuleRegistry
    from fedsplit.transport import tokens
    from fedsplit.transport.keys import read_key
    from fedsplit.transport.wiring import read_pem

    place = Cut.parse(cut)
    if place.a == place.b:
        raise ConfigError(
            f"cut {place} leaves nothing for the encoder, so the device needs no grant"
        )
    key = read_key(secret_file)
    found = find_module(module, registry=registry)
    with ModuleRegistry.open(registry) as kept:
        versions = kept.of_digest(found.digest)
    if not versions:
        raise ConfigError(
            f"module {found.name} ({found.digest[:12]}) is not in the registry {registry}, so the encoder does not have it; "
            "`fedsplit module list` shows what is there"
        )
    version = versions[0]
    what = Grant.to_predict(
        place,
        Inference(max_rows=rows, rows_per_minute=rows_per_minute),
        site=checked_name(site),
        task=version.task,
        version=version.digest,
        backbone_sha256=version.backbone_sha256,
    )
    GrantFile(
        address=address,
        token=tokens.sign(what, key, 60 * minutes),
        grant=what,
        ends=time.time() + 60 * minutes,
        tls=tls or tls_ca is not None,
        ca=read_pem(tls_ca).decode("ascii", "replace") if tls_ca else "",
    ).write(out)
    told = Output(as_json=as_json)
    told.result(
        {
            "file": str(out),
            "module": found.name,
            "digest": version.digest,
            "site": site,
            "cut": str(place),
            "minutes": minutes,
            "rows": rows,
        }
    )
    told.note(
        f"{out}: {site} may predict {rows:,} inputs with {found.name} ({version.digest[:12]}) at cut {place} for {minutes:g} "
        "minutes. Give it to nobody else"
    )

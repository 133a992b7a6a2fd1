"""A predictor whose middle is at an encoder elsewhere: `--site` of a federation, or `--grant` of an encoder's operator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsplit.cli.console import Output
from fedsplit.core.cut import Cut
from fedsplit.core.errors import ConfigError

if TYPE_CHECKING:
    from fedsplit.predict.found import FoundModule
    from fedsplit.predict.predictor import Predictor

SiteOption = Annotated[
    Path | None,
    typer.Option(
        "--site",
        metavar="SITE",
        help="A site folder: this machine has only a part of the backbone, the federation's encoder runs the rest.",
    ),
]
GrantOption = Annotated[
    Path | None,
    typer.Option(
        "--grant",
        metavar="FILE",
        help="The same without a federation: what `fedsplit encoder grant` wrote.",
    ),
]
CutOption = Annotated[
    str,
    typer.Option(
        "--cut",
        metavar="A,B",
        help="With --site: the blocks that the encoder runs; else the site's cut, or what is not on this machine.",
    ),
]
TlsCertOption = Annotated[
    Path | None,
    typer.Option("--tls-cert", metavar="PEM", help="With --grant: this device's certificate."),
]
TlsKeyOption = Annotated[
    Path | None, typer.Option("--tls-key", metavar="PEM", help="With --grant: its key.")
]


@dataclass(frozen=True)
class InBetween:
    """What was asked for."""

    site: Path | None = None
    grant: Path | None = None
    cut: str = ""
    tls_cert: Path | None = None
    tls_key: Path | None = None


@contextmanager
def opened(
    module: str, wish: InBetween, out: Output, *, registry: Path | None = None, **more: Any
) -> Iterator[Predictor]:
    """The predictor, with an encoder in between where one is asked for. `more` goes to `load_predictor`."""
    from fedsplit.predict.found import find_module
    from fedsplit.predict.predictor import load_predictor

    _check(wish, **more)
    found = find_module(module, registry=registry)
    if wish.site is not None:
        with _of_site(found, wish, out, **more) as predictor:
            yield predictor
    elif wish.grant is not None:
        with _of_grant(found, wish, out, **more) as predictor:
            yield predictor
    else:
        yield load_predictor(found, **more)


def _check(wish: InBetween, **more: Any) -> None:
    faults = []
    if wish.site and wish.grant:
        faults.append("--site and --grant both say which encoder; give one of them")
    if wish.cut and not wish.site:
        faults.append(
            "--cut goes with --site; a grant has its cut, and without either all runs here"
        )
    if (wish.tls_cert or wish.tls_key) and not wish.grant:
        faults.append("--tls-cert and --tls-key go with --grant; a site has its own")
    if (wish.tls_cert is None) != (wish.tls_key is None):
        faults.append("--tls-cert and --tls-key go together; give both or neither")
    if wish.site and more.get("backbone"):
        faults.append("--backbone does not go with --site: the site's store has it")
    if faults:
        raise ConfigError("\n".join(faults))


@contextmanager
def _of_site(found: FoundModule, wish: InBetween, out: Output, **more: Any) -> Iterator[Predictor]:
    from fedsplit.model.module import wanted_backbone
    from fedsplit.plant.site.folder import SiteFolder
    from fedsplit.plant.site.inference import granted, held
    from fedsplit.predict.predictor import load_predictor
    from fedsplit.predict.remote import RemoteMiddle

    folder = SiteFolder.at(wish.site or Path())
    sha256 = wanted_backbone(found.folder).sha256
    here = held(folder, sha256, Cut.parse(wish.cut) if wish.cut else None)
    more |= {"backbone": str(here.path)}
    if here.cut.local(here.blocks):
        out.note(
            f"all {here.blocks} blocks of the backbone are here (cut {here.cut}): no encoder is needed"
        )
        yield load_predictor(found, **more)
        return
    server = folder.settings.site.address
    out.note(f"blocks {here.cut.a} to {here.cut.b - 1} run at the encoder of {server}")
    with RemoteMiddle(
        lambda: granted(folder, found.digest, sha256, here.cut), say=out.note
    ) as middle:
        yield load_predictor(found, middle=middle, cut=here.cut, **more)


@contextmanager
def _of_grant(found: FoundModule, wish: InBetween, out: Output, **more: Any) -> Iterator[Predictor]:
    from fedsplit.predict.grant_file import GrantFile
    from fedsplit.predict.predictor import load_predictor
    from fedsplit.predict.remote import RemoteMiddle

    assert wish.grant is not None, "checked by the caller"
    file = GrantFile.read(wish.grant)
    if file.grant.version != found.digest:
        raise ConfigError(
            f"the grant {wish.grant} is for module {file.grant.version[:12]}, {found.name} has digest {found.digest[:12]}; "
            "give the module that it was made for, or have a grant made for this one (fedsplit encoder grant)"
        )
    cut = file.grant.cut
    out.note(f"blocks {cut.a} to {cut.b - 1} run at the encoder at {file.address}")
    with RemoteMiddle(lambda: file.way(wish.tls_cert, wish.tls_key), say=out.note) as middle:
        yield load_predictor(found, middle=middle, cut=cut, **more)

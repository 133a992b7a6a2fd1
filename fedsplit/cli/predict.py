"""`fedsplit predict`: what a trained module says of new images or texts. Trains nothing, changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

from fedsplit.cli.console import Output
from fedsplit.cli.in_between import (
    CutOption,
    GrantOption,
    InBetween,
    SiteOption,
    TlsCertOption,
    TlsKeyOption,
    opened,
)
from fedsplit.cli.run import JsonFlag

if TYPE_CHECKING:
    from fedsplit.cli.predict_view import View
    from fedsplit.predict.predictor import Predictor
    from fedsplit.predict.source import Source
    from fedsplit.predict.stream import Answered, Unread

Count = Callable[["Sequence[Answered | Unread]"], None]
"""Told of each batch of answers."""
_PARTIAL = 3
_SITE_MODULES, _SITE_SETTINGS = "modules", "site.toml"
_PROBLEMS_SHOWN = 1000

ModuleOption = Annotated[
    str,
    typer.Option(
        "--module",
        metavar="M",
        help="A run's folder, a module folder, or a module of the registry: TASK, TASK@ALIAS, TASK#3, a digest.",
    ),
]
RegistryOption = Annotated[
    Path | None,
    typer.Option(
        "--registry", metavar="DIR", help="The registry of modules; else the one near this folder."
    ),
]
BackboneOption = Annotated[
    str,
    typer.Option(
        "--backbone",
        metavar="DIR",
        help="The module's backbone, where it is not found by itself.",
    ),
]
PixelMaxOption = Annotated[
    float,
    typer.Option(
        "--pixel-max",
        metavar="VALUE",
        help="The value of white in images of more than 8 bits, where it is another than at the run's sites.",
    ),
]


def predict(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Image files, folders, .csv, .jsonl, .npz or .txt files; - is stdin: one image, or one text a line.",
        ),
    ],
    module: ModuleOption,
    csv: Annotated[
        str, typer.Option("--csv", metavar="FILE", help="Write the answers there; - is stdout.")
    ] = "",
    scores: Annotated[
        bool, typer.Option("--scores", help="Also give the probabilities of all classes.")
    ] = False,
    excel: Annotated[
        bool,
        typer.Option(
            "--excel", help="Begin the CSV file with the mark by which Excel reads UTF-8."
        ),
    ] = False,
    column: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="The column of a table that is read; else `text`, or `file` of images.",
        ),
    ] = "",
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Inputs that go through the model at a time.")
    ] = 32,
    backbone: BackboneOption = "",
    pixel_max: PixelMaxOption = 0.0,
    registry: RegistryOption = None,
    site: SiteOption = None,
    grant: GrantOption = None,
    cut: CutOption = "",
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Predict the class, or the number, of images or texts with a trained module.

    Exit codes: 0 all inputs were answered, 3 some could not be read, 2 wrong module, backbone or inputs, 1 the server or its
    encoder refused or is away, 4 the site is no member any more.
    """
    from fedsplit.core.cpus import wait_asleep

    wait_asleep()
    from fedsplit.cli.predict_view import views
    from fedsplit.predict.stream import check_batch_size

    if csv == "-" and as_json:
        raise click.UsageError("--csv - and --json both want stdout; give a file to --csv")
    check_batch_size(batch_size)
    out = Output(as_json=as_json)
    wish = InBetween(site=site, grant=grant, cut=cut, tls_cert=tls_cert, tls_key=tls_key)
    with ExitStack() as stack:
        with out.if_long("loading the module and its backbone ..."):
            predictor = stack.enter_context(
                opened(module, wish, out, registry=registry, backbone=backbone, pixel_max=pixel_max)
            )
        show = partial(views, predictor, out, csv=csv, scores=scores, excel=excel)
        count = stack.enter_context(_counting(predictor, site))
        unread = _predict(
            predictor, inputs, show, out, count=count, column=column, batch_size=batch_size
        )
    if unread:
        raise typer.Exit(_PARTIAL)


def _predict(
    predictor: Predictor,
    inputs: list[str],
    show: Callable[[], AbstractContextManager[View]],
    out: Output,
    *,
    count: Count,
    column: str,
    batch_size: int,
) -> bool:
    """Look at the inputs, answer those that can be read, and show that. Were there others?"""
    from fedsplit.predict.inputs import sources
    from fedsplit.predict.source import Reading

    reading = Reading(
        kind=predictor.kind, inputs=predictor.inputs, classes=predictor.classes, column=column
    )
    with out.if_long("looking at the inputs ..."):
        found = sources(inputs, reading)
    told = [note for source in found for note in source.notes]
    for note in told:
        out.note(note)
    with show() as view:
        seconds, notes = _answer(predictor, found, view, out, count=count, batch_size=batch_size)
        view.finish(seconds=seconds, notes=[*told, *notes])
    return bool(view.unread)


@contextmanager
def _counting(predictor: Predictor, site: Path | None) -> Iterator[Count]:
    """Counts answers for the site that they are given at, where one is known: by --site, or by where the module lies."""
    from fedsplit.predict import stream
    from fedsplit.predict.usage import Usage

    lies = predictor.found.folder.absolute().parent
    if site is None and lies.name == _SITE_MODULES and (lies.parent / _SITE_SETTINGS).is_file():
        site = lies.parent
    if site is None or predictor.spec.numbers is not None:
        yield lambda _: None
        return
    with Usage(site.expanduser(), predictor.found.digest) as usage:

        def count(batch: Sequence[Answered | Unread]) -> None:
            said = [one.answer for one in batch if isinstance(one, stream.Answered)]
            usage.add([answer.name for answer in said], [answer.value for answer in said])

        yield count


def _answer(
    predictor: Predictor,
    found: list[Source],
    view: View,
    out: Output,
    *,
    count: Count,
    batch_size: int,
) -> tuple[float, list[str]]:
    """Read, predict and show; then tell what could not be read and how quick it was: seconds and notes."""
    from itertools import chain

    from fedsplit.cli.predict_progress import progress
    from fedsplit.predict.stream import Seen, stream

    seen, began = Seen(), time.perf_counter()
    totals = [source.total for source in found]
    total = None if None in totals else sum(t for t in totals if t is not None)
    everything = chain.from_iterable(source.read() for source in found)
    with progress(out, total, what=f"{predictor.kind}s", quiet=view.prints) as advance:
        for batch in stream(predictor, everything, batch_size=batch_size, seen=seen):
            view.add(batch)
            count(batch)
            advance(len(batch))
    seconds = time.perf_counter() - began
    notes = seen.notes(predictor)
    for note in notes:
        out.note(note)
    for unread in view.unread[:_PROBLEMS_SHOWN]:
        out.note(f"not read: {unread.problem}")
    if (more := len(view.unread) - _PROBLEMS_SHOWN) > 0:
        out.note(f"and {more:,} more that could not be read")
    what = f"{predictor.kind}s" if view.answered != 1 else predictor.kind
    out.note(
        f"{view.answered:,} {what} in {seconds:.1f} s, {view.answered / max(seconds, 1e-9):,.1f} a second"
        + (f"; {len(view.unread):,} could not be read" if view.unread else "")
        + f"; module {predictor.found.name}, digest {predictor.found.digest[:12]}, on {predictor.backbone.path.name}"
    )
    return seconds, notes

"""`fedsplit evaluate`: how good a trained module is on labelled samples, and what differs from another one. Trains nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsplit.cli.console import Output
from fedsplit.cli.predict import BackboneOption, ModuleOption, PixelMaxOption, RegistryOption
from fedsplit.cli.run import JsonFlag

if TYPE_CHECKING:
    from fedsplit.predict.predictor import Progress


def evaluate(
    module: ModuleOption,
    data: Annotated[
        str,
        typer.Option(metavar="SOURCE", help="Labelled samples, e.g. folder:PATH or csv:PATH."),
    ],
    against: Annotated[
        str,
        typer.Option(metavar="OTHER", help="Another module of the same task, to compare with."),
    ] = "",
    test_side: Annotated[
        bool,
        typer.Option(
            "--test-side",
            help="Judge only the samples that a site with these files keeps for tests.",
        ),
    ] = False,
    test_fraction: Annotated[
        float, typer.Option(metavar="SHARE", help="With --test-side: the run's test-fraction.")
    ] = 0.2,
    risk: Annotated[
        float,
        typer.Option(
            metavar="SHARE", help="Share of wrong answers that may stand without a person."
        ),
    ] = 0.01,
    text_column: Annotated[str, typer.Option(metavar="NAME", help="Of a table.")] = "text",
    label_column: Annotated[str, typer.Option(metavar="NAME", help="Of a table.")] = "label",
    leave_out_broken: Annotated[
        bool, typer.Option("--leave-out-broken", help="Leave out files that cannot be read.")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Write a page, pictures and a contact sheet of the wrong samples there.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Samples that go through the model at a time.")
    ] = 32,
    backbone: BackboneOption = "",
    pixel_max: PixelMaxOption = 0.0,
    registry: RegistryOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show how good a module is on labelled samples: accuracy, each class, calibration, when to ask a person.

    Exit codes: 0 judged, 2 wrong module, backbone or samples.
    """
    from fedsplit.cli.checks import of_source
    from fedsplit.cli.evaluate_view import record, shown
    from fedsplit.core.errors import ConfigError, DataError
    from fedsplit.core.extras import check_extra
    from fedsplit.predict.judge.judged import SITE, Samples, judge
    from fedsplit.predict.predictor import load_predictor
    from fedsplit.predict.stream import check_batch_size

    check_batch_size(batch_size)
    if not 0 < risk < 1:
        raise ConfigError(f"--risk {risk:g} is no share of answers; give one between 0 and 1")
    if folder is not None:
        check_extra("server", "evaluate --out", "matplotlib")
    out = Output(as_json=as_json)
    with out.if_long("loading the module and its backbone ..."):
        this = load_predictor(module, backbone=backbone, pixel_max=pixel_max, registry=registry)
        other = (
            load_predictor(against, backbone=backbone, pixel_max=pixel_max, registry=registry)
            if against
            else None
        )
    samples = Samples(data, test_side, test_fraction, text_column, label_column, leave_out_broken)
    try:
        with _bars(out, f"{this.kind}s") as progress:
            judged = judge(
                this, samples, against=other, risk=risk, batch_size=batch_size, progress=progress
            )
    except (ConfigError, DataError) as err:
        raise of_source(err, SITE) from err
    out.show(shown(judged))
    page = ""
    if folder is not None:
        from fedsplit.report.evaluation import write

        with out.if_long("drawing the pictures ..."):
            page = str(write(folder.expanduser(), judged))
        out.note(f"the page with pictures and the samples it got wrong: {page}")
    out.result(record(judged) | ({"page": page} if page else {}))


@contextmanager
def _bars(out: Output, what: str) -> Iterator[Callable[[str], Progress]]:
    """A progress bar for each module that answers, one after the other."""
    from contextlib import ExitStack

    from fedsplit.cli.predict_progress import progress

    with ExitStack() as stack:

        def for_module(_name: str) -> Progress:
            stack.close()
            advance: Callable[[int], None] | None = None
            before = 0

            def told(done: int, total: int) -> None:
                nonlocal advance, before
                if advance is None:
                    advance = stack.enter_context(progress(out, total, what=what, quiet=False))
                advance(done - before)
                before = done

            return told

        yield for_module

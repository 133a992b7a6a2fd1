"""`fedsplit module export`: a version as one file for another registry, or with --to a module for other programs.

What --to writes: predict/export/.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

from fedsplit.cli.console import Output
from fedsplit.cli.predict import BackboneOption, RegistryOption
from fedsplit.cli.run import JsonFlag

if TYPE_CHECKING:
    from fedsplit.predict.predictor import Predictor
    from fedsplit.training.data import Examples


def export(
    module: Annotated[
        str,
        typer.Argument(metavar="[M]", help="The module, as `fedsplit predict --module` takes it."),
    ] = "",
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE.zip]",
            help="Without --to: one file, for `module import` on another machine.",
        ),
    ] = None,
    module_option: Annotated[
        str, typer.Option("--module", metavar="M", help="The same as an option.")
    ] = "",
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORM",
            help="onnx: a file for onnxruntime. merged: a plain transformers model. hf: Hugging Face's layout.",
        ),
    ] = "",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="A new folder to write to.")
    ] = None,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8", help="With --to onnx: also a copy in int8, measured on the samples of --data."
        ),
    ] = False,
    data: Annotated[
        str,
        typer.Option("--data", metavar="SOURCE", help="Labelled samples, as the setting `data`."),
    ] = "",
    name_sites: Annotated[
        bool,
        typer.Option(
            "--name-sites", help="Name the sites in the model card; else they have numbers."
        ),
    ] = False,
    backbone: BackboneOption = "",
    registry: RegistryOption = None,
    federation: Annotated[
        Path | None,
        typer.Option("--federation", metavar="DIR", help="The registry of this federation folder."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Export a trained module: as one file for another registry, or with --to for other programs.

    The file has the names, numbers of samples and scores of the sites too. What --to writes is compared with the module
    before its folder appears.
    """
    if bool(module) == bool(module_option):
        raise click.UsageError("one module is wanted: fedsplit module export M --to onnx --out DIR")
    if not to:
        _to_file(
            module or module_option, file, given=bool(out or int8 or data or name_sites or backbone)
        )
        from fedsplit.cli.module import export_file

        assert file is not None
        export_file(
            module or module_option,
            file,
            registry=registry,
            federation=federation,
            out=Output(as_json=as_json),
        )
        return
    if file is not None:
        raise click.UsageError(f"--to {to} writes a folder: give --out DIR, not {file}")
    if federation is not None:
        registry = federation / "modules"
    from fedsplit.predict.export.write import FORMS, export_module, told_loss
    from fedsplit.predict.predictor import load_predictor

    if to not in FORMS:
        raise click.UsageError(f"--to {to}: one of {', '.join(FORMS)} is wanted")
    if out is None:
        raise click.UsageError(f"--to {to} needs --out DIR, a new folder")
    if int8 != bool(data) or (int8 and to != "onnx"):
        raise click.UsageError(
            "--int8 and --data SOURCE go together, with --to onnx: int8 costs accuracy, which is measured on labelled samples"
        )
    told = Output(as_json=as_json)
    with told.if_long("loading the module and its backbone ..."):
        predictor = load_predictor(module or module_option, backbone=backbone, registry=registry)
    examples = _labelled(predictor, data) if data else None
    with told.if_long("exporting, and comparing the answers ..."):
        made = export_module(predictor, to, out, int8_on=examples, name_sites=name_sites)
    told.show(f"{out}: {', '.join(made.files)}")
    if made.difference is not None:
        told.show(
            f"It answers as the module does, within {made.difference:.1g} of the largest output."
        )
    if made.int8:
        told.show(told_loss(made.int8))
    if not name_sites:
        told.note("README.md numbers the sites; --name-sites puts their names in")
    told.result(asdict(made) | {"folder": str(out), "to": to, "module": predictor.found.digest})


def _to_file(module: str, file: Path | None, *, given: bool) -> None:
    """Raise UsageError unless one file is wanted, without what --to alone knows."""
    if given or file is None:
        raise click.UsageError(
            f"give a file for another registry, fedsplit module export {module} FILE.zip; or a form for other programs, "
            f"--to onnx, merged or hf, with --out DIR"
        )


def _labelled(predictor: Predictor, data: str) -> Examples:
    from fedsplit.training.data import load_source

    number = predictor.spec.numbers is not None
    return load_source(
        data,
        site="here",
        classes=None if number else predictor.classes,
        pixel_max=predictor.inputs.pixel_max,
        target="number" if number else "class",
    )

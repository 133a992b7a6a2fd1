"""`fedsplit demo`: the main job with the bundled backbone and scikit-learn's digits, without a download.

Four simulated sites with unlike data and unlike devices: one runs no block of the backbone, two run some,
one runs all. Everything but the settings is `fedsplit run`.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from fedsplit.cli.console import Output
from fedsplit.cli.run import AppOption, JsonFlag, run_request

SETTINGS: dict[str, str | int | float | bool] = {
    "backbone": "vit-glyphs",
    "task": "digits",
    "data": "digits",
    "sites": 4,
    "partition": "dirichlet:0.3",
    "cut": "0,6;1,5;2,4;6,6",
    "rounds": 5,
    "compare-local-only": True,
}

_EXPLANATION = """
What you see: four sites trained one module together; no image or label left
its site. Each ran another part of the same frozen model: cut 0,6 leaves all
six blocks to the server, 6,6 none, and "Sent" shows what that costs. A site
alone does well on its own few digits and badly on everyone's: hence together.
Next, your own images, one folder a class:
  fedsplit run --set data=folder:PATH --set task=NAME"""


def demo(
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the run's folder, under ./runs.")
    ] = False,
    app: AppOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show a whole federation on this machine in a few minutes, without any download."""
    from fedsplit.cli.request import prepare

    out = Output(as_json=as_json)
    runs_dir = Path("runs").absolute() if keep else Path(tempfile.mkdtemp(prefix="fedsplit-demo-"))
    code = 1
    try:
        request = prepare(SETTINGS | {"runs-dir": str(runs_dir)}, app=app)
        code = run_request(request, out)
        out.show(_EXPLANATION)
    finally:
        # What went wrong stays to be looked at.
        if not keep and (code == 0 or not any(runs_dir.iterdir())):
            shutil.rmtree(runs_dir, ignore_errors=True)
    if not keep and code == 0:
        out.note("The run's folder is gone again; --keep keeps it, with its plots, under ./runs.")
    raise typer.Exit(code)

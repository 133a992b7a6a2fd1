"""`fedsplit demo`: the main job with the bundled backbone and scikit-learn's digits, without a download.

Four simulated sites with unlike data and unlike devices: one runs no block of the backbone, two run some,
one runs all. Everything but the settings is `fedsplit run`.
"""

from __future__ import annotations

from pathlib import Path

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
    # From zero, so that training has something to show; a run of yours starts from a ridge classifier.
    "classifier-init": "zero",
    "rounds": 8,
    "compare-local-only": True,
}

_EXPLANATION = """
What you see: four sites trained one module together; no image or label left
its site. Each ran another part of the same frozen model: cut 0,6 leaves all
six blocks to the server, 6,6 none, and "Sent" shows what that costs. A site
alone does well on its own few digits and badly on everyone's: hence together.
The classifier began at zero, to show training; your own runs begin with one
solved from sums of the sites' features (classifier-init=ridge).
Next, your own images, one folder a class, on a backbone that has seen
images like yours (docs/how-to/own-data.md tells how to get one):
  fedsplit run --set recipe=shared --set backbone=DIR \\
      --set data=folder:PATH --set task=NAME"""


def demo(app: AppOption = None, as_json: JsonFlag = False) -> None:
    """Show a whole federation on this machine in a few minutes, without any download."""
    from fedsplit.cli.request import prepare

    out = Output(as_json=as_json)
    with out.if_long("checking settings, backbone and data ..."):
        request = prepare(SETTINGS | {"runs-dir": str(Path("runs").absolute())}, app=app)
    code = run_request(request, out)
    out.show(_EXPLANATION)
    raise typer.Exit(code)

"""`fedsplit config show`: every setting of a run as it is resolved, and where its value comes from. Starts nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsplit.cli.console import Output
from fedsplit.cli.run import AppOption, JobArgument, JsonFlag, SetOption

if TYPE_CHECKING:
    from rich.table import Table

    from fedsplit.core.config import RunConfig

app = typer.Typer(help="The settings of a run.", no_args_is_help=True)
_COLOURS = {"default": "dim", "method": "cyan", "recipe": "cyan", "automatic": "cyan"}


@app.callback()
def _config() -> None:
    """The settings of a run."""


@app.command()
def show(
    job: JobArgument = None,
    settings: SetOption = None,
    app: AppOption = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Leave out what is at its default.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show every setting as `fedsplit run` would resolve it, and where its value comes from. Runs nothing.

    Exit codes: 0 the settings are good, 2 they have faults.
    """
    from fedsplit.cli.appdir import find_app
    from fedsplit.cli.request import given_by
    from fedsplit.core.config import RunConfig, parse_set
    from fedsplit.core.config.run_file import read_run_file

    out = Output(as_json=as_json)
    layers = {
        "pyproject": given_by(find_app(app)),
        "file": {} if job is None else read_run_file(job),
        "--set": parse_set(settings or []),
    }
    config = RunConfig.from_flat({k: v for flat in layers.values() for k, v in flat.items()})
    resolved, notes = _fitted(config)
    givers = {key: layer for layer, flat in layers.items() for key in flat}
    record = _record(resolved, givers, changed=changed)
    for note in notes:
        out.note(note)
    out.show(_table(record))
    out.result({"file": None if job is None else str(job), "settings": record, "notes": notes})


def _fitted(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The settings on their backbone where this machine has it, and what stays open till the run."""
    from fedsplit.core.errors import BackboneError
    from fedsplit.model.backbone import Backbone

    whole = config.run.method_description.placement == "device"
    if not config.run.recipe and not whole:
        return config, []
    try:
        blocks = Backbone.find(config.placement.backbone).blocks
    except BackboneError:
        return config, [f"backbone={config.placement.backbone} is not here; a run adapts to it"]
    sites = config.server.sites
    config = config.fitted(blocks, sites=sites)
    open_ = [line for line in config.recipe_told(blocks, sites=sites) if ": " in line]
    return config.on_device(blocks) if whole else config, open_


def _record(config: RunConfig, givers: dict[str, str], *, changed: bool) -> dict[str, Any]:
    """Key -> its table, its value and where that comes from."""
    from fedsplit.core.config import FIELDS, Origin

    found = {}
    for key, value in config.flat().items():
        origin = config.origins.get(key, Origin.DEFAULT)
        giver = givers[key] if origin is Origin.GIVEN else origin.value
        if not changed or origin is not Origin.DEFAULT:
            found[key] = {"table": FIELDS[key].section, "value": value, "from": giver}
    return found


def _table(record: dict[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table, last = Table(box=None, header_style="dim"), ""
    for title in ("table", "key", "value", "from"):
        table.add_column(title, overflow="fold")
    for key, entry in record.items():
        name, value, giver = entry["table"], entry["value"], entry["from"]
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        style = _COLOURS.get(giver, "bold")
        head = Text("" if name == last else f"[{name}]", "dim")
        table.add_row(head, key, Text(shown, style), Text(giver, style))
        last = name
    return table

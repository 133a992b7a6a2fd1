"""What `fedsplit server up` shows in a terminal: a short table of the services that follows what happens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.live import Live
from rich.table import Table

from fedsplit.cli.console import Output
from fedsplit.plant.supervisor import Supervisor

_COLOURS = {"up": "green", "starting": "yellow", "down": "red"}


@contextlib.contextmanager
def view(server: Supervisor, out: Output) -> Iterator[None]:
    """In a terminal a short table of the services that follows what happens; else nothing beside the lines."""
    if not out.stderr.is_terminal or out.as_json:
        yield
        return
    with Live(
        get_renderable=lambda: _table(server.state()),
        console=out.stderr,
        refresh_per_second=2,
        transient=True,
    ):
        yield


def _table(state: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for head in ("service", "state", "process", "port", "restarts", "last end"):
        table.add_column(head)
    for name, one in state["services"].items():
        last = one["last_exit"]
        table.add_row(
            name,
            f"[{_COLOURS[one['state']]}]{one['state']}[/]",
            str(one["pid"] or "-"),
            str(one["port"] or "-"),
            str(one["restarts"]),
            f"{last['at']} {last['why']}" if last else "-",
        )
    return table

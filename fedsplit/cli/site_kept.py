"""What a site keeps, as a table."""

from __future__ import annotations

import time
from pathlib import Path

from rich.table import Table
from rich.text import Text

from fedsplit.plant.site.clean import KINDS, Kept


def shown(found: list[Kept], below: Path) -> Table:
    """One line a thing, by kind, the newest first; the last line sums."""
    table = Table(box=None, header_style="dim")
    table.add_column("Kept")
    table.add_column("Where", overflow="fold")
    table.add_column("MB", justify="right")
    table.add_column("Changed")
    table.add_column("Goes")
    for one in sorted(found, key=lambda k: (KINDS.index(k.kind), -k.changed)):
        table.add_row(
            one.kind,
            Text(one.path.relative_to(below).as_posix()),
            f"{one.bytes / 1e6:,.1f}",
            time.strftime("%Y-%m-%d", time.localtime(one.changed)),
            one.goes,
        )
    table.add_row("", "in all", f"{sum(one.bytes for one in found) / 1e6:,.1f}", "", "")
    return table

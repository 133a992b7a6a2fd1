"""The steps of the operations manual: what a person does at each machine, as the page has it.

<!-- on: MACHINE -->                the indented block that follows is run there
<!-- on: MACHINE, keep running -->  it is left running in its terminal
<!-- on: MACHINE, Ctrl-C -->        what runs in that terminal is ended
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

_MARK = re.compile(r"^<!-- on: ([\w-]+)(?:, (keep running|Ctrl-C))? -->\n\n((?:(?: {4}.*)?\n)*)", re.MULTILINE)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One thing to do."""

    machine: str
    how: str
    """run, keep running or Ctrl-C."""
    commands: str


def steps(page: Path) -> list[Step]:
    """All marked blocks of a page, in its order."""
    found = []
    for machine, how, block in _MARK.findall(page.read_text(encoding="utf-8")):
        commands = textwrap.dedent(block).strip()
        found.append(Step(machine, how or "run", "" if how == "Ctrl-C" else commands))
    return found

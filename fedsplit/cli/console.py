"""Where output goes: results to stdout, everything else to stderr; with --json one object on stdout.

Used by every command. Rich is loaded here; torch, flwr and matplotlib are not.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text


class Output:
    """One command's output channel."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.stderr = Console(stderr=True, highlight=False)

    def note(self, message: str) -> None:
        """Say something on the way; never on stdout."""
        self.stderr.print(Text(message))

    def show(self, renderable: RenderableType) -> None:
        """Show a result to a person; with --json it goes to stderr."""
        console = self.stderr if self.as_json else Console(highlight=False)
        console.print(renderable)

    def result(self, record: dict[str, Any]) -> None:
        """Print the command's one JSON object, if that was asked for."""
        if self.as_json:
            print_json(record)


def print_json(record: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_error(kind: str, message: str, *, as_json: bool) -> None:
    """Tell of an error: one screen on stderr, and the error object on stdout with --json."""
    if as_json:
        print_json({"error": {"kind": kind, "message": message}})
    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble((f"{kind}: ", "bold red"), message))

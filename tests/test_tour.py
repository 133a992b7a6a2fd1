"""docs/tour.md names files, methods and functions that exist, and is short enough to be read."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOUR = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
SPANS = sorted(set(re.findall(r"`([^`\n]+)`", TOUR)))
FILES = [span for span in SPANS if span.endswith(".py")]


def defined(path: Path) -> set[str]:
    """Classes, `Class.method` and `function()` of a file."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(f"{node.name}()")
        if isinstance(node, ast.ClassDef):
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            found |= {node.name, *(f"{node.name}.{method.name}" for method in methods)}
    return found


def test_every_name_stands_in_a_file_that_the_tour_names() -> None:
    assert [span for span in FILES if not (ROOT / span).is_file()] == []
    known = set().union(*(defined(ROOT / span) for span in FILES))
    names = [s for s in SPANS if re.fullmatch(r"_?[A-Z]\w+(\.\w+)?|\w+\(\)", s)]
    assert len(names) > 40
    assert [name for name in names if name not in known] == []


def test_the_tour_is_short() -> None:
    assert len(TOUR.split()) <= 700
    assert max(map(len, TOUR.splitlines())) <= 100

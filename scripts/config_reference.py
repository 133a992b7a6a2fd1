"""Write docs/reference/config.md from `RunConfig`: every key with its type, default and meaning.

The meanings are the lines of prose below the fields in the sections of fedsplit/core/config.

    python scripts/config_reference.py           write the page
    python scripts/config_reference.py --check   exit 1 when the page is out of date
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from fedsplit.core.config import SECTIONS, Section

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "config.md"

HEAD = """\
# Settings of a run

Generated from `fedsplit/core/config` by `python scripts/config_reference.py`; do not edit this
page by hand.

The same keys work everywhere: as `fedsplit run --set KEY=VALUE`, and in
`flwr run . --run-config 'KEY=VALUE'`, where strings have quotes as in TOML. One error reports all
faults of a set of values.

A key that you give always counts, also at its default value. A recipe keeps it. If the
[method](methods.md) means another value, the run is refused. `[tool.flwr.app.config]` of
`pyproject.toml` lists every key with the word `default`: the key is not given.

## A run file

`fedsplit run job.toml` reads the settings from a TOML file. The keys stand in tables; this page has
one section for each table. `--set` overrides the file. Paths are relative to the working directory.

    [run]
    method = "fedprox"

    [train]
    rounds = 10
    learning-rate = 0.01

[`fedsplit config show job.toml`](cli.md#fedsplit-config-show) shows the result.

## Sites and resumed runs

A site may override `data`, `cut` and `encoder-tls-ca` in its [node config](node-config.md). A
resumed run keeps its settings; [resume](../how-to/resume.md) lists the few that may change.
"""


def meanings(section: type[Section]) -> dict[str, str]:
    """Field -> the prose below it."""
    source = textwrap.dedent(inspect.getsource(section))
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def type_of(annotation: Any) -> str:
    """A field's type in words."""
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(type_of(a) for a in get_args(annotation))
    names = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}
    return names.get(annotation, str(annotation))


def bounds_of(metadata: list[Any]) -> str:
    """The limits of a number, in symbols."""
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    parts = []
    for item in metadata:
        for name, sign in signs.items():
            value = getattr(item, name, None)
            if value is not None:
                parts.append(f"{sign} {value:g}" if value < 10**6 else f"{sign} {value}")
    return ", ".join(parts)


def default_of(value: Any) -> str:
    """A default as it is written in TOML."""
    if value == "":
        return "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def page() -> str:
    """The whole page. Raises KeyError for a field without a meaning."""
    return "\n".join(
        [HEAD, *(part for name, kind in SECTIONS.items() for part in _table(name, kind))]
    )


def _table(name: str, section: type[Section]) -> list[str]:
    """One section: its table's name in a run file, and a row a key."""
    text = meanings(section)
    about = " ".join(str(section.__doc__).split())
    lines = [
        f"## `[{name}]`",
        "",
        about,
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for field_name, field in section.model_fields.items():
        kind = type_of(field.annotation)
        if limits := bounds_of(field.metadata):
            kind = f"{kind}, {limits}"
        meaning = text[field_name].replace("|", "\\|")
        lines.append(f"| `{field.alias}` | {kind} | {default_of(field.default)} | {meaning} |")
    return [*lines, ""]


if __name__ == "__main__":
    # Here, for who imports this file by its path (the tests) does not see its neighbours.
    from reference_page import write_or_check

    sys.exit(write_or_check(PAGE, page(), source="RunConfig"))

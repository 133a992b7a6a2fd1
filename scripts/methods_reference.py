"""Write docs/reference/methods.md from `METHODS`: every method with its source, placement and settings.

What a method is stands in fedsplit/core/methods.py, how the methods differ in docs/explanation/methods.md.

    python scripts/methods_reference.py           write the page
    python scripts/methods_reference.py --check   exit 1 when the page is out of date
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from fedsplit.core.config import RunConfig
from fedsplit.core.methods import METHODS, Method, Value
from fedsplit.core.recipes import RECIPES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "methods.md"

HEAD = """\
# Methods

Generated from `fedsplit/core/methods.py` by `python scripts/methods_reference.py`; do not edit
this page by hand.

A method is a name for several [settings](config.md): `fedsplit run --set method=NAME`, or a row
of [a grid](grid.md). Two names do more: `centralised` gives one simulated site the samples of all
sites, and `local-only` ends after the sites have trained alone.
[Methods compared](../explanation/methods.md) explains what each method trains and averages, and
what it leaves out of its paper.

- *means*: settings that define the method. If you give another value, the run is refused, also
  when that value is the setting's default.
- *prefers*: replaces the setting's default. You may give another value.
- *takes*: the only values that fit.

All other settings are free. Other contradictions are reported before a run starts.
"""

RECIPE_HEAD = """\
A recipe sets a method and more, and adapts some settings to the backbone's L blocks and to the
sites ([which recipe to take](../how-to/choose-a-method.md)). A value that you give yourself
wins, and fedsplit reports it.
"""

WHERE = {
    "any": "any cut",
    "split": "a split: some block runs on the server",
    "device": "the whole model on the device; leave `cut` out",
}


def page() -> str:
    """The whole page."""
    lines = [HEAD, "| method | | runs |", "|---|---|---|"]
    for name, method in METHODS.items():
        lines.append(f"| [`{name}`](#{name}) | {method.summary} | {WHERE[method.placement]} |")
    lines += ["", *recipes()]
    for name, method in METHODS.items():
        lines += ["", *section(name, method)]
    return "\n".join(lines) + "\n"


def recipes() -> list[str]:
    """All recipes: what they are for, what they set, what they adapt."""
    lines = ["## Recipes", "", RECIPE_HEAD, "| `recipe=` | | sets | adapts |", "|---|---|---|---|"]
    for name, recipe in RECIPES.items():
        where = f"`0,b`, one block in {recipe.tail_of} in the tail" if recipe.tail_of else "`0,L`"
        adapts = [f"`cut` ({where})"]
        adapts += ["`module-blocks` (L)"] if recipe.every_block else []
        rate = f"`lora-learning-rate` ({recipe.step_rate:g} for each site)"
        adapts += [rate, "`rounds`"] if recipe.step_rate else []
        lines.append(
            f"| `{name}` | {recipe.summary} | {pairs(recipe.sets)} | {', '.join(adapts)} |"
        )
    return lines


def section(name: str, method: Method) -> list[str]:
    """One method: source and settings. What it does and where it runs is in the table above."""
    rows = [
        ("source", method.source),
        ("means", pairs(method.fixes)),
        ("prefers", pairs(method.prefers)),
        ("takes", choices(method.one_of)),
    ]
    table = [f"| {title} | {text} |" for title, text in rows if text]
    return [f"## `{name}`", "", "| | |", "|---|---|", *table]


def pairs(settings: Mapping[str, Value]) -> str:
    """Settings as they are written after --set; those that are the default anyway are said to be."""
    defaults = RunConfig.defaults()
    return ", ".join(
        f"`{key}={text(value)}`{' (the default)' if defaults[key] == value else ''}"
        for key, value in settings.items()
    )


def choices(one_of: Mapping[str, tuple[Value, ...]]) -> str:
    """Keys with the values that fit."""
    return "; ".join(
        f"`{key}`: {' or '.join(f'`{text(value)}`' for value in values)}"
        for key, values in one_of.items()
    )


def text(value: Value) -> str:
    """A value as --set takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    # Here, for who imports this file by its path (the tests) does not see its neighbours.
    from reference_page import write_or_check

    sys.exit(write_or_check(PAGE, page(), source="METHODS"))

"""A survey of a source as tables in the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedsplit.core.foreign import printable
from fedsplit.report.survey import FIVE, Survey

_CLASSES_SHOWN = 40


def shown(found: Survey) -> RenderableType:
    """Everything there is to say, the notes last, where they are read."""
    parts: list[RenderableType] = [
        Text(
            f"{printable(found.source)}: {found.samples:,} {found.kind}s "
            + (f"in {len(found.classes)} classes" if found.classes else "with a number each"),
            style="bold",
        ),
        "",
        _classes(found) if found.classes else _numbers(found),
        "",
        _facts(found),
    ]
    if found.notes:
        parts += ["", Text("Notes", style="bold"), *(Text(f"- {note}") for note in found.notes)]
    if found.sheet:
        parts += ["", Text(f"Contact sheet: {found.sheet}")]
    return Group(*parts)


def _classes(found: Survey) -> Table:
    table = Table(box=None, header_style="dim")
    table.add_column("Class", overflow="fold")
    for column in ("Samples", "Train", "Test"):
        table.add_column(column, justify="right")
    for name in list(found.classes)[:_CLASSES_SHOWN]:
        table.add_row(
            Text(printable(name, limit=80)),
            f"{found.classes[name]:,}",
            f"{found.train[name]:,}",
            f"{found.test[name]:,}",
        )
    if len(found.classes) > _CLASSES_SHOWN:
        table.add_row(f"and {len(found.classes) - _CLASSES_SHOWN} more", "", "", "")
    return table


def _numbers(found: Survey) -> Table:
    table = Table(box=None, header_style="dim")
    for column in ("", "Samples", "Least", "Lower quartile", "Median", "Upper quartile", "Largest"):
        table.add_column(column, justify="right" if column else "left")
    for name, facts in found.numbers.items():
        values = (f"{facts[key]:.6g}" for key in FIVE)
        table.add_row(name.capitalize(), f"{facts['count']:,}", *values)
    return table


def _facts(found: Survey) -> Table:
    table = Table(box=None, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    if found.kind == "image":
        sizes = [f"{size} ({count})" for size, count in list(found.sizes.items())[:8]]
        more = len(found.sizes) - len(sizes)
        looked = sum(found.sizes.values())
        some = looked < found.samples
        table.add_row(
            f"Sizes of {looked:,}" if some else "Sizes",
            ", ".join(sizes) + (f" and {more} others" if more else ""),
        )
        table.add_row("Black to white", f"0 to {found.pixel_max:g}")
    if found.characters is not None:
        least, median, most = found.characters
        table.add_row("Characters", f"{least} to {most}, median {median}")
    if found.tokens is not None:
        least, median, most = found.tokens.lengths
        table.add_row(
            "Tokens",
            f"{least} to {most}, median {median}; cut at {found.tokens.limit}: {found.tokens.cut}",
        )
        table.add_row("Unknown tokens", f"{100 * found.tokens.unknown:.1f} %")
    table.add_row(
        "Doubles",
        f"{found.doubles_within} within their class, {found.doubles_across} under several classes"
        if found.classes
        else f"{found.doubles_within} with the same number, {found.doubles_across} with several",
    )
    return table

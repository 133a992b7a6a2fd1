"""What left the sites in a run, by its settings, with the bytes that were counted. docs/explanation/security.md is the long form."""

from __future__ import annotations

from fedsplit.core.cut import Cut
from fedsplit.core.errors import ConfigError
from fedsplit.report.page.blocks import Block, Table, Text, row
from fedsplit.report.page.shown import Shown
from fedsplit.report.page.subject import Part
from fedsplit.report.units import NONE, human_bytes


def blocks(shown: Shown, run: str, part: Part) -> tuple[Block, ...]:
    """A table of kinds, each with why it left, and what stayed."""
    say, summary, config = shown.say, part.summary, part.config
    if not summary.sites:
        return (Text(say("left.nothing")),)
    if not config:
        return (Text(say("left.unknown"), tone="warning"),)
    metrics = part.metrics
    up = sum(m.bytes_activation_up for m in metrics)
    module = sum(m.bytes_module_up for m in metrics)
    rows: list[tuple[str, str, str]] = []

    def told(what: str, to: str, size: int | None = None) -> None:
        rows.append(
            (say(f"left.{what}"), say(f"left.to-{to}"), NONE if size is None else human_bytes(size))
        )

    told("numbers" if summary.target == "number" else "classes", "server")
    if config.get("classifier-init") != "zero" and summary.start in ("ridge", "class-means"):
        told("sums", "server")
    if config.get("gradient") == "zeroth-order":
        told("scalars", "server", module)
    else:
        told("module", "server", module)
    if any(_split(site.cut) for site in summary.sites):
        told("activations", "encoder", up)
        if config.get("device-training") == "head+tail" or config.get("encoder-training") in (
            "hosted",
            "shared",
        ):
            told("gradients", "encoder")
        if config.get("encoder-training") == "zeroth-order":
            told("losses", "encoder")
    told("tests", "server")
    if part.confusion is not None:
        told("confusion", "server")
    head = tuple(say(f"column.{c}") for c in ("what", "to", "bytes"))
    refs = shown.sources.ref(shown.measured(run, "metrics.jsonl"), say("source.config", run=run))
    return (
        Text(say("left.stays"), tone="lead"),
        Table(columns=head, rows=tuple(row(r) for r in rows), left=(0, 1), refs=refs),
        Text(say("left.privacy"), tone="note"),
    )


def _split(cut: str) -> bool:
    """Does a part of the model run on the server?"""
    try:
        found = Cut.parse(cut)
    except (ConfigError, ValueError):
        return True
    return found.a < found.b

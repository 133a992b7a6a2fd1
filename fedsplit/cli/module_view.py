"""How versions of modules are shown: one table of all, one version whole, two side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fedsplit.cli.console import Output
from fedsplit.core.foreign import printable
from fedsplit.core.scores import SCORINGS
from fedsplit.registry.version import Promotion, SiteFacts, Version

_NOTHING = "-"


def record_of(version: Version) -> dict[str, Any]:
    """A version for --json: as version.json has it, with its name and its aliases."""
    return {"module": version.name, **version.model_dump(mode="json")}


def versions_table(versions: Sequence[Version]) -> Table:
    """One line a version."""
    table = _table("module", "in use as", "made", "run", "classes", "score", "samples", "sites", "digest", "tags")  # fmt: skip
    for v in versions:
        table.add_row(
            *_cells(
                v.name,
                ", ".join(v.aliases),
                _day(v.created),
                v.run + _outcome(v),
                str(len(v.classes)) if v.target == "class" else "number",
                _main(v, v.metrics),
                str(sum(site.samples for site in v.sites)) if v.sites else "",
                str(len(v.sites)) if v.sites else "",
                v.digest[:12],
                ", ".join(v.tags),
            )
        )
    return table


def show_version(
    out: Output,
    version: Version,
    folder: Path,
    names: Mapping[str, str],
    history: Sequence[Promotion],
) -> None:
    """All of a version. `names`: digest -> name of the versions that are there."""
    facts = _table()
    settings = ", ".join(f"{k}={v}" for k, v in version.settings.items() if v not in ("", 0, False))
    for name, value in (
        ("module", version.name),
        ("in use as", ", ".join(version.aliases)),
        ("digest", version.digest),
        ("files", f"{folder} ({version.size_bytes / 1e6:.1f} MB, {version.kind or 'module'})"),
        (
            "classes",
            printable(", ".join(version.classes), limit=400) or "none: the answer is a number",
        ),
        ("backbone", f"{version.backbone} {version.backbone_sha256[:12]}"),
        (
            "made",
            f"{_day(version.created)} by fedsplit {version.fedsplit_version or '(not known)'}",
        ),
        ("runs", ", ".join(run.name for run in version.runs[:20]) + _outcome(version)),
        ("started from", ", ".join(names.get(p, f"{p[:12]} (not here)") for p in version.parents)),
        ("scores", _scores(version.metrics)),
        ("tags", ", ".join(version.tags)),
        ("settings", settings),
    ):
        facts.add_row(*_cells(name, value))
    out.show(facts)
    if version.sites:
        out.show("")
        out.show(_sites(version))
    for note in version.notes:
        out.show(f"note: {note}")
    for move in history:
        by = f" by {move.by}" if move.by else ""
        why = f": {move.why}" if move.why else ""
        word = "promoted to" if move.kind == "promote" else "rolled back to as"
        out.show(f"{_day(move.at)} {word} {move.alias}{by}{why}")
        for what, told in move.measured.items():
            out.show(f"    {printable(what, limit=200)}: {printable(told, limit=300)}")


def compared(one: Version, other: Version) -> dict[str, Any]:
    """What differs, for --json."""
    keys = sorted(one.settings.keys() | other.settings.keys())
    names = sorted({s.name for s in one.sites} | {s.name for s in other.sites})
    sites = [{s.name: s for s in v.sites} for v in (one, other)]
    return {
        "modules": [one.name, other.name],
        "same_files": one.digest == other.digest,
        "same_task": one.task == other.task,
        "same_backbone": one.backbone_sha256 == other.backbone_sha256,
        "classes_only_in": [
            [c for c in one.classes if c not in set(other.classes)],
            [c for c in other.classes if c not in set(one.classes)],
        ],
        "metrics": {
            name: [one.metrics.get(name), other.metrics.get(name)]
            for name in sorted(one.metrics.keys() | other.metrics.keys())
        },
        "sites": [
            {"name": name} | _pair(*(by_name.get(name) for by_name in sites)) for name in names
        ],
        "settings": {
            key: [one.settings.get(key), other.settings.get(key)]
            for key in keys
            if one.settings.get(key) != other.settings.get(key)
        },
    }


def show_compared(out: Output, one: Version, other: Version, found: Mapping[str, Any]) -> None:
    """The same for a person; what makes the scores no comparison comes first."""
    for wrong in _warnings(one, other, found):
        out.note(f"warning: {wrong}")
    if found["same_files"]:
        out.show(f"{one.name} and {other.name} have the same files.")
    table = _table("", one.shown, other.shown, "change")
    main = SCORINGS[one.target].main
    for name, (before, after) in found["metrics"].items():
        table.add_row(*_cells(name, _number(before), _number(after), _change(name, before, after)))
    for site in found["sites"]:
        before, after = (scores.get(main) for scores in site["scores"])
        told = _change(main, before, after)
        table.add_row(*_cells(f"{main} at {site['name']}", _number(before), _number(after), told))
    for key, (before, after) in found["settings"].items():
        shown = (_NOTHING if value is None else str(value) for value in (before, after))
        table.add_row(*_cells(f"setting {key}", *shown, ""))
    out.show(table)


def _warnings(one: Version, other: Version, found: Mapping[str, Any]) -> list[str]:
    told = []
    if not found["same_task"]:
        told.append(f"{one.name} and {other.name} are of two tasks; their scores do not compare")
    if not found["same_backbone"]:
        told.append(
            f"the backbones differ: {one.backbone} {one.backbone_sha256[:12]} and {other.backbone} "
            f"{other.backbone_sha256[:12]}"
        )
    for version, names in zip((one, other), found["classes_only_in"], strict=True):
        if names:
            told.append(
                f"only {version.name} has the classes {printable(', '.join(names), limit=200)}"
            )
    if [s["test_samples"][0] for s in found["sites"]] != [
        s["test_samples"][1] for s in found["sites"]
    ]:
        told.append(
            "the two runs tested on other samples, so their scores do not compare exactly; test both on the same ones"
        )
    return told


def _pair(one: SiteFacts | None, other: SiteFacts | None) -> dict[str, Any]:
    both = (one, other)
    return {
        "samples": [s.samples if s else 0 for s in both],
        "test_samples": [s.test_samples if s else 0 for s in both],
        "scores": [s.scores if s else {} for s in both],
    }


def _sites(version: Version) -> Table:
    main = SCORINGS[version.target].main
    table = _table(
        "site", "samples", "test samples", f"{main} before", main, "cut", "rounds missed"
    )
    for site in version.sites:
        table.add_row(
            *_cells(
                site.name,
                str(site.samples),
                str(site.test_samples),
                _number(site.scores_before.get(main)),
                _number(site.scores.get(main)),
                site.cut,
                str(site.rounds_missed),
            )
        )
    return table


def _main(version: Version, scores: Mapping[str, float]) -> str:
    main = SCORINGS[version.target].main
    return f"{main} {_number(scores[main])}" if main in scores else ""


def _scores(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in scores.items())


def _change(name: str, before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return ""
    if name.startswith("accuracy"):
        return f"{100 * (after - before):+.2f} points"
    return f"{after - before:+.4g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _outcome(version: Version) -> str:
    return f" ({version.outcome})" if version.outcome in ("partial", "failed") else ""


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, show_header=bool(headings))
    for i, heading in enumerate(headings or ("", "")):
        # In a narrow terminal lines fold, but for the name to type; nothing is cut.
        table.add_column(Text(heading), overflow="fold", no_wrap=bool(headings) and not i)
    return table


def _cells(*values: str) -> list[Text]:
    return [Text(value or _NOTHING) for value in values]


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")

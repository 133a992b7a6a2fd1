"""The rows of the measurement, as CSV for programs and Markdown for people."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Row:
    """One attack on one thing that leaves a site."""

    scene: str
    target: str
    """labels, images or classes (which ones a site has)."""
    mode: str
    cut: str
    codec: str
    reads: str
    """The tensor that is attacked, and which way it goes."""
    attack: str
    unit: str
    """share: of samples or classes found, 0 .. 1; area: under the curve; dB: peak signal-to-noise; none: nothing is
    there to attack."""
    value: float
    reference: float
    """What the same attack or a guess gives without the leak: chance, or an image of its mean colour."""


def write(rows: Sequence[Row], folder: Path) -> tuple[Path, Path]:
    """leakage.csv and leakage.md in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    table, page = folder / "leakage.csv", folder / "leakage.md"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            known = asdict(row)
            writer.writerow(known | {k: f"{known[k]:.4f}" for k in ("value", "reference")})
    page.write_text(markdown(rows), encoding="utf-8")
    return table, page


def markdown(rows: Sequence[Row]) -> str:
    """A page with one table a scene and target."""
    lines = [
        "# Leakage, as measured",
        "",
        "Written by `python -m experiments.leakage`; [what it means](../explanation/leakage.md). The reference is",
        "what the same attack finds by chance. For images it is the PSNR of an image in its own mean colour.",
    ]
    for scene in _names(row.scene for row in rows):
        for target in _names(row.target for row in rows if row.scene == scene):
            lines += ["", f"## {scene}: {target}", ""]
            lines += ["| mode | cut | codec | reads | attack | found | reference |"]
            lines += ["|---|---|---|---|---|---|---|"]
            lines += [
                f"| {r.mode} | {r.cut} | {r.codec} | {r.reads} | {r.attack} | {_shown(r, r.value)} | "
                f"{_shown(r, r.reference)} |"
                for r in rows
                if (r.scene, r.target) == (scene, target)
            ]
    return "\n".join(lines) + "\n"


def line(row: Row) -> str:
    """A row on a line of its own, as it is found."""
    found = f"{_shown(row, row.value)} (reference {_shown(row, row.reference)})"
    return f"{row.mode}, cut {row.cut}, {row.codec}: {row.reads}, {row.attack}: {found}"


def _names(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _shown(row: Row, value: float) -> str:
    if row.unit == "none":
        return "-"
    if row.unit == "share":
        return f"{100 * value:.1f}%"
    return f"{value:.2f}" if row.unit == "area" else f"{value:.1f} dB"

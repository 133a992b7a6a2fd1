"""The rows of the measurement, as CSV for programs and Markdown for people."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

_NAMES = {
    "fedyolo": "a module for each task (`fedyolo`)",
    "full": "full fine-tuning (`fedavg-full`)",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One test of one task."""

    way: str
    """fedyolo or full."""
    seed: int
    trained: str
    """The task that was trained last."""
    task: str
    """The task that is tested."""
    accuracy: float
    bytes_round: int
    """What a round of `trained` moved, all sites together."""
    bytes_round_full_model: int
    """What it would have moved with the whole model each way."""


@dataclass(frozen=True)
class Forgotten:
    """One task of one chain: right after its own training, and at the end."""

    way: str
    task: str
    seed: int
    after: float
    at_end: float

    @property
    def drop(self) -> float:
        """What was forgotten, as a share of all test samples."""
        return self.after - self.at_end


def forgotten(rows: Sequence[Row]) -> list[Forgotten]:
    """Every task but the last of each chain, which nothing came after."""
    found = []
    for way, seed in dict.fromkeys((r.way, r.seed) for r in rows):
        chain = [r for r in rows if (r.way, r.seed) == (way, seed)]
        end = chain[-1].trained
        at = {(r.trained, r.task): r.accuracy for r in chain}
        found += [
            Forgotten(way, task, seed, at[task, task], at[end, task])
            for task in _names(r.task for r in chain)
            if task != end
        ]
    return found


def write(rows: Sequence[Row], folder: Path) -> tuple[Path, Path]:
    """forgetting.csv and forgetting.md in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    table, page = folder / "forgetting.csv", folder / "forgetting.md"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) | {"accuracy": f"{row.accuracy:.4f}"} for row in rows)
    page.write_text(markdown(rows), encoding="utf-8")
    return table, page


def markdown(rows: Sequence[Row]) -> str:
    """A page with two tables: what was forgotten, and what a round moved."""
    seeds = _names(str(row.seed) for row in rows)
    lines = [
        "# Forgetting, as measured",
        "",
        "Written by `python -m experiments.forgetting`. The tasks train one after another, in the order of",
        "the table. Accuracies are on the test samples of all sites: mean (min to max) over",
        f"{len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'} ({', '.join(seeds)}).",
        "",
        "| way | task | right after its training | at the end | forgotten, points |",
        "|---|---|---|---|---|",
    ]
    drops = forgotten(rows)
    for way, task in dict.fromkeys((d.way, d.task) for d in drops):
        of = [d for d in drops if (d.way, d.task) == (way, task)]
        cells = (_percent(d.after for d in of), _percent(d.at_end for d in of))
        lines.append(
            f"| {_NAMES[way]} | {task} | {' | '.join(cells)} | {_percent((d.drop for d in of), '')} |"
        )
    lines += ["", "The last task, with no task after it:", "", "| way | task | accuracy |"]
    lines += ["|---|---|---|"]
    last = rows[-1].trained
    for way in _names(row.way for row in rows):
        of_last = [r.accuracy for r in rows if (r.way, r.trained, r.task) == (way, last, last)]
        if of_last:
            lines.append(f"| {_NAMES[way]} | {last} | {_percent(of_last)} |")
    lines += ["", "## What a round moves", ""]
    lines += ["All sites together, module down and up, including the test at a run's end.", ""]
    lines += [
        "| way | task | MB in a round | the whole model, MB | factor |",
        "|---|---|---|---|---|",
    ]
    for way, task in dict.fromkeys((r.way, r.trained) for r in rows):
        one = next(r for r in rows if (r.way, r.trained) == (way, task))
        lines.append(
            f"| {_NAMES[way]} | {task} | {one.bytes_round / 1e6:.3g} | "
            f"{one.bytes_round_full_model / 1e6:.3g} | {factor(one):.3g} |"
        )
    return "\n".join(lines) + "\n"


def factor(row: Row) -> float:
    """How many times less a round moved than the whole model would have."""
    return row.bytes_round_full_model / row.bytes_round


def line(row: Row) -> str:
    """A row on a line of its own, as it is found."""
    return f"{row.way}, seed {row.seed}, after {row.trained}: {row.task} {100 * row.accuracy:.1f}%"


def _names(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _percent(values: Iterable[float], sign: str = "%") -> str:
    found = [100 * value for value in values]
    mean = f"{sum(found) / len(found):.1f}{sign}"
    return mean if len(found) == 1 else f"{mean} ({min(found):.1f} to {max(found):.1f})"

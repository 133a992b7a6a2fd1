"""What the runs of a grid left, as one row each: results.csv, and whether a run is already done.

Reads run directories, writes the CSV and reads it back. The table and the figures are made from
these rows by report/comparison.py.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from fedsplit.core.errors import RunDirError
from fedsplit.core.foreign import read_json
from fedsplit.core.records import Outcome, RoundMetrics, SiteSummary, Summary
from fedsplit.experiment.cells import Cell
from fedsplit.experiment.files import write_whole
from fedsplit.federation.server.books.run_dir import RunDir

CELL_FILE = "cell.json"


class Row(BaseModel):
    """One run: where it stands in the grid, what it reached and what it cost. Bytes, seconds, shares in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    """Its folder under runs/."""
    method: str
    problem: str
    axes: tuple[tuple[str, bool | int | float | str], ...]
    seed: int
    outcome: Outcome
    rounds: int = 0
    """Rounds that were finished."""
    accuracy_global: float | None = None
    accuracy_personal: float | None = None
    """Each site's own model on its own test samples, over all test samples."""
    accuracy_local_only: float | None = None
    accuracy_by_round: tuple[float, ...] = ()
    bytes_by_round: tuple[int, ...] = ()
    """All bytes moved until the accuracy at the same place was reached; 0 first."""
    bytes_activation_up: int = 0
    bytes_activation_down: int = 0
    bytes_module_up: int = 0
    bytes_module_down: int = 0
    flops_device: int = 0
    """Of all devices together; 0 where it was not counted."""
    seconds: float = 0.0
    seconds_device: float = 0.0
    peak_rss_bytes: int = 0
    """Of the process that was server, encoder and all sites."""
    reason: str = ""
    gathers_data: bool = False
    """The sites' data stand in one place; how they came there is not in the bytes."""

    @property
    def bytes_up(self) -> int:
        """All bytes that sites sent."""
        return self.bytes_activation_up + self.bytes_module_up

    @property
    def bytes_down(self) -> int:
        """All bytes that sites received."""
        return self.bytes_activation_down + self.bytes_module_down

    @property
    def column(self) -> str:
        """Its place in the table beside method, problem and seed."""
        return ", ".join(str(v) if k == "partition" else f"{k}={v}" for k, v in self.axes)


def failed_row(cell: Cell, reason: str) -> Row:
    """The row of a run that reached nothing."""
    return Row(
        run=cell.run, method=cell.method, problem=cell.problem, axes=cell.axes, seed=cell.seed,
        outcome="failed", reason=reason,
    )  # fmt: skip


def mark(cell: Cell) -> None:
    """Note in the run's folder what it is a run of."""
    about = {"key": cell.key, "cell": str(cell)}
    write_whole(folder_of(cell) / CELL_FILE, json.dumps(about, indent=2) + "\n")


def folder_of(cell: Cell) -> Path:
    """The run's folder."""
    return Path(cell.config.run.runs_dir) / cell.run


def finished(cell: Cell) -> Row | None:
    """The row of a run that is complete in its folder with these very settings, or None."""
    try:
        about = read_json(folder_of(cell) / CELL_FILE)
        if not isinstance(about, dict) or about.get("key") != cell.key:
            return None
        row = row_of(cell)
    except (OSError, ValueError, RunDirError):
        return None
    return row if row.outcome == "complete" else None


def row_of(cell: Cell) -> Row:
    """Read a run's folder. Raises RunDirError when it is not whole."""
    folder = folder_of(cell)
    path = folder / "summary.json"
    try:
        summary = Summary.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as err:
        raise RunDirError(f"{path} cannot be read: {str(err)[:300]}; run it again") from err
    metrics = RunDir(folder).read_metrics()
    curve = summary.accuracy_by_round
    return Row(
        run=cell.run,
        method=cell.method,
        problem=cell.problem,
        axes=cell.axes,
        seed=cell.seed,
        outcome=summary.outcome,
        rounds=summary.rounds_done,
        accuracy_global=summary.accuracy_global,
        accuracy_personal=_personal(summary),
        accuracy_local_only=summary.accuracy_local_only,
        accuracy_by_round=curve,
        bytes_by_round=_bytes_until(metrics, len(curve)),
        bytes_activation_up=sum(m.bytes_activation_up for m in metrics),
        bytes_activation_down=sum(m.bytes_activation_down for m in metrics),
        bytes_module_up=sum(m.bytes_module_up for m in metrics),
        bytes_module_down=sum(m.bytes_module_down for m in metrics),
        flops_device=summary.flops_device,
        seconds=summary.wall_s,
        seconds_device=sum(m.seconds_device for m in metrics),
        peak_rss_bytes=max((s.peak_rss_bytes for s in summary.sites), default=0),
        reason=summary.reason,
        gathers_data=cell.config.run.method_description.gathers,
    )


def _personal(summary: Summary) -> float | None:
    """Personal accuracy; the module as it came counts where a site did not train it."""
    if summary.accuracy_personal is not None:
        return summary.accuracy_personal
    weighted = [(_own(s), s.test_samples) for s in summary.sites]
    known = [(share, weight) for share, weight in weighted if share is not None]
    total = sum(weight for _, weight in known)
    return sum(share * weight for share, weight in known) / total if total else None


def _own(site: SiteSummary) -> float | None:
    return site.accuracy if site.accuracy_personal is None else site.accuracy_personal


def _bytes_until(metrics: Sequence[RoundMetrics], points: int) -> tuple[int, ...]:
    """Bytes of the first 0, 1, 2 ... rounds: the curve's place r is what r rounds of training reached."""
    moved = [0] * points
    for m in metrics:
        if m.round < points:
            moved[max(m.round, 0)] += (
                m.bytes_activation_up
                + m.bytes_activation_down
                + m.bytes_module_up
                + m.bytes_module_down
            )
    return tuple(sum(moved[: i + 1]) for i in range(points))


_PLAIN = [n for n in Row.model_fields if n not in {"axes", "accuracy_by_round", "bytes_by_round"}]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write results.csv, a row a run, the axes as columns of their own. Raises RunDirError."""
    axes = list(dict.fromkeys(key for row in rows for key, _ in row.axes))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    at = _PLAIN.index("seed")
    writer.writerow([*_PLAIN[:at], *axes, *_PLAIN[at:]])
    for row in rows:
        values = ["" if (v := getattr(row, n)) is None else v for n in _PLAIN]
        own = dict(row.axes)
        writer.writerow([*values[:at], *(own.get(key, "") for key in axes), *values[at:]])
    write_whole(path, text.getvalue())


def read_csv(path: Path) -> list[Row]:
    """The rows of a results.csv, without the curves, which are not in it. Columns of a newer version may be missing.

    What is no column of a row is an axis. Raises RunDirError.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            return [_from_csv(line) for line in reader]
    except (OSError, ValueError, csv.Error) as err:
        raise RunDirError(
            f"{path} is no results.csv of `fedsplit experiment`: {str(err)[:300]}"
        ) from err


def _from_csv(line: dict[str, str]) -> Row:
    if None in line or None in line.values():
        raise ValueError(f"run {line.get('run')!r} has not as many cells as there are columns")
    told = {name: text for name, text in line.items() if text != ""}
    axes = tuple((name, _value(text)) for name, text in told.items() if name not in _PLAIN)
    # Only an axis may be left out of a row: a run of no problem's name has an empty one.
    plain = {"problem": ""} | {name: text for name, text in told.items() if name in _PLAIN}
    return Row.model_validate(plain | {"axes": axes})


def _value(text: str) -> bool | int | float | str:
    """An axis' value as it was before it was written."""
    if text in {"True", "False"}:
        return text == "True"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text

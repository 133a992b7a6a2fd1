"""Reads a run's files as the records of `core/records.py`, also while the run still writes them.

Raises RunDirError for a file that is missing or damaged; writes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fedsplit.core.errors import RunDirError
from fedsplit.core.records import RoundMetrics, Status, Summary, TasksSummary

_Record = TypeVar("_Record", bound=BaseModel)


def read_summary(run_dir: Path) -> Summary:
    """The run in numbers, from `summary.json`."""
    return _read(run_dir / "summary.json", Summary)


def read_tasks(run_dir: Path) -> TasksSummary:
    """How each task of a run of several ended, from `tasks.json`."""
    return _read(run_dir / "tasks.json", TasksSummary)


def read_status(run_dir: Path) -> Status:
    """Where the run stands, from `status.json`."""
    return _read(run_dir / "status.json", Status)


def read_metrics(run_dir: Path) -> tuple[RoundMetrics, ...]:
    """All lines of `metrics.jsonl`; a last line that is still being written is left out."""
    path = run_dir / "metrics.jsonl"
    text = _text(path)
    lines = text[: text.rfind("\n") + 1].splitlines()
    records: list[RoundMetrics] = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(RoundMetrics.model_validate_json(line))
        except ValidationError as err:
            raise RunDirError(
                f"{path}, line {number}, is not a metrics line: {_first(err)}"
            ) from err
    return tuple(records)


def _read(path: Path, kind: type[_Record]) -> _Record:
    try:
        return kind.model_validate_json(_text(path))
    except ValidationError as err:
        raise RunDirError(f"{path} is not a {kind.__name__} record: {_first(err)}") from err


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise RunDirError(f"{path} cannot be read: {err}") from err


def _first(err: ValidationError) -> str:
    fault = err.errors()[0]
    return f"{'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg']}"

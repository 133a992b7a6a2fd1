"""Which node had which name in the runs before: `nodes.json` in `runs-dir`.

A SuperNode with a key keeps its number for good, so the number stands for the key. One without a
key has a new number after each start, and its name is then no more than its word.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from flwr.common.logger import LOGGER_NAME

from fedsplit.core.foreign import read_json

FILE = "nodes.json"
_log = logging.getLogger(LOGGER_NAME)


def read(runs: Path) -> dict[str, int]:
    """Name -> node; empty where nothing is known."""
    path = runs / FILE
    try:
        known = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as err:
        _log.warning("%s cannot be read and is left aside: %s", path, err)
        return {}
    if not isinstance(known, dict) or not all(type(node) is int for node in known.values()):
        _log.warning("%s does not hold names and numbers of nodes and is left aside", path)
        return {}
    return known


def write(runs: Path, found: Mapping[str, int]) -> None:
    """Keep what this run found beside what is known of others; a disk that does not take it ends no run."""
    part = runs / f"{FILE}.part"
    try:
        part.write_text(json.dumps(read(runs) | dict(found), indent=1), encoding="utf-8")
        # As private as the runs beside it, also where their folder is one that others read.
        part.chmod(0o600)
        part.replace(runs / FILE)
    except OSError as err:
        part.unlink(missing_ok=True)
        _log.warning("%s could not be written: %s", runs / FILE, err)

"""Several tasks in one run: who they are, where their samples come from, and which sites hold which.

Reads the settings `tasks` and `task-holders` and a site's own `tasks`.
"""

from __future__ import annotations

from fedsplit.core.class_names import normal
from fedsplit.core.errors import ConfigError
from fedsplit.core.names import MAX_TASK_CHARS, RULE, is_name, normalised

MAX_TASKS = 16
MAX_SITES = 100_000


def parse_tasks(text: str) -> dict[str, str]:
    """Read "NAME=SOURCE;NAME=SOURCE" as name -> source, in that order; "" is none. Raises ConfigError."""
    found = _named("tasks", text, "=", "digits=digits;shapes=npz:shapes.npz")
    if empty := [name for name, source in found.items() if not source]:
        raise ConfigError(
            f"tasks: {empty[0]} has no source; use e.g. {empty[0]}=folder:PATH, entries apart by semicolons"
        )
    return found


def parse_holders(text: str) -> dict[str, frozenset[int]]:
    """Read "NAME:0-3;NAME:2,5" as name -> numbers of the sites that hold it. Raises ConfigError."""
    found = _named("task-holders", text, ":", "digits:0-3;shapes:2,5")
    return {name: _numbers(name, value) for name, value in found.items()}


def parse_held(text: str) -> dict[str, str]:
    """Read a site's "NAME;NAME=SOURCE" as name -> its own source, "" where it has none. Raises ConfigError."""
    return _named("tasks", text, "=", "digits;shapes=folder:PATH")


def parse_classes(text: str) -> tuple[str, ...]:
    """Read "CLASS,CLASS" as names of classes, in NFC; "" is none."""
    return tuple(name for name in map(normal, text.split(",")) if name)


def _named(key: str, text: str, mark: str, example: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in text.split(";") if text.strip() else []:
        name, _, value = (p.strip() for p in part.partition(mark))
        name = normalised(name)
        if not is_name(name, MAX_TASK_CHARS):
            raise ConfigError(
                f"{key}: {name[:100]!r} is no name of a task (1 to {MAX_TASK_CHARS} {RULE}); use e.g. {example}"
            )
        # Each task has a folder of its own beside the run's files, and some disks know no capitals.
        if name.casefold().endswith(".json"):
            raise ConfigError(f"{key}: {name} would be the name of a file of the run; rename it")
        if name.casefold() in {other.casefold() for other in found}:
            raise ConfigError(f"{key}: {name} is there twice; give each task one entry")
        found[name] = value
    if len(found) > MAX_TASKS:
        raise ConfigError(f"{key} names {len(found)} tasks; at most {MAX_TASKS} go into one run")
    return found


def _numbers(name: str, text: str) -> frozenset[int]:
    numbers: set[int] = set()
    listed = 0
    for part in text.split(","):
        first, dash, last = (p.strip() for p in part.partition("-"))
        last = last if dash else first
        # Digits are counted because Python refuses to read numbers of thousands of them.
        if not all(p.isascii() and p.isdigit() and len(p) < 10 for p in (first, last)):
            raise ConfigError(
                f"task-holders: {part.strip()[:100]!r} of {name} are no sites; use numbers and ranges, e.g. "
                f"{name}:0-3,7"
            )
        if not int(first) <= int(last) < MAX_SITES:
            raise ConfigError(
                f"task-holders: {first}-{last} of {name} is no range of sites in 0..{MAX_SITES - 1}"
            )
        # A site reads this too, from the run: the same range a thousand times is work without end.
        listed += int(last) - int(first) + 1
        if listed > MAX_SITES:
            raise ConfigError(
                f"task-holders: {name} lists more than {MAX_SITES} sites; name each once"
            )
        numbers |= set(range(int(first), int(last) + 1))
    return frozenset(numbers)

"""Constraints that pin what pyproject.toml names directly to its lower bound.

    python scripts/lowest_versions.py > lowest.txt

Called by `make test-lowest`. torch is left out: its old releases have builds for few systems only.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "fedsplit"}


def lowest(pyproject: Path) -> list[str]:
    """One `name==version` for each direct dependency with a lower bound, extras included. Raises ValueError."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    pins: dict[str, str] = {}
    for text in [*project["dependencies"], *(line for extra in extras for line in extra)]:
        wanted = Requirement(text)
        bounds = [s.version for s in wanted.specifier if s.operator in {">=", "=="}]
        if wanted.name in LEFT_OUT:
            continue
        if not bounds:
            raise ValueError(f"{text!r} has no lower bound; give it the lowest version that works")
        pins[wanted.name] = bounds[0]
    return [f"{name}=={version}" for name, version in sorted(pins.items())]


if __name__ == "__main__":
    print("\n".join(lowest(Path(__file__).resolve().parent.parent / "pyproject.toml")))

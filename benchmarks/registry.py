"""The list of benchmarks: name, module, target. The one place where a target stands. Read by __main__.py.

Modules are imported when they run and not before: torch or grpc in this process must not weigh on another's numbers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.paired import Progress


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a ratio should be."""

    bound: float
    at_least: bool = True

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"

    def met(self, ratio: float) -> bool:
        """Is `ratio` on the right side of the bound, or on it?"""
        return ratio >= self.bound if self.at_least else ratio <= self.bound


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark: a module of this package with `run`."""

    name: str
    wanted: Target
    tells_progress: bool = True
    """Does `run` take `progress`?"""

    @property
    def module(self) -> str:
        """Its module, by the name's own letters."""
        return f"benchmarks.{self.name.replace('-', '_')}"

    def run(self, progress: Progress) -> dict[str, Any]:
        """Measure. Takes as long as it takes."""
        run: Callable[..., dict[str, Any]] = importlib.import_module(self.module).run
        return run(progress=progress) if self.tells_progress else run()


BENCHMARKS = (
    Benchmark(name="split-step", wanted=Target(bound=0.9)),
    Benchmark(name="device-rss", wanted=Target(bound=0.5, at_least=False)),
    Benchmark(name="rss-1000-sites", wanted=Target(bound=1.5, at_least=False)),
    Benchmark(name="stream-echo", wanted=Target(bound=0.7), tells_progress=False),
    Benchmark(
        name="wire-overhead", wanted=Target(bound=1.01, at_least=False), tells_progress=False
    ),
    Benchmark(name="through-proxy", wanted=Target(bound=0.5)),
    Benchmark(name="stream-vs-messages", wanted=Target(bound=100)),
    Benchmark(name="load-once", wanted=Target(bound=0.1, at_least=False)),
)

# Measurements that are no ratio and have a command of their own: not part of `make bench`.
APART = ("benchmarks.backbone_parts", "benchmarks.device_training")

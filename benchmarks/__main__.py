"""`python -m benchmarks [NAME ...]`: run benchmarks, write a JSON file each, show a table that hides no miss.

Exit code: 0 when all ran, met or not; 1 when one could not run. What is measured: the modules of registry.py.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.paired import ratio_spread
from benchmarks.registry import BENCHMARKS, Benchmark
from fedsplit.core.cpus import usable_cpus

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "grpcio", "flwr", "transformers", "numpy")

log = logging.getLogger("benchmarks")


def machine() -> dict[str, Any]:
    """What the numbers were taken on, and how busy it is now."""
    return {
        "cpu": _cpu_model(),
        "cores": usable_cpus(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "load_average": [round(load, 2) for load in os.getloadavg()]
        if hasattr(os, "getloadavg")
        else [],
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")


def _threads() -> str:
    # It changes what is measured, so it belongs to the command.
    threads = os.environ.get("OMP_NUM_THREADS")
    return f"OMP_NUM_THREADS={threads} " if threads else ""


def complete(
    benchmark: Benchmark, result: dict[str, Any], started: dict[str, Any]
) -> dict[str, Any]:
    """The result as it is written: with target, verdict, spread, machine and date."""
    core = ("name", "value", "unit", "compared_with", "ratio", "pairs")
    own = {key: value for key, value in result.items() if key not in core}
    return {
        "name": benchmark.name,
        **{key: result[key] for key in core[1:5]},
        "wanted": str(benchmark.wanted),
        "met": benchmark.wanted.met(result["ratio"]),
        **ratio_spread(result),
        "pairs": result["pairs"],
        **own,
        "machine": started | {"load_average_after": machine()["load_average"]},
        "command": f"{_threads()}python -m benchmarks {benchmark.name}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write(result: dict[str, Any], folder: Path) -> Path:
    """One JSON file, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['name']}.json"
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def table(results: list[dict[str, Any]], failed: dict[str, str]) -> Table:
    """One line a benchmark, misses and failures included."""
    shown = Table(title="fedsplit benchmarks: ratios of interleaved runs")
    shown.add_column("benchmark", no_wrap=True)
    for heading in ("value", "ratio (median)", "min .. max", "wanted", "met"):
        shown.add_column(heading)
    for r in results:
        shown.add_row(
            r["name"],
            f"{r['value']:.4g} {r['unit']}",
            f"{r['ratio']:.4g}",
            f"{r['min']:.4g} .. {r['max']:.4g}",
            r["wanted"],
            "[green]yes[/]" if r["met"] else "[bold red]MISSED[/]",
        )
    for name, reason in failed.items():
        shown.add_row(name, reason, "", "", "", "[bold red]FAILED[/]")
    return shown


def run_all(chosen: list[Benchmark], folder: Path, console: Console) -> bool:
    """Run, write, show. True when all of them ran."""
    results, failed = [], {}
    # No refreshing thread: it would take the interpreter from what is being measured.
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(*columns, console=console, auto_refresh=False) as bar:
        line = bar.add_task("", total=len(chosen))
        for benchmark in chosen:

            def tell(text: str, name: str = benchmark.name) -> None:
                if console.is_terminal:
                    bar.update(line, description=f"{name}: {text}", refresh=True)
                else:
                    console.print(f"{name}: {text}")

            tell("starts")
            started = machine()
            try:
                result = complete(benchmark, benchmark.run(tell), started)
                write(result, folder)
                results.append(result)
            except Exception as error:  # the others still run, and the table says it
                log.warning("%s failed", benchmark.name, exc_info=True)
                failed[benchmark.name] = f"{type(error).__name__}: {error}"
            bar.advance(line)
        bar.update(line, description="done", refresh=True)
    console.print(table(results, failed))
    return not failed


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    names = [b.name for b in BENCHMARKS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "names", metavar="NAME", nargs="*", help=f"default: all of {', '.join(names)}"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    args = parser.parse_args(argv)
    if unknown := [n for n in args.names if n not in names]:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(names)}")
    wanted = args.names or names
    chosen = [b for b in BENCHMARKS if b.name in wanted]
    return 0 if run_all(chosen, args.results, Console()) else 1


if __name__ == "__main__":
    sys.exit(main())

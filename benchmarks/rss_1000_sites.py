"""Does a simulation's memory grow with its sites? `python -m benchmarks rss-1000-sites`

The same images are dealt to 1,000 sites and to 10, and both train one LoRA module for as many rounds in the in-process
engine of `fedsplit experiment`: the real ServerApp, sites and encoder, all in one process. Half of the sites are split,
half run the whole model, so that encoder sessions and long updates both count. A measurement is a fresh process, and the
ratio is that of the peaks as they are, libraries included. What batches and pictures need is the same on both sides, so
`extra` also has the difference by site, which libraries do not hide.

`python -m benchmarks.rss_1000_sites --flower` measures the same run through Flower's own simulation (`fedsplit run`: Ray,
SuperLink, ServerApp, actors), summed over all its processes; a line of JSON, no part of `make bench`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.device_rss import MIB, peak_rss_mib
from benchmarks.paired import Progress, interleave, median, quiet, spread, with_ratio
from fedsplit.core.config import RunConfig
from fedsplit.core.errors import FederationError
from fedsplit.core.processes import ProcessTree
from fedsplit.core.programs import flower_environment
from fedsplit.experiment.bench import Bench
from fedsplit.experiment.cells import Cell

FEW, MANY = 10, 1000
SAMPLES = 4000
ROUNDS = 2
CUT = "1,5;6,6"
"""Of vit-glyphs' six blocks: a split and a whole device, in turn."""
_SIDE, _CLASSES = 8, 10
_LOOK_S = 0.25


@dataclass(frozen=True)
class Job:
    """What the process of one measurement needs to know."""

    sites: int
    data: Path
    runs: Path
    rounds: int
    threads: int


@contextmanager
def images(samples: int) -> Iterator[Path]:
    """A folder with an npz of small grey images, the same each time: a class is a bright cell, the rest is noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(samples) % _CLASSES
    pixels = rng.integers(0, 120, (samples, _SIDE, _SIDE, 1), dtype=np.uint8)
    pixels[np.arange(samples), labels // _SIDE, labels % _SIDE] = 255
    with tempfile.TemporaryDirectory(prefix="fedsplit-rss-") as folder:
        np.savez(Path(folder) / "images.npz", x=pixels, y=labels)
        yield Path(folder)


def settings(job: Job) -> dict[str, Any]:
    """The run's settings, as `--set` takes them."""
    return {
        "task": "rss",
        "data": f"npz:{job.data}",
        "sites": job.sites,
        "cut": CUT,
        "device-training": "head+tail",
        "partition": "iid",
        "classifier-init": "zero",
        "test-fraction": 0.25,
        # A site of 1,000 has three samples to train on: with larger batches the few sites' steps would cost more.
        "batch-size": 4,
        "rounds": job.rounds,
        "deadline-s": 1e6,
        "runs-dir": str(job.runs),
        "run-name": f"sites-{job.sites}",
    }


def work(job: Job, pipe: Connection) -> None:
    """The process of one measurement: run, then tell its peak in MiB, or why there is none."""
    torch.set_num_threads(job.threads)
    config = RunConfig.from_flat(settings(job))
    cell = Cell(method=config.run.method, problem="", axes=(), seed=0, config=config)
    # No memo: it keeps answers of the encoder for other runs, and there are none.
    row = Bench(memo_bytes=0).run(cell)
    complete = row.outcome == "complete"
    pipe.send(peak_rss_mib() if complete else row.reason or row.outcome)


def measure(job: Job) -> float:
    """The peak of a fresh process in MiB. Raises FederationError when its run was not complete."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe(duplex=False)
    process = spawn.Process(target=work, args=(job, there))
    process.start()
    there.close()
    try:
        told = here.recv()
    finally:
        here.close()
        process.join()
    if isinstance(told, str):
        raise FederationError(f"the run with {job.sites} sites did not end well: {told}")
    return float(told)


def run(
    *,
    repetitions: int = 3,
    few: int = FEW,
    many: int = MANY,
    samples: int = SAMPLES,
    rounds: int = ROUNDS,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """`ratio` is the median of the peak with `many` sites over the peak with `few`."""
    threads = torch.get_num_threads()
    names = {f"{few} sites": few, f"{many} sites": many}
    with images(samples) as folder:
        jobs = {
            name: partial(
                measure, Job(sites, folder / "images.npz", folder / "runs", rounds, threads)
            )
            for name, sites in names.items()
        }
        measured = interleave(jobs, rounds=repetitions, warmup=0, progress=progress)
    less, more = names
    pairs = with_ratio(measured, more, less)
    return {
        "name": "rss-1000-sites",
        "value": median(pairs, more),
        "unit": f"MiB at the peak, simulation of {many} sites",
        "compared_with": f"the same simulation, its images dealt to {few} sites",
        "ratio": median(pairs, "ratio"),
        "pairs": pairs,
        "what": (
            f"vit-glyphs, LoRA, cuts {CUT}, {samples} images, {rounds} rounds, batch 4, in one process, "
            f"{threads} threads"
        ),
        "extra": {
            "peak_mib": {name: spread(one[name] for one in measured) for name in names},
            "kib_a_site": spread(1024 * (one[more] - one[less]) / (many - few) for one in measured),
        },
    }


def flower_peak_mib(job: Job) -> float:
    """The largest sum of resident memory over all processes of `fedsplit run`, looked at a few times a second.

    Pages that processes share count for each of them. Raises FederationError when the run was not complete.
    """
    pairs = [f"{key}={value}" for key, value in settings(job).items()]
    words = [word for pair in pairs for word in ("--set", pair)]
    job.runs.mkdir(parents=True, exist_ok=True)
    tree, peak = ProcessTree(), 0
    with (job.runs / f"sites-{job.sites}.log").open("w+b") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedsplit.cli.main", "run", "--json", *words],
            env=flower_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        tree.adopt(process.pid)
        try:
            while process.poll() is None:
                tree.refresh()
                peak = max(peak, sum(map(_resident, tree.running())))
                time.sleep(_LOOK_S)
        finally:
            tree.end()
        if process.returncode:
            log.seek(0)
            said = log.read().decode(errors="replace")[-1000:]
            raise FederationError(f"fedsplit run ended with {process.returncode}: {said}")
    return peak / MIB


def _resident(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def main() -> int:
    """The second number: one pair through Flower's simulation, as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rss_1000_sites", description="Peak memory by number of sites."
    )
    parser.add_argument("--flower", action="store_true", required=True, help="through Flower (Ray)")
    parser.add_argument("--sites", type=int, nargs=2, default=(FEW, MANY), metavar=("FEW", "MANY"))
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    with images(given.samples) as folder:
        few, many = (
            flower_peak_mib(Job(sites, folder / "images.npz", folder / "runs", given.rounds, 0))
            for sites in given.sites
        )
    print(json.dumps({"sites": given.sites, "peak_mib": [few, many], "ratio": many / few}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

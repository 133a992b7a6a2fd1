"""Why activations do not travel in Flower messages: exchanges a second either way. `python -m benchmarks stream-vs-messages`

The exchange: an array of 100 KiB to each of two sites or from it, and one of the same size back, both sites at once. Once as
steps over our stream (two streams to an encoder that gives back what it gets, in a process of its own), once as Flower
messages in a real deployment on loopback (SuperLink, two SuperNodes, one app process a message, as Flower does it). Between
two rounds of messages our stream is measured, so each pair is of the same minute.

Counted is the round trip alone: Flower's round does not include the start of the run, ours does not include the HELLO.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from benchmarks.echo_app import write_app
from benchmarks.flower_deployment import Deployment, deployment
from benchmarks.paired import Progress, interleave, median, quiet, with_ratio
from benchmarks.stream_echo import KEY, grant, serve
from fedsplit.core.errors import FederationError
from fedsplit.transport.client import StreamEncoder
from fedsplit.transport.tokens import sign

SHAPE = (1, 128, 192)  # with the echo host's width; 98,304 bytes
SITES = 2
_ROUND_S = 180.0


@contextmanager
def stream_rate(steps: int) -> Iterator[Callable[[], float]]:
    """Gives a measure: exchanges a second of all sites together, `steps` a site."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=serve, args=(there,))
    process.start()
    there.close()
    try:
        _, address = here.recv()
        with ExitStack() as stack:
            streams = [stack.enter_context(_dial(address, n)) for n in range(SITES)]
            pool = stack.enter_context(ThreadPoolExecutor(SITES))
            yield lambda: _exchanges(streams, pool, steps)
        here.send("stop")
    finally:
        here.close()
        process.join(20)
        if process.is_alive():
            process.kill()
            process.join()


def _dial(address: str, number: int) -> StreamEncoder:
    site = grant().model_copy(update={"site": f"site-{number}"})
    return StreamEncoder(address, sign(site, KEY, 3600), site)


def _exchanges(streams: list[StreamEncoder], pool: ThreadPoolExecutor, steps: int) -> float:
    h_BTD = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)

    def site(stream: StreamEncoder) -> None:
        for step in range(steps):
            z_BTD = stream.encode(step, h_BTD)
        assert np.array_equal(z_BTD, h_BTD)

    started = time.perf_counter()
    list(pool.map(site, streams))
    return steps * len(streams) / (time.perf_counter() - started)


class Messages:
    """Rounds of Flower messages, one at a time, by a ServerApp that waits for our word."""

    def __init__(self, flower: Deployment, rounds: int) -> None:
        self._flower = flower
        self._folder = flower.home / "rounds"
        self._folder.mkdir()
        app = flower.home / "app"
        write_app(app, folder=self._folder, nodes=SITES, rounds=rounds, shape=SHAPE)
        config = flower.home / "run.toml"
        config.write_text("", encoding="utf-8")
        self._run_id = flower.commands.start(app, config)
        self._number = 0

    def rate(self) -> float:
        """Exchanges a second in the next round. Raises FederationError when it does not come about."""
        number, self._number = self._number, self._number + 1
        (self._folder / f"go-{number}").touch()
        done = self._folder / f"done-{number}"
        deadline = time.monotonic() + _ROUND_S
        while not done.exists():
            self._flower.tree.refresh()
            if time.monotonic() > deadline:
                log = self._flower.commands.log(self._run_id)
                raise FederationError(f"round {number} of messages did not end:\n{log[-2000:]}")
            time.sleep(0.2)
        return SITES / float(done.read_text(encoding="utf-8"))


def run(*, pairs: int = 8, steps: int = 300, progress: Progress = quiet) -> dict[str, Any]:
    """`ratio` is the median of stream/messages; `pairs` messages a node, and one before them that is dropped."""
    progress("starting Flower")
    with stream_rate(steps) as rate, deployment(SITES) as flower:
        messages = Messages(flower, pairs + 1)
        rounds = interleave(
            {"stream": rate, "messages": messages.rate}, rounds=pairs, progress=progress
        )
    results = with_ratio(rounds, "stream", "messages")
    return {
        "name": "stream-vs-messages",
        "value": median(rounds, "stream"),
        "unit": f"exchanges/s of {int(np.prod(SHAPE)) * 4} bytes each way, {SITES} sites",
        "compared_with": "the same arrays in Flower messages through a SuperLink, polled every 0.2 s",
        "ratio": median(results, "ratio"),
        "pairs": results,
        "seconds_a_message_round": SITES / median(rounds, "messages"),
    }

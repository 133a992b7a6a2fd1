"""A site's process neither grows from round to round nor from run to run.

The orders of a real run are given again and again to one runtime, each as another round's, with another module's version,
and with every few of them as another run's. The encoder lives on in this process too.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from flwr.app import Context, Message, RecordDict

from fedsplit.core.config import RunConfig
from fedsplit.core.orders import Order
from fedsplit.federation import messages
from fedsplit.federation.engine.in_process import InProcessGrid
from fedsplit.federation.server.endpoint import Endpoint
from fedsplit.federation.server.run import Run
from fedsplit.federation.site import answer
from fedsplit.site.runtime import SiteRuntime
from fedsplit.trunk.process import hosting

ROUNDS = int(os.environ.get("FEDSPLIT_SOAK_ROUNDS", "50"))
"""Of the test; thousands for a night."""
MOST_GROWTH = 1.02


@contextmanager
def soaked(folder: Path, **flat: object) -> Iterator[Callable[[int], None]]:
    """Gives a call that does one more order: the roll call where it is a run's first, else a round."""
    config = RunConfig.from_flat(
        {
            "run-name": "soak", "runs-dir": str(folder / "runs"), "rounds": 1, "sites": 1, "min-sites": 1,
            "max-samples": 30, "classifier-init": "zero", "deadline-s": 600.0,
        } | flat
    )  # fmt: skip
    node = {"site": "line-a", "data": "digits", "state-dir": str(folder / "state")}
    seen: list[tuple[Message, Context]] = []
    first, runtime, rounds = SiteRuntime(), SiteRuntime(), itertools.count(1)

    def watched(message: Message, context: Context) -> Message:
        seen.append((message, context))
        return answer(message, context, first)

    with hosting(config, None) as (server, host, key), InProcessGrid([node], watched) as grid:
        at = Endpoint(
            server.address, key, tls=False, ca_file="", publish=host.publish, collect=host.collect
        )
        Run(grid, config, at, simulated=False).go()
        call, train = seen[0], next(s for s in seen if s[0].metadata.message_type == "train")

        def one_more(run: int) -> None:
            number = next(rounds)
            message, context = call if run not in asked else train
            asked.add(run)
            order = messages.read(message.content, messages.ORDER, Order)
            stream = order.stream and at.stream_for(order.stream.grant, deadline_s=600)
            order = order.model_copy(
                update={"round": number, "encoder_digest": f"version {number}", "stream": stream}
                if order.kind == "train"
                else {}
            )
            content = RecordDict({k: v for k, v in message.content.items() if k != messages.ORDER})
            content.update(messages.write(messages.ORDER, order))
            again = Message(
                content, message.metadata.dst_node_id, message.metadata.message_type, ttl=600
            )
            again.metadata.created_at = time.time()
            in_run = Context(
                run_id=run, node_id=context.node_id, node_config=context.node_config,
                state=RecordDict(), run_config={},
            )  # fmt: skip
            reply = answer(again, in_run, runtime)
            assert messages.fault_of(reply) is None, messages.fault_of(reply)

        asked: set[int] = set()
        yield one_more


def rss() -> int:
    return int(psutil.Process().memory_info().rss)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flat",
    [
        {"cut": "1,6", "device-training": "tail", "cache-activations": True},
        {"cut": "6,6", "personalisation": "ditto"},
    ],
    ids=lambda flat: str(flat["cut"]),
)
def test_memory_is_flat_from_round_10_on(flat: dict[str, object], tmp_path: Path) -> None:
    with soaked(tmp_path, **flat) as one_more:
        for _ in range(10):
            one_more(1)
        before = rss()
        for _ in range(ROUNDS - 10):
            one_more(1)
        assert rss() < MOST_GROWTH * before


@pytest.mark.slow
def test_memory_is_flat_from_run_to_run(tmp_path: Path) -> None:
    with soaked(tmp_path, cut="1,6") as one_more:
        for run, _ in itertools.product(range(1, 6), range(2)):
            one_more(run)
        before = rss()
        for run, _ in itertools.product(range(6, 16), range(2)):
            one_more(run)
        assert rss() < MOST_GROWTH * before

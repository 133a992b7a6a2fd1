"""A small federation: the bundled backbone, a few digits, sites in this process, a real encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsplit.core.config import RunConfig
from fedsplit.federation.server.endpoint import Endpoint
from fedsplit.federation.server.run import Run
from fedsplit.trunk.process import hosting
from tests.federation.grid import InProcessGrid

Federate = Callable[..., Run]


def settings(runs: Path, **other: Any) -> RunConfig:
    flat = {
        "max-samples": 160,
        "rounds": 2,
        "cut": "0,6;1,5",
        "runs-dir": str(runs),
        "run-name": "run",
        "registry": "none",
        "partition": "iid",
        "deadline-s": 60.0,
    }
    if other.get("method") != "closed-form":
        flat["classifier-init"] = "zero"  # so that two rounds have something to learn
    return RunConfig.from_flat(flat | {k.replace("_", "-"): v for k, v in other.items()})


def simulated(sites: int) -> list[dict[str, Any]]:
    return [{"partition-id": i, "num-partitions": sites} for i in range(sites)]


@contextmanager
def prepared(
    config: RunConfig, nodes: list[dict[str, Any]], *, in_simulation: bool = True, **grid: Any
) -> Iterator[tuple[Run, InProcessGrid]]:
    """A run that is ready to go, with its encoder up."""
    with hosting(config, None) as (server, host, key):
        endpoint = Endpoint(
            server.address, key, tls=False, ca_file="", publish=host.publish, collect=host.collect
        )
        net = InProcessGrid(nodes, **grid)
        try:
            yield Run(net, config, endpoint, simulated=in_simulation), net
        finally:
            net.close()
            assert server.stats().live_sessions == 0

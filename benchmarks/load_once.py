"""What a resident runtime saves: a message until its first step, and what it costs beyond its steps. `python -m benchmarks load-once`

One run of a site with the bundled backbone, all blocks on the server. Each of its messages goes to two SuperNodes, one
straight after the other: one has a resident runtime (fedsplit/plant/site/runtime.py), the other starts a process a
message, as Flower's own executor does, from the same bundle. Both must answer the same, bit for bit.

From the moment that a SuperNode has the message until the encoder has the first batch. What comes before it, the SuperNode's
own looks at the SuperLink every 3 s, is alike on both sides and left out.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.cli.build import build_fab_from_disk

from benchmarks.paired import Progress, Round, median, quiet, with_ratio
from benchmarks.supernode import SECRET, SuperNode, supernode
from fedsplit import __version__
from fedsplit.cli.appdir import find_app
from fedsplit.core.config import RunConfig
from fedsplit.core.errors import FederationError
from fedsplit.core.orders import Answer
from fedsplit.core.processes import ProcessTree
from fedsplit.core.programs import flower_environment, program
from fedsplit.federation import messages
from fedsplit.federation.engine.in_process import InProcessGrid
from fedsplit.federation.server.endpoint import Endpoint
from fedsplit.federation.server.run import Run
from fedsplit.trunk.host import BackboneHost
from fedsplit.trunk.process import hosting

_REPLY_S = 300.0
SIDES = ("resident", "process")


class FirstStep:
    """When a host's encoder was last given the first batch of a session."""

    def __init__(self, host: BackboneHost) -> None:
        self.at = 0.0
        self._open = host.open
        host.open = self._opened  # type: ignore[method-assign]

    def _opened(self, grant: Any) -> Any:
        encoder = self._open(grant)
        encode = encoder.encode

        def first(*args: Any, **other: Any) -> Any:
            self.at = time.perf_counter()
            encoder.encode = encode  # type: ignore[method-assign]
            return encode(*args, **other)

        encoder.encode = first  # type: ignore[method-assign]
        return encoder


class Sides:
    """Two SuperNodes that answer the same messages; what each message took."""

    def __init__(self, nodes: dict[str, SuperNode], first: FirstStep, progress: Progress) -> None:
        self._nodes, self._first, self._progress = nodes, first, progress
        self.to_step: list[Round] = []
        self.beyond: list[Round] = []

    def __call__(self, message: Message, _context: Context) -> Message:
        """The resident's reply."""
        own = message.metadata.message_id
        trains = message.metadata.message_type == "train"
        self._progress(f"{message.metadata.message_type} {len(self.to_step)}")
        replies, to_step, beyond = {}, {}, {}
        # The order turns round each time, so that a drift of the machine favours nobody.
        for side in SIDES if len(self.to_step) % 2 else reversed(SIDES):
            began = time.perf_counter()
            self._nodes[side].give(message)
            reply = replies[side] = self._nodes[side].reply(_REPLY_S)
            took = time.perf_counter() - began
            reply.metadata.__dict__["_reply_to_message_id"] = own
            if (fault := messages.fault_of(reply)) is not None:
                raise FederationError(f"{side}: {fault.kind}: {fault.message}")
            if trains:
                metrics = messages.answer_of(reply, Answer).metrics
                to_step[side] = self._first.at - began
                beyond[side] = took - metrics.seconds_device - metrics.seconds_wait
        if trains:
            _same(*(replies[side] for side in SIDES))
            self.to_step.append(to_step)
            self.beyond.append(beyond)
        return replies["resident"]


def _same(one: Message, other: Message) -> None:
    ours, theirs = one.content.array_records, other.content.array_records
    equal = ours.keys() == theirs.keys() and all(
        np.array_equal(ours[group][name].numpy(), theirs[group][name].numpy())
        for group in ours
        for name in ours[group]
    )
    if not equal:
        raise FederationError(
            "a resident runtime and a process a message have not trained the same"
        )


@contextmanager
def _started(command: list[str], env: dict[str, str], home: Path, name: str) -> Iterator[None]:
    tree = ProcessTree()
    with (home / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=env, cwd=home, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )  # fmt: skip
    tree.adopt(process.pid)
    try:
        yield
    finally:
        tree.end()
        process.wait(20)


@contextmanager
def _sides(home: Path, first: FirstStep, progress: Progress) -> Iterator[Sides]:
    env = flower_environment(home)
    staged = home / "app"
    bundle = build_fab_from_disk(find_app(None).stage(staged))
    of_app: dict[str, Any] = {"app": ("fedsplit/fedsplit", __version__), "bundle": bundle}
    site = {"site": "line", "data": "digits", "threads": max(1, (os.cpu_count() or 2) // 2)}
    secret = home / "secret"
    secret.write_bytes(SECRET)
    with (
        supernode(site | {"state-dir": str(home / "resident")}, **of_app) as resident,
        supernode(site | {"state-dir": str(home / "process")}, secret=None, **of_app) as process,
        _started(
            [program("fedsplit", env), "site", "executor", "--supernode", resident.address,
             "--secret-file", str(secret)], env, home, "resident",
        ),
        _started(
            [program("flower-superexec", env), "--insecure", "--runtime-api-address", process.address],
            env, home, "process",
        ),
    ):  # fmt: skip
        yield Sides({"resident": resident, "process": process}, first, progress)


def run(*, pairs: int = 6, samples: int = 128, progress: Progress = quiet) -> dict[str, Any]:
    """`ratio` is the median of resident/process; `pairs` messages, and one before them that is dropped."""
    with tempfile.TemporaryDirectory(prefix="fedsplit-load-once-") as folder:
        home = Path(folder)
        flat = {
            "rounds": pairs + 1, "cut": "0,6", "max-samples": samples, "classifier-init": "zero",
            "runs-dir": str(home / "runs"), "run-name": "load-once", "min-sites": 1,
        }  # fmt: skip
        config = RunConfig.from_flat(flat)
        with hosting(config, None) as (server, host, key):
            endpoint = Endpoint(
                server.address,
                key,
                tls=False,
                ca_file="",
                publish=host.publish,
                collect=host.collect,
            )
            with (
                _sides(home, FirstStep(host), progress) as sides,
                InProcessGrid([{}], sides) as grid,
            ):
                summary = Run(grid, config, endpoint, simulated=False).go()
    if summary.outcome != "complete":
        raise FederationError(f"the run was not complete: {summary.reason}")
    results = with_ratio(sides.to_step[1:], "resident", "process")
    return {
        "name": "load-once",
        "value": median(results, "resident"),
        "unit": "s from the message to the first step",
        "compared_with": "a process a message, as Flower's own executor starts it",
        "ratio": median(results, "ratio"),
        "pairs": results,
        "seconds_beyond_the_steps": {s: median(sides.beyond[1:], s) for s in SIDES},
        "backbone_loads": {"resident": summary.sites[0].backbone_loads, "process": pairs + 2},
        "modules": "equal bit for bit",
    }

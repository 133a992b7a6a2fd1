"""One run of a grid in this process: `server.Run` over the in-process grid. Keeps backbones and answers for the next.

A process has one Bench (schedule.py's workers each have their own).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsplit.core.errors import FedsplitError
from fedsplit.experiment.cells import Cell
from fedsplit.experiment.memo import MEMO_BYTES, Memo
from fedsplit.experiment.near_encoder import NearHost
from fedsplit.experiment.results import Row, failed_row, folder_of, mark, row_of
from fedsplit.federation.engine.in_process import InProcessGrid
from fedsplit.federation.engine.in_step import InStep
from fedsplit.federation.server.endpoint import Endpoint
from fedsplit.federation.server.run import Run
from fedsplit.federation.site import answer
from fedsplit.model.backbone import Backbone
from fedsplit.site.kept import Kept
from fedsplit.site.runtime import SiteRuntime
from fedsplit.training.dial import Dial, dial_stream
from fedsplit.trunk.host import BackboneHost
from fedsplit.trunk.process import hosting

# Weights of the backbones that are kept for the next runs.
_MAX_HOSTS = 2


class Bench:
    """Does runs one after the other."""

    def __init__(self, *, memo_bytes: int = MEMO_BYTES) -> None:
        """`memo_bytes`: what answers of frozen blocks may take."""
        self.memo = Memo(memo_bytes)
        self._kept = Kept()
        self._hosts: OrderedDict[str, NearHost] = OrderedDict()
        # Flower's log tells each run's start and its whole summary.
        logging.getLogger("flwr").setLevel(logging.WARNING)

    def run(self, cell: Cell) -> Row:
        """Do a run from the start and return its row; a run that fails is a row with its reason."""
        folder = folder_of(cell)
        # What an interrupted or an older run left would be in the way.
        shutil.rmtree(folder, ignore_errors=True)
        _forget_peak_rss()
        try:
            mark(cell)
            in_step = InStep[Any]() if cell.way.by_turns else None
            with self._encoder(cell, in_step) as (endpoint, dial):
                site = functools.partial(answer, runtime=SiteRuntime(dial, self._kept))
                workers = cell.way.sites_at_once
                with InProcessGrid(
                    cell.nodes, site, workers=workers, torch_threads=1, in_step=in_step
                ) as grid:
                    Run(grid, cell.config, endpoint, simulated=True).go()
            return row_of(cell)
        except FedsplitError as err:
            with contextlib.suppress(FedsplitError):
                return row_of(cell).model_copy(update={"outcome": "failed", "reason": str(err)})
            return failed_row(cell, str(err))
        except Exception as err:
            logging.getLogger(__name__).exception("%s", cell)
            return failed_row(cell, f"internal error: {type(err).__name__}: {str(err)[:500]}")

    @contextmanager
    def _encoder(self, cell: Cell, in_step: InStep[Any] | None) -> Iterator[tuple[Endpoint, Dial]]:
        if cell.way.wire == "grpc":
            with hosting(cell.config, None) as (server, host, key):
                yield _endpoint(server.address, key, host), dial_stream
            return
        near = self._host(cell.config.placement.backbone)
        dial = (
            functools.partial(near.dial, after_step=in_step.pause)
            if in_step is not None
            else near.dial
        )
        yield _endpoint("in this process", secrets.token_bytes(32), near), dial

    def _host(self, name: str) -> NearHost:
        """The backbone's host, read from disk if no run before had it."""
        if name not in self._hosts:
            while len(self._hosts) >= _MAX_HOSTS:
                self._hosts.popitem(last=False)
            self._hosts[name] = NearHost(BackboneHost(Backbone.find(name)), self.memo)
        self._hosts.move_to_end(name)
        return self._hosts[name]


def _endpoint(address: str, key: bytes, host: NearHost | BackboneHost) -> Endpoint:
    return Endpoint(address, key, tls=False, ca_file="", publish=host.publish, collect=host.collect)


def _forget_peak_rss() -> None:
    """Let the kernel measure the process's peak memory anew, where it can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

"""The Flower ServerApp: the encoder lives as long as the app (its lifespan), the run is federation/server/run.py's.

Several tasks at once are federation/server/task_runs.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsplit.core.config import RunConfig
from fedsplit.core.extras import check_extra
from fedsplit.federation.server.books.tracker import check_tracker
from fedsplit.federation.server.endpoint import Endpoint, external, hosted
from fedsplit.federation.server.run import Run, settle, simulated
from fedsplit.federation.server.task_runs import TaskRuns
from fedsplit.model.threads import limit_threads
from fedsplit.transport.keys import read_key
from fedsplit.trunk.process import hosting

app = ServerApp()
# Flower hands the lifespan and main the same context, but nothing from the one to the other.
_open: dict[int, tuple[RunConfig, Endpoint]] = {}


@app.lifespan()
def lifespan(context: Context) -> Iterator[None]:
    """Host the encoder while the app runs, unless the settings name one elsewhere."""
    check_extra("server", "drawing a run's plots", "matplotlib")
    config = settle(RunConfig.from_flat(context.run_config))
    check_tracker(config)
    limit_threads()
    with _endpoint(config) as endpoint:
        _open[context.run_id] = config, endpoint
        try:
            yield
        finally:
            del _open[context.run_id]


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train from roll call to summary, then draw the plots."""
    config, endpoint = _open[context.run_id]
    kind = TaskRuns if config.task.tasks else Run
    run = kind(grid, config, endpoint, simulated=simulated(grid))
    try:
        with run.dir.sole_writer():
            run.go()
    finally:
        from fedsplit.report.plots import write_plots

        # One task that failed costs the others nothing, not even their plots.
        for folder in run.finished:
            write_plots(folder)


@contextmanager
def _endpoint(config: RunConfig) -> Iterator[Endpoint]:
    if config.link.encoder_address and not config.link.encoder_bind:
        yield external(config)
        return
    secret = Path(config.link.encoder_secret_file)
    key = read_key(secret) if config.link.encoder_secret_file else None
    with hosting(config, key) as (server, host, key):
        yield hosted(
            config, address=server.address, key=key, publish=host.publish, collect=host.collect
        )

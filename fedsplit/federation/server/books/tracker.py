"""A run's metrics in a tracker that people have already: TensorBoard, MLflow or Weights & Biases (setting `tracker`).

It is fed from metrics.jsonl and summary.json, which are always written, and says nothing that does not stand there. A
tracker that fails costs the run nothing: it is told once, and the files are whole. Nothing leaves the machine unless the
tracker's own environment variables say so (docs/how-to/track-runs.md).
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fedsplit.core.config import RunConfig
from fedsplit.core.errors import FedsplitError
from fedsplit.core.extras import check_extra
from fedsplit.core.foreign import printable
from fedsplit.core.records import RoundMetrics, Summary
from fedsplit.core.scores import Scoring, added
from fedsplit.federation.server.books.run_dir import RunDir

_log = logging.getLogger("flwr")

Values = dict[str, float]
"""Name of a curve, such as `accuracy` or `line-a/loss` -> its value in a round."""


class _Sink(Protocol):
    """One run in a tracker."""

    def settings(self, settings: Mapping[str, str | int | float | bool]) -> None: ...

    def values(self, values: Values, round_: int) -> None: ...

    def close(self) -> None: ...


def check_tracker(config: RunConfig) -> None:
    """See that the tracker is installed, before the run starts. Raises ConfigError."""
    name = config.run.tracker
    if name != "none":
        check_extra(name, f"tracker={name}", name)


class Tracker:
    """Follows one run's folder; call `follow` after each round."""

    def __init__(self, config: RunConfig, run_dir: RunDir, scoring: Scoring) -> None:
        self._config, self._dir, self._scoring = config, run_dir, scoring
        self._sink: _Sink | None = None
        self._next = 1
        self.fault = ""
        """Why it stopped, in words; empty as long as it works."""

    def follow(self, metrics: list[RoundMetrics], *, last: bool = False) -> None:
        """Send the rounds that are over: all but the newest, which sites may still be at, unless it is the `last`."""
        if self._config.run.tracker == "none" or self.fault:
            return
        rounds: dict[int, list[RoundMetrics]] = defaultdict(list)
        for line in metrics:
            rounds[line.round].append(line)
        newest = max(rounds, default=0)
        with self._guarded():
            for round_ in sorted(r for r in rounds if r >= self._next and (last or r < newest)):
                self._open(round_).values(self._values(rounds[round_]), round_)
                self._next = round_ + 1

    def finish(self, summary: Summary) -> None:
        """Send how the run ended, and close."""
        if self._config.run.tracker == "none":
            return
        with self._guarded():
            if not self.fault:
                sink = self._open(max(summary.rounds_done, 1))
                sink.values({"wall_s": summary.wall_s}, summary.rounds_done + 1)
        with self._guarded():
            if self._sink is not None:
                self._sink.close()
                self._sink = None

    def _open(self, round_: int) -> _Sink:
        if self._sink is None:
            subject = _Subject(self._dir, self._config, round_)
            self._sink = _SINKS[self._config.run.tracker](subject)
            self._sink.settings(self._config.flat())
        return self._sink

    def _values(self, lines: list[RoundMetrics]) -> Values:
        found: Values = dict(self._scoring.scores(added(line.tested for line in lines)) or {})
        for line in lines:
            found |= {f"{line.site}/{n}": v for n, v in self._of_site(line).items()}
        return found

    def _of_site(self, line: RoundMetrics) -> Values:
        values = dict(self._scoring.scores(line.tested) or {})
        if line.loss is not None:
            values["loss"] = line.loss
        return values | {
            "bytes_up": float(line.bytes_activation_up + line.bytes_module_up),
            "bytes_down": float(line.bytes_activation_down + line.bytes_module_down),
            "seconds_device": line.seconds_device,
            "seconds_wait": line.seconds_wait,
        }

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as err:  # noqa: BLE001 - a tracker's own code may raise anything, and the run goes on
            why = str(err) if isinstance(err, FedsplitError) else f"{type(err).__name__}: {err}"
            self.fault = (
                f"tracker={self._config.run.tracker} stopped ({printable(why, limit=300)}); all metrics are in the run's "
                f"metrics.jsonl"
            )
            _log.warning("%s", self.fault)


@dataclass(frozen=True)
class _Subject:
    """What is tracked, from its round `first` on."""

    dir: RunDir
    config: RunConfig
    first: int

    @property
    def runs(self) -> Path:
        """The folder of all runs."""
        return Path(self.config.run.runs_dir).expanduser().absolute()


class _TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir RUNS_DIR` shows all runs."""

    def __init__(self, of: _Subject) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run does rounds again: their old points are passed over.
        self._writer = SummaryWriter(str(of.dir.path / "tensorboard"), purge_step=of.first)

    def settings(self, settings: Mapping[str, str | int | float | bool]) -> None:
        rows = "".join(f"| {name} | {value} |\n" for name, value in settings.items())
        self._writer.add_text("settings", f"| key | value |\n|---|---|\n{rows}")

    def values(self, values: Values, round_: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, round_)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _MLflow:
    """A run in the experiment of the task's name: at MLFLOW_TRACKING_URI, else in `mlflow.db` beside the runs."""

    def __init__(self, of: _Subject) -> None:
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{of.runs / 'mlflow.db'}"
        self._client: Any = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(of.config.task.name)
        experiment = (
            found.experiment_id if found else self._client.create_experiment(of.config.task.name)
        )
        # A run that goes on is the same one there.
        filter_ = f"tags.fedsplit_run = '{of.dir.key}'"
        earlier = self._client.search_runs([experiment], filter_string=filter_, max_results=1)
        self._run = (
            earlier[0]
            if earlier
            else self._client.create_run(
                experiment, run_name=of.dir.label, tags={"fedsplit_run": of.dir.key}
            )
        )

    def settings(self, settings: Mapping[str, str | int | float | bool]) -> None:
        have = self._run.data.params
        for name, value in settings.items():
            if name not in have and str(value):
                self._client.log_param(self._run.info.run_id, name, str(value)[:500])

    def values(self, values: Values, round_: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run.info.run_id, _plain(name), value, step=round_)

    def close(self) -> None:
        self._client.set_terminated(self._run.info.run_id)


class _Wandb:
    """A run in the project of the task's name; in files alone unless WANDB_MODE says otherwise."""

    def __init__(self, of: _Subject) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=of.config.task.name,
            name=of.dir.label,
            id=of.dir.key,
            resume="allow",
            # Tasks of one run are runs of their own, at one time.
            reinit="create_new",
            dir=str(of.runs),
            mode=None if "WANDB_MODE" in os.environ else "offline",
        )

    def settings(self, settings: Mapping[str, str | int | float | bool]) -> None:
        self._run.config.update(dict(settings), allow_val_change=True)

    def values(self, values: Values, round_: int) -> None:
        self._run.log(dict(values), step=round_)

    def close(self) -> None:
        self._run.finish()


def _plain(name: str) -> str:
    """A name as MLflow takes it: ASCII letters and digits, - _ . / and spaces."""
    return "".join(
        c if c.isascii() and (c.isalnum() or c in "-_./ ") else f"u{ord(c):x}" for c in name
    )


_SINKS: dict[str, Any] = {"tensorboard": _TensorBoard, "mlflow": _MLflow, "wandb": _Wandb}

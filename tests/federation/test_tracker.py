"""A run's metrics in a tracker: the numbers of its files, whichever tracker it is, and never a run that fails for it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from fedsplit.core.errors import ConfigError
from fedsplit.core.records import Summary
from fedsplit.federation.server.books.tracker import check_tracker
from fedsplit.federation.server.run import Run
from tests.federation.conftest import prepared, settings, simulated


def tracked(tmp_path: Path, **changes: Any) -> tuple[Run, Summary]:
    config = settings(tmp_path, rounds=2, max_samples=80, **changes)
    with prepared(config, simulated(2)) as (run, _):
        return run, run.go()


def wanted(run: Run, summary: Summary) -> dict[str, list[tuple[int, float]]]:
    """Curve -> its points, from the run's own files."""
    lines = [m for m in run.dir.read_metrics() if m.site == "site-0" and m.round > 0]
    curve = enumerate(summary.accuracy_by_round, start=1)
    return {
        "accuracy": [(r, pytest.approx(value)) for r, value in curve],
        "site-0/loss": [(m.round, pytest.approx(m.loss)) for m in lines if m.loss is not None],
        "site-0/bytes_up": [(m.round, m.bytes_activation_up + m.bytes_module_up) for m in lines],
    }


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, summary = tracked(tmp_path, tracker="tensorboard")
    assert (summary.outcome, summary.notes) == ("complete", ())
    events = EventAccumulator(str(run.dir.path / "tensorboard")).Reload()
    for name, points in wanted(run, summary).items():
        assert [(e.step, e.value) for e in events.Scalars(name) if e.step > 0] == points, name
    assert any(name.startswith("settings") for name in events.Tags()["tensors"])


@pytest.mark.filterwarnings("ignore")  # its own, of SQLAlchemy
def test_mlflow(tmp_path: Path) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    run, summary = tracked(tmp_path, tracker="mlflow")
    client = tracking.MlflowClient(tracking_uri=f"sqlite:///{run.dir.path.parent / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "digits"]
    (kept,) = client.search_runs([experiment.experiment_id])
    assert (kept.info.run_name, kept.info.status) == (run.dir.name, "FINISHED")
    assert kept.data.params["rounds"] == "2"
    for name, points in wanted(run, summary).items():
        found = client.get_metric_history(kept.info.run_id, name)
        assert [(m.step, m.value) for m in found if m.step > 0] == points, name


@pytest.mark.filterwarnings("ignore")
def test_wandb_in_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run, summary = tracked(tmp_path, tracker="wandb")
    assert (summary.outcome, summary.notes) == ("complete", ())
    assert list((run.dir.path.parent / "wandb").glob(f"offline-run-*-{run.dir.key}"))


def test_a_tracker_that_fails_costs_the_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.utils.tensorboard

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.utils.tensorboard.SummaryWriter, "add_scalar", fail)
    run, summary = tracked(tmp_path, tracker="tensorboard")
    assert summary.outcome == "complete"
    (note,) = summary.notes
    assert note.startswith("tracker=tensorboard stopped (OSError: [Errno 28] No space left")
    assert note.endswith("all metrics are in the run's metrics.jsonl")
    assert {m.round for m in run.dir.read_metrics()} >= {1, 2, 3}


def test_a_tracker_that_is_not_installed_is_told_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        ConfigError, match=r"tracker=mlflow needs .* pip install .fedsplit\[mlflow\]"
    ):
        check_tracker(settings(tmp_path, tracker="mlflow"))
    check_tracker(settings(tmp_path))

"""A run's module in the registry: its facts, its parent, and that a registry that cannot be used costs the run nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsplit.core.errors import ConfigError
from fedsplit.core.records import Summary
from fedsplit.predict.found import find_module
from fedsplit.predict.predictor import load_predictor
from fedsplit.registry.registry import ModuleRegistry
from fedsplit.training.data import load_source
from tests.federation.conftest import prepared, settings, simulated

FEW = {"registry": "", "max_samples": 80, "rounds": 1, "cut": "6,6", "classifier_init": "ridge"}


def go(folder: Path, name: str, **other: Any) -> Summary:
    config = settings(folder, run_name=name, **(FEW | other))
    with prepared(config, simulated(2)) as (run, _):
        return run.go()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    """The runs folder of one run of the task digits."""
    runs = tmp_path_factory.mktemp("kept") / "runs"
    return runs, go(runs, "first", task="digits")


def test_a_version_has_the_facts_of_its_run(kept: tuple[Path, Summary]) -> None:
    runs, summary = kept
    with ModuleRegistry.open(runs / "modules") as registry:
        version = registry.get("digits#1")
    assert (version.run, version.outcome, version.task) == ("first", "complete", "digits")
    assert version.backbone_sha256 == summary.backbone_sha256
    assert version.classes == tuple("0123456789")
    assert [(s.name, s.samples, s.accuracy) for s in version.sites] == [
        (s.name, s.samples, s.accuracy) for s in summary.sites
    ]
    assert version.metrics["accuracy"] == summary.accuracy_global
    assert version.metrics["accuracy_before"] == summary.accuracy_global_start
    assert version.settings["rounds"] == 1
    assert str(runs.parent) not in version.model_dump_json()
    assert find_module(version.digest[:12], registry=runs / "modules").name == "digits#1"


def test_a_task_more_on_the_same_backbone_touches_no_other(kept: tuple[Path, Summary]) -> None:
    """Each task has its own line of versions; what the others' modules are and answer stays to the last bit."""
    runs, _ = kept
    place = runs / "modules"
    examples = load_source("digits", site="here", max_samples=60)
    with ModuleRegistry.open(place) as registry:
        registry.promote("digits#1", by="me")
        before = registry.get("digits")
    answers = load_predictor("digits", registry=place).over(examples)
    go(runs, "scans", task="scans", seed=1)
    ended = go(runs, "next", task="digits", start_module="digits@production", seed=2)
    with ModuleRegistry.open(place) as registry:
        assert [v.name for v in registry.versions()] == ["digits#1", "digits#2", "scans#1"]
        assert registry.get("digits") == before
        assert registry.get("digits#2").parents == (before.digest,)
        assert registry.get("scans#1").parents == ()
        registry.promote("scans#1", by="me")
        assert registry.aliases()["digits"] == {"production": before.digest}
    assert ended.start == "module"
    again = load_predictor("digits", registry=place).over(examples)
    assert np.array_equal(again, answers)
    right = (answers.argmax(axis=1) == examples.labels).mean()
    assert right == (again.argmax(axis=1) == examples.labels).mean() > 0.5


def test_a_registry_that_cannot_be_used_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "modules.db").write_bytes(b"no database" * 100)
    ended = go(tmp_path, "run", rounds=0)
    assert ended.outcome == "complete"
    what, why = [n for n in ended.notes if "registry of modules" in n]
    assert "module reindex" in why
    assert "module import" in what
    assert what in json.loads((tmp_path / "run" / "summary.json").read_text())["notes"]
    assert (tmp_path / "run" / "module" / "fedsplit.json").is_file()


def test_a_run_may_not_be_called_as_the_registry_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose another run-name"):
        settings(tmp_path, run_name="Modules", registry="")
    assert settings(tmp_path, run_name="modules").run.registry_folder is None

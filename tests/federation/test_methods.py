"""Every method runs from roll call to summary with real sites and a real encoder, and does what it is named for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsplit.core.methods import METHODS
from fedsplit.core.records import Summary
from fedsplit.federation.server import Run
from tests.federation.conftest import prepared, settings, simulated

SMALL: dict[str, Any] = {"max_samples": 120, "rounds": 1, "cut": "1,5"}
EXTRA: dict[str, dict[str, Any]] = {
    "fedvz": {"optimizer": "sgd", "lora_learning_rate": 1e-4},
    "closed-form": {"rounds": 0},
    "fedavg-full": {"learning_rate": 1e-4, "lora_learning_rate": 1e-4},
    "head-tail": {"learning_rate": 1e-4, "lora_learning_rate": 1e-4},
    "festa": {"lora_learning_rate": 1e-4},
    "fedvz-device": {"learning_rate": 1e-4, "lora_learning_rate": 1e-4},
}


def run(tmp: Path, sites: int = 2, **flat: Any) -> tuple[Summary, Run]:
    config = settings(tmp, **(SMALL | flat))
    with prepared(config, simulated(sites)) as (run, _):
        return run.go(), run


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs(name: str, tmp_path: Path) -> None:
    extra = SMALL | EXTRA.get(name, {})
    if METHODS[name].placement == "device":
        extra.pop("cut")
    config = settings(tmp_path, method=name, **(extra | {"cut": extra.get("cut", "6,6")}))
    with prepared(config, simulated(2)) as (run, net):
        summary = run.go()
    assert summary.outcome == "complete", summary.reason
    assert summary.method == name
    if name == "local-only":
        assert summary.accuracy_local_only is not None
        assert summary.accuracy_personal is not None
        return
    assert summary.accuracy_global is not None
    assert summary.flops_device > 0
    assert all(np.isfinite(t).all() for t in run._strategy.module.values())
    if name != "closed-form":
        assert summary.rounds_done == 1
        assert summary.accuracy_personal is not None
    assert net.sent

"""Every method runs from roll call to summary with real sites and a real encoder, and does what it is named for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsplit.core.cut import Cut
from fedsplit.core.methods import METHODS
from fedsplit.core.records import Summary
from fedsplit.federation.server.orders import sampled_block
from fedsplit.federation.server.run import Run
from tests.federation.conftest import prepared, settings, simulated

SMALL: dict[str, Any] = {"max_samples": 120, "rounds": 1, "cut": "1,5"}
EXTRA: dict[str, dict[str, Any]] = {
    "fedvz": {"optimizer": "sgd", "lora_learning_rate": 1e-4},
    "closed-form": {"rounds": 0},
    "fedavg-full": {"learning_rate": 1e-4, "lora_learning_rate": 1e-4},
    "head-tail": {"learning_rate": 1e-4, "lora_learning_rate": 1e-4},
    "festa": {"lora_learning_rate": 1e-4},
    "fesvibs": {"lora_learning_rate": 1e-4, "cut": "0,6"},
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


def test_fesvibs_leaves_the_encoder_after_a_drawn_block(tmp_path: Path) -> None:
    """Another module than FESTA's, whose tests and costs are the same; the draw hangs on seed, site and round alone."""
    flat = {"cut": "0,6", "lora_learning_rate": 1e-4, "rounds": 2}
    festa, first = run(tmp_path / "a", method="festa", **flat)
    early, second = run(tmp_path / "b", method="fesvibs", **flat)
    last, third = run(tmp_path / "c", method="fesvibs", block_sampling=6, **flat)
    of = [r._strategy.module for r in (first, second, third)]
    assert any(not np.array_equal(of[0][n], of[1][n]) for n in of[0])
    # Who may leave after the last block alone does not leave early.
    assert third.config.placement.block_sampling == 6
    assert festa.accuracy_by_round[0] == early.accuracy_by_round[0] == last.accuracy_by_round[0]
    assert abs(festa.bytes_activation - early.bytes_activation) < 16
    draws = [
        sampled_block(second.config, site=f"site-{i}", cut=Cut(0, 6), round_=round_)
        for i in range(40)
        for round_ in (1, 2)
    ]
    assert set(draws) == {1, 2, 3, 4, 5, 6}
    assert draws[0::2] != draws[1::2]
    assert draws[0] == sampled_block(second.config, site="site-0", cut=Cut(0, 6), round_=1)
    assert {
        sampled_block(third.config, site=f"site-{i}", cut=Cut(0, 6), round_=1) for i in range(20)
    } == {6}
    # None of the device's blocks.
    assert {
        sampled_block(second.config, site=f"site-{i}", cut=Cut(4, 6), round_=1) for i in range(20)
    } == {5, 6}
    assert not sampled_block(first.config, site="site-0", cut=Cut(0, 6), round_=1)

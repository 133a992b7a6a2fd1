"""HetLoRA's pruning of ranks in a whole run: what is sent from then on, a resume, and a site that lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsplit.core.config import RunConfig
from fedsplit.core.errors import ConfigError, FederationError
from fedsplit.core.orders import Answer
from fedsplit.federation.server.run import Run, settle
from tests.federation.conftest import prepared, settings, simulated
from tests.federation.test_run import train_reply

PRUNING: dict[str, Any] = {
    "cut": "6,6", "max_samples": 120, "rounds": 4, "lora_aggregation": "hetlora", "lora_ranks": "4;8",
    "rank_pruning": 0.5, "rank_penalty": 20.0, "optimizer": "sgd", "lora_learning_rate": 0.05,
}  # fmt: skip


def go(tmp: Path, **other: Any) -> Run:
    with prepared(settings(tmp, **PRUNING | other), simulated(2)) as (run, _):
        run.go()
    return run


def bytes_of(run: Run, site: str) -> list[tuple[int, int]]:
    return [
        (m.bytes_module_down, m.bytes_module_up)
        for m in run.ledger.metrics
        if m.site == site and m.loss is not None
    ]


def test_a_pruned_site_gets_and_sends_less(tmp_path: Path) -> None:
    run = go(tmp_path / "a")
    ranks = run._strategy._orders.ranks
    assert ranks.keys() == {"site-0", "site-1"}
    assert ranks["site-0"] < 4
    assert ranks["site-1"] < 8
    for site in ranks:
        sizes = bytes_of(run, site)
        # The start has B = 0, so nothing can shrink in the first round.
        assert sizes[0] == sizes[1]
        assert sizes[-1][0] < sizes[0][0]
        assert sizes[-1][1] < sizes[0][1]
        assert all(up == down for down, up in sizes)
    assert all(np.isfinite(t).all() for t in run._strategy.module.values())
    # Without the pressure, on the same path: nobody prunes, and the module is another one.
    free = go(tmp_path / "b", rank_pruning=1.0, rank_penalty=0.0)
    assert free._strategy._orders.ranks == {}
    assert len(set(bytes_of(free, "site-0"))) == 1


def test_a_resumed_run_knows_the_ranks(tmp_path: Path) -> None:
    whole = go(tmp_path / "a")
    config = settings(tmp_path / "b", **PRUNING)
    object.__setattr__(config.server, "deadline_s", 2.0)
    away = prepared(config, simulated(2), silent=lambda _, m: m.metadata.group_id == "4")
    with away as (run, _), pytest.raises(FederationError):
        run.go()
    again = settle(settings(tmp_path / "b", run_name="", resume="run"))
    with prepared(again, simulated(2)) as (run, _):
        run.go()
    assert run._strategy._orders.ranks == whole._strategy._orders.ranks
    found = run._strategy.module
    assert all(np.array_equal(t, found[n]) for n, t in whole._strategy.module.items())


@pytest.mark.parametrize("rank", [1, 3, 4, 9])
def test_a_rank_that_pruning_does_not_leave_is_refused(rank: int, tmp_path: Path) -> None:
    def lie(delta: Any, answer: Answer) -> Any:
        return delta, answer.model_copy(update={"rank": rank})

    config = settings(tmp_path, **PRUNING | {"rounds": 1, "min_sites": 1})
    with prepared(config, simulated(2), tamper=train_reply(lie, node=1)) as (run, _):
        summary = run.go()
    assert summary.outcome == "partial"
    assert (
        f"it pruned its rank 4 to {rank}, rank-pruning=0.5 leaves 2" in summary.left_out[0].reason
    )
    assert run._strategy._orders.ranks == {}


@pytest.mark.parametrize(
    ("flat", "said"),
    [
        ({"rank-pruning": 0.5}, "rank-pruning=0.5 is for lora-aggregation=hetlora, not plain"),
        ({"rank-penalty": 0.1}, "rank-penalty=0.1 with rank-pruning=1 presses on nothing"),
        (
            {"rank-pruning": 0.5, "lora-aggregation": "hetlora", "personalisation": "ditto"},
            "rank-pruning=0.5 wants one model a site",
        ),
        ({"rank-pruning": 0.0}, "rank-pruning"),
    ],
)
def test_settings_that_do_not_go_together(flat: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_flat(flat)
    assert said in str(caught.value)

"""All weights of the blocks alone: what nobody trains, the embeddings, is not sent to the sites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsplit.federation.server.run import Run
from tests.federation.conftest import prepared, settings, simulated

FULL: dict[str, Any] = {
    "max_samples": 120,
    "rounds": 2,
    "batch_size": 16,
    "module": "full",
    "cut": "0,6",
    "lora_learning_rate": 1e-4,
}


def trained(tmp: Path, **flat: Any) -> tuple[dict[str, np.ndarray], Run]:
    with prepared(settings(tmp, **FULL | flat), simulated(2)) as (run, _):
        run.go()
    assert run._strategy is not None
    return run._strategy.module, run


def module_down(run: Run) -> int:
    return sum(m.bytes_module_down for m in run.ledger.metrics)


@pytest.mark.parametrize("encoder", ["hosted", "frozen"])
def test_embeddings_that_nobody_trains_may_stay_out(encoder: str, tmp_path: Path) -> None:
    """The same bits with module-blocks=L as with the whole model, for fewer bytes."""
    whole, first = trained(tmp_path / "a", encoder_training=encoder)
    blocks, second = trained(tmp_path / "b", encoder_training=encoder, module_blocks=6)
    left_out = whole.keys() - blocks.keys()
    assert left_out
    assert all(".embeddings." in n for n in left_out)
    assert not [n for n in blocks if not np.array_equal(whole[n], blocks[n])]
    for round_ in (1, 2):
        assert first.ledger.scores_of_round(round_) == second.ledger.scores_of_round(round_)
    assert module_down(second) < module_down(first) / 2

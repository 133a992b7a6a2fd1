"""keep-hardest in a whole run: what a site trains on, what that costs, and what it leaves as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedsplit.core.records import RoundMetrics
from fedsplit.federation.server.run import Run
from fedsplit.model import module
from fedsplit.model.split import whole_model
from fedsplit.training import data
from fedsplit.training.flops import DeviceFlops
from fedsplit.training.site_data import SiteData
from fedsplit.training.site_settings import SiteSettings
from tests.federation.conftest import prepared, settings, simulated
from tests.kept import open_site

SMALL: dict[str, Any] = {"max_samples": 120, "rounds": 1, "cut": "1,5", "batch_size": 16}
HEAD_TAIL: dict[str, Any] = SMALL | {"device_training": "head+tail"}
CLASSES = tuple("0123456789")


def trained(tmp: Path, **flat: Any) -> tuple[dict[str, np.ndarray], Run]:
    with prepared(settings(tmp, **flat), simulated(2)) as (run, _):
        run.go()
    assert run._strategy is not None
    return run._strategy.module, run


def of_round(run: Run, round_: int = 1) -> list[RoundMetrics]:
    found = [m for m in run.ledger.metrics if m.round == round_ and m.loss is not None]
    return sorted(found, key=lambda m: m.site)


def sites_of(run: Run) -> list[SiteData]:
    nodes = [SiteSettings.from_node(node, node_id=1) for node in simulated(2)]
    return [open_site(run.config, node, run.backbone, CLASSES) for node in nodes]


def batches(count: int) -> int:
    return -(-count // SMALL["batch_size"])


def test_scoring_alone_changes_nothing_but_the_costs(tmp_path: Path) -> None:
    """A share that rounds to all samples: the same bits, and one forward a sample more."""
    plain, before = trained(tmp_path / "a", **HEAD_TAIL)
    scored, after = trained(tmp_path / "b", **HEAD_TAIL, keep_hardest=0.999)
    assert plain.keys() == scored.keys()
    assert not [n for n in plain if not np.array_equal(plain[n], scored[n])]
    for first, second, own in zip(of_round(before), of_round(after), sites_of(after), strict=True):
        assert (first.samples, first.loss) == (second.samples, second.loss)
        assert second.steps - first.steps == batches(len(own.train))
        up = second.bytes_activation_up - first.bytes_activation_up
        down = second.bytes_activation_down - first.bytes_activation_down
        # Training sends h and dz, scoring h alone; z and dh come back, or z alone.
        assert 0 < up < first.bytes_activation_up / 2
        assert 0 < down < first.bytes_activation_down / 2
        assert second.flops_device > first.flops_device


def test_pruned_samples_cost_a_forward_and_no_training(tmp_path: Path) -> None:
    _, all_ = trained(tmp_path / "a", **HEAD_TAIL, local_epochs=3)
    _, half = trained(tmp_path / "b", **HEAD_TAIL, local_epochs=3, keep_hardest=0.5)
    spec = module.ModuleSpec.of(half.config.module, CLASSES)
    whole = whole_model(half.backbone, spec, module.initial(half.backbone, spec, seed=0))
    for first, second, own in zip(of_round(all_), of_round(half), sites_of(half), strict=True):
        n, kept = len(own.train), round(0.5 * len(own.train))
        # In averages the site counts with all it has.
        assert first.samples == second.samples == n
        assert first.steps - second.steps == 3 * batches(n) - 3 * batches(kept) - batches(n)
        assert second.bytes_activation_up < first.bytes_activation_up
        assert second.flops_device < first.flops_device
    # The same round with nothing on the server, where operations can be counted from outside.
    _, alone = trained(tmp_path / "c", **HEAD_TAIL | {"cut": "6,6"}, keep_hardest=0.5)
    for metrics, own in zip(of_round(alone), sites_of(alone), strict=True):
        batch = next(iter(data.batches(own.examples, own.train[:1], own.transform, batch_size=1)))
        one = DeviceFlops().of_sample(whole, batch)
        n, tests = len(own.train), 2 * len(own.test)
        forwards = (n + tests) * (one.head + one.tail)
        assert metrics.flops_device == forwards + round(0.5 * n) * (one.head_step + one.tail_step)


@pytest.mark.parametrize("cut", ["1,5", "6,6"])
def test_a_site_learns_from_the_hardest_alone(cut: str, tmp_path: Path) -> None:
    """One step of gradient descent on the classifier, against the gradient over the samples chosen by hand."""
    same = SMALL | {"cut": cut, "module": "classifier", "classifier_init": "ridge"}
    before, _ = trained(tmp_path / "a", **same | {"method": "closed-form", "rounds": 0})
    after, run = trained(
        tmp_path / "b", **same | {"batch_size": 256}, keep_hardest=0.4, optimizer="sgd", learning_rate=1.0,
        lr_schedule="constant",
    )  # fmt: skip
    spec = module.ModuleSpec.of(run.config.module, CLASSES)
    weight = torch.from_numpy(before["classifier.weight"].copy()).requires_grad_()
    model = whole_model(run.backbone, spec, before)
    moves, sizes = [], []
    for own in sites_of(run):
        batch = next(iter(data.batches(own.examples, own.train, own.transform, batch_size=256)))
        with torch.no_grad():
            errors = model(batch.inputs, batch.mask).softmax(1) - nn.functional.one_hot(
                batch.labels, 10
            )
            features = model.part.ends.features(model.pooled(model.head(batch.inputs, None), None))
        order = np.argsort(-errors.norm(dim=1).numpy())
        kept = torch.from_numpy(np.sort(order[: round(0.4 * len(order))]))
        logits = features[kept] @ weight.T + torch.from_numpy(before["classifier.bias"])
        loss = nn.functional.cross_entropy(logits, batch.labels[kept])
        moves.append(torch.autograd.grad(loss, weight)[0].numpy())
        sizes.append(len(own.train))
    wanted = before["classifier.weight"] - np.average(moves, axis=0, weights=sizes)
    assert np.abs(wanted - before["classifier.weight"]).max() > 0.01
    np.testing.assert_allclose(after["classifier.weight"], wanted, atol=1e-4)


def test_sfprompt_prunes_unless_told_otherwise(tmp_path: Path) -> None:
    _, run = trained(tmp_path / "a", **SMALL, method="sfprompt")
    assert (run.config.train.keep_hardest, run.config.train.local_loss_epochs) == (0.8, 1)
    for metrics, own in zip(of_round(run), sites_of(run), strict=True):
        n, tests = len(own.train), 2 * batches(len(own.test))
        # Neither the local-loss epoch nor the scoring after it is at the encoder.
        assert metrics.steps == batches(round(0.8 * n)) + tests


def test_what_the_scoring_brought_is_not_fetched_again(tmp_path: Path) -> None:
    _, run = trained(tmp_path, **SMALL, keep_hardest=0.5, cache_activations=True)
    for metrics, own in zip(of_round(run), sites_of(run), strict=True):
        assert metrics.steps == batches(len(own.train)) + batches(len(own.test))


@pytest.mark.parametrize(
    "flat",
    [
        {"personalisation": "ditto"},
        {"personalisation": "fed-rod"},
        {"encoder_training": "hosted"},
        {"encoder_training": "shared"},
        {"method": "fedvz", "device_training": "tail", "lora_learning_rate": 1e-4},
    ],
    ids=["ditto", "fed-rod", "hosted", "shared", "fedvz"],
)
def test_it_goes_with_what_else_trains(flat: dict[str, Any], tmp_path: Path) -> None:
    tensors, run = trained(tmp_path, **HEAD_TAIL | flat, keep_hardest=0.5)
    assert len(of_round(run)) == 2
    assert all(np.isfinite(t).all() for t in tensors.values())

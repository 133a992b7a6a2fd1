"""local-loss-epochs in a whole run: head joined to tail, what that teaches, and that nothing of it crosses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.errors import ConfigError
from fedsplit.model import module
from fedsplit.model.local_encoder import LocalEncoder
from fedsplit.model.split import SplitModel, device_part, server_part, whole_model
from fedsplit.training import data
from fedsplit.training.flops import DeviceFlops
from fedsplit.training.site_data import SiteData
from tests.federation.test_pruning import CLASSES, SMALL, of_round, sites_of, trained

HEAD_TAIL: dict[str, Any] = SMALL | {"device_training": "head+tail"}


def all_of(own: SiteData) -> data.Batch:
    return next(iter(data.batches(own.examples, own.train, own.transform, batch_size=256)))


def one_step(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor) -> list[Tensor]:
    """The classifier after a step of gradient descent with learning rate 1."""
    parameters = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    loss = nn.functional.cross_entropy(features @ parameters[0].T + parameters[1], labels)
    grads = torch.autograd.grad(loss, parameters)
    return [(p - g).detach() for p, g in zip(parameters, grads, strict=True)]


def test_a_shortcut_is_the_model_without_the_encoders_blocks(tmp_path: Path) -> None:
    _, run = trained(tmp_path, **SMALL)
    spec = module.ModuleSpec.of(run.config.module, CLASSES)
    tensors = module.initial(run.backbone, spec, seed=3)
    shape = tensors["classifier.weight"].shape
    # A classifier of zeros would make all models alike.
    tensors["classifier.weight"] = np.random.default_rng(0).standard_normal(shape, np.float32)
    whole = whole_model(run.backbone, spec, tensors)
    part = device_part(run.backbone, Cut(1, 5), spec)
    module.load(part, tensors)
    batch = all_of(sites_of(run)[0])
    server = server_part(run.backbone, spec)
    split = SplitModel(part, Cut(1, 5), LocalEncoder(server, Cut(1, 5)))
    joined = split.shortcut()
    with torch.no_grad():
        h = whole.part.trunk.run(whole.part.ends.embed(batch.inputs), None, 0, 1)
        wanted = whole.part.ends.classify(
            whole.part.ends.pool(whole.part.trunk.run(h, None, 5, 6), None)
        )
        assert torch.equal(joined(batch.inputs, batch.mask), wanted)
        # The model that it was made of still goes through the encoder.
        assert torch.equal(split(batch.inputs, batch.mask), whole(batch.inputs, batch.mask))
        assert not torch.equal(wanted, whole(batch.inputs, batch.mask))


def test_no_shortcut_where_the_server_pools(tmp_path: Path) -> None:
    _, run = trained(tmp_path, **SMALL)
    spec = module.ModuleSpec.of(run.config.module, CLASSES)
    cut = Cut(1, 6)
    part = device_part(run.backbone, cut, spec)
    model = SplitModel(part, cut, LocalEncoder(server_part(run.backbone, spec), cut))
    with pytest.raises(ConfigError, match="head and tail make no model of their own"):
        model.shortcut()


@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_a_site_learns_from_the_shortcut_first(keep: float, tmp_path: Path) -> None:
    """Two steps of gradient descent on the classifier by hand: on the shortcut's features, then on the model's."""
    same = SMALL | {"cut": "1,5", "module": "classifier", "classifier_init": "ridge"}
    before, _ = trained(tmp_path / "a", **same | {"method": "closed-form", "rounds": 0})
    after, run = trained(
        tmp_path / "b", **same | {"batch_size": 256}, local_loss_epochs=1, keep_hardest=keep, optimizer="sgd",
        learning_rate=1.0, lr_schedule="constant", step_back=False,
    )  # fmt: skip
    whole = whole_model(run.backbone, module.ModuleSpec.of(run.config.module, CLASSES), before)
    start = [torch.from_numpy(before[f"classifier.{n}"].copy()) for n in ("weight", "bias")]
    ends, sizes = [], []
    for own in sites_of(run):
        batch = all_of(own)
        with torch.no_grad():
            h = whole.part.trunk.run(whole.part.ends.embed(batch.inputs), None, 0, 1)
            short = whole.part.ends.pool(whole.part.trunk.run(h, None, 5, 6), None)
            features = whole.part.ends.pool(whole.part.trunk.run(h, None, 1, 6), None)
        weight, bias = one_step(*start, short, batch.labels)
        errors = (short @ weight.T + bias).softmax(1) - nn.functional.one_hot(batch.labels, 10)
        order = np.argsort(-errors.norm(dim=1).numpy())
        kept = torch.from_numpy(np.sort(order[: round(keep * len(order))]))
        ends.append(one_step(weight, bias, features[kept], batch.labels[kept])[0].numpy())
        sizes.append(len(own.train))
    wanted = np.average(ends, axis=0, weights=sizes)
    assert np.abs(wanted - before["classifier.weight"]).max() > 0.01
    np.testing.assert_allclose(after["classifier.weight"], wanted, atol=1e-4)


def test_it_costs_the_device_an_epoch_and_the_line_nothing(tmp_path: Path) -> None:
    plain_module, plain = trained(tmp_path / "a", **HEAD_TAIL)
    local_module, local = trained(tmp_path / "b", **HEAD_TAIL, local_loss_epochs=2)
    assert any(not np.array_equal(plain_module[n], local_module[n]) for n in plain_module)
    cut = Cut(1, 5)
    spec = module.ModuleSpec.of(local.config.module, CLASSES)
    part = device_part(local.backbone, cut, spec)
    module.load(part, module.initial(local.backbone, spec, seed=0))
    model = SplitModel(part, cut, LocalEncoder(server_part(local.backbone, spec), cut))
    for first, second, own in zip(of_round(plain), of_round(local), sites_of(local), strict=True):
        assert first.steps == second.steps
        assert first.bytes_activation_up == second.bytes_activation_up
        # The welcome has the session's number, of which few are shorter than the others.
        assert abs(first.bytes_activation_down - second.bytes_activation_down) < 8
        one = DeviceFlops().of_sample(model, all_of(own))
        more = 2 * len(own.train) * (one.head_step + one.tail_step)
        assert second.flops_device - first.flops_device == more


def test_a_run_with_it_repeats(tmp_path: Path) -> None:
    flat = SMALL | {"method": "sfprompt", "augmentation": "flip", "rounds": 2}
    first, run = trained(tmp_path / "a", **flat)
    again, _ = trained(tmp_path / "b", **flat)
    assert all(np.array_equal(first[n], again[n]) for n in first)
    assert len(of_round(run, 2)) == 2


def test_a_cut_without_a_tail_of_its_own_is_refused_before_the_run() -> None:
    config = RunConfig.from_flat({"method": "sfprompt", "cut": "0,6;1,7"})
    with pytest.raises(ConfigError) as caught:
        config.check_blocks(6)
    said = str(caught.value).split("\n  - ")
    assert len(said) == 2
    assert "cut 1,7 does not fit the backbone: it has 6 blocks" in said[0]
    assert "use a cut that ends before block 6, e.g. 0,5" in said[1]
    RunConfig.from_flat({"method": "sfprompt", "cut": "0,5"}).check_blocks(6)


def test_where_blocks_are_sampled_the_encoder_pools() -> None:
    config = RunConfig.from_flat({"method": "fesvibs", "cut": "0,5"})
    with pytest.raises(
        ConfigError, match="goes to the encoder's own norm and pooling; use cut=0,6"
    ):
        config.check_blocks(6)
    late = RunConfig.from_flat({"method": "fesvibs", "cut": "2,6", "block-sampling": 7})
    with pytest.raises(ConfigError, match=r"block-sampling=7 with cut=2,6: at most 6 is wanted"):
        late.check_blocks(6)
    RunConfig.from_flat({"method": "fesvibs", "cut": "2,6"}).check_blocks(6)

"""Real weights on real data, through the real stream: the loss falls, accuracy beats the frozen start, PEFT agrees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from PIL import Image

from fedsplit.core.cut import Cut
from fedsplit.core.records import Summary
from fedsplit.federation.server.run import Run
from fedsplit.model import module
from fedsplit.model.local_encoder import LocalEncoder
from fedsplit.model.split import SplitModel, device_part, server_part
from fedsplit.training import data
from fedsplit.training.site_settings import SiteSettings
from tests.federation.conftest import prepared, settings, simulated
from tests.kept import open_site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def train(config_of: dict[str, object], runs: Path, sites: int) -> tuple[Run, Summary]:
    both = {"device_training": "head+tail"}
    config = settings(runs, **{"deadline_s": 300.0, **both, **config_of})
    with prepared(config, simulated(sites)) as (run, _):
        return run, run.go()


def assert_learned(run: Run, summary: Summary, *, gain: float) -> None:
    assert summary.outcome == "complete"
    losses = {
        r: np.mean([m.loss for m in run.ledger.metrics if m.round == r])
        for r in range(1, summary.rounds_done + 1)
    }
    assert losses[summary.rounds_done] < 0.8 * losses[1], losses
    assert summary.accuracy_global is not None
    assert summary.accuracy_global_start is not None
    assert summary.accuracy_global > summary.accuracy_global_start + gain, summary.accuracy_by_round
    steps = [m for m in run.ledger.metrics if m.cut != "12,12"]
    assert all(m.bytes_activation_up > 0 for m in steps)


def assert_peft_agrees(run: Run, cut: Cut) -> None:
    """PEFT's own model, loaded from the run's folder, and the split model say the same of every test sample."""
    config, backbone = run.config, run.backbone
    strategy = run._strategy
    assert strategy is not None
    site = SiteSettings.from_node({"partition-id": 0, "num-partitions": 2}, node_id=1)
    own = open_site(config, site, backbone, strategy.spec.classes)
    model_class = getattr(transformers, backbone.family.model_class)
    whole = model_class.from_pretrained(
        backbone.path, num_labels=len(strategy.spec.classes), ignore_mismatched_sizes=True
    )
    peft = PeftModel.from_pretrained(whole, run.dir.path / "module").eval()
    device = device_part(backbone, cut, strategy.spec)
    server = server_part(backbone, strategy.spec)
    module.load(device, strategy.module)
    module.load(server, strategy.module)
    split = SplitModel(device, cut, LocalEncoder(server, cut))
    extra = {"interpolate_pos_encoding": True} if backbone.family.kind == "image" else {}
    with torch.no_grad():
        for batch in data.batches(own.examples, own.test, own.transform, batch_size=16):
            theirs = peft(**batch.inputs, **extra).logits
            torch.testing.assert_close(split(batch.inputs, batch.mask), theirs, rtol=0, atol=0)


def test_vit_tiny_on_cifar10(vit_tiny: Path, shared_data: Path, tmp_path: Path) -> None:
    packed = np.load(shared_data / "cifar10" / "cifar10_jpeg_20k_5k.npz")
    offsets, blob = packed["train_offsets"], packed["train_bytes"]
    images = []
    for i in range(600):
        raw = blob[offsets[i] : offsets[i + 1]].tobytes()
        path = tmp_path / "one.jpg"
        path.write_bytes(raw)
        images.append(np.asarray(Image.open(path).convert("RGB")))
    names = [str(c) for c in packed["classes"]]
    labels = np.array([names[k] for k in packed["train_labels"][:600]])
    np.savez(tmp_path / "cifar.npz", x=np.stack(images), y=labels)
    run, summary = train(
        {
            "backbone": str(vit_tiny),
            "task": "cifar10",
            "data": f"npz:{tmp_path / 'cifar.npz'}",
            "image_size": 96,
            "cut": "1,11;10,12",
            "max_samples": 0,
            "rounds": 3,
            "batch_size": 16,
            "partition": "dirichlet:1",
        },
        tmp_path,
        2,
    )
    assert_learned(run, summary, gain=0.25)
    assert_peft_agrees(run, Cut(1, 11))


def test_minilm_on_work_orders(minilm: Path, shared_data: Path, tmp_path: Path) -> None:
    run, summary = train(
        {
            "backbone": str(minilm),
            "task": "work-orders",
            "data": f"csv:{shared_data / 'work_orders' / 'train.txt'}",
            "cut": "1,5;0,6",
            "max_samples": 0,
            "rounds": 4,
            "local_epochs": 2,
            "batch_size": 16,
            "learning_rate": 0.005,
            "partition": "iid",
        },
        tmp_path,
        2,
    )
    assert_learned(run, summary, gain=0.25)
    assert_peft_agrees(run, Cut(1, 5))

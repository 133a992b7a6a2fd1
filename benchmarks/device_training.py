"""What should train on the device: the tail alone with a frozen head, or head and tail? Accuracy, bytes, label leak.

Not a speed ratio but the measurement behind docs/adr/0006: `fedsplit run` in both modes with the same seeds, and
how well k-means finds the labels in the gradients that a site sends up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans

from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Array, Mask, Want
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.local_encoder import LocalEncoder
from fedsplit.model.module import ModuleSpec
from fedsplit.model.split import SplitModel, device_part, server_part
from fedsplit.training import data

MODES = ("head+tail", "tail")
CUT = Cut(2, 5)
SETTINGS = {
    "cut": str(CUT), "sites": 4, "rounds": 6, "partition": "dirichlet:0.3", "classifier-init": "zero",
}  # fmt: skip


def run(seeds: int = 3) -> dict[str, Any]:
    """Both modes on digits with the bundled backbone, then the label leak of the mode that sends gradients."""
    modes = {mode: [_federate(mode, seed) for seed in range(seeds)] for mode in MODES}
    return {
        "name": "device-training",
        "settings": SETTINGS | {"seeds": seeds, "backbone": "vit-glyphs", "data": "digits"},
        "modes": {mode: _means(runs) for mode, runs in modes.items()},
        "label_clustering_accuracy": label_clustering(),
        "command": f"python -m benchmarks.device_training --seeds {seeds}",
    }


def _federate(mode: str, seed: int) -> dict[str, Any]:
    settings = SETTINGS | {"device-training": mode, "seed": seed}
    with tempfile.TemporaryDirectory() as runs:
        pairs = [f"{k}={v}" for k, v in (settings | {"runs-dir": runs}).items()]
        command = [str(Path(sys.executable).parent / "fedsplit"), "run", "--json"]
        done = subprocess.run(
            [*command, *(a for p in pairs for a in ("--set", p))],
            capture_output=True,
            text=True,
            check=True,
        )
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def _means(runs: list[dict[str, Any]]) -> dict[str, float]:
    sites = [site for run in runs for site in run["sites"]]
    accuracies = [run["accuracy_global"] for run in runs]
    return {
        "accuracy_global_mean": statistics.mean(accuracies),
        "accuracy_global_std": statistics.pstdev(accuracies),
        "megabytes_up_a_site": statistics.mean(s["bytes_up"] for s in sites) / 1e6,
        "megabytes_down_a_site": statistics.mean(s["bytes_down"] for s in sites) / 1e6,
        "seconds_device_a_site": statistics.mean(s["seconds_device"] for s in sites),
    }


class _Tap:
    """An encoder that keeps the gradients it is sent, as the server could."""

    trains = False

    def __init__(self, encoder: LocalEncoder) -> None:
        self._encoder = encoder
        self.seen: list[Array] = []

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, want: Want = "output"
    ) -> Array:
        return self._encoder.encode(step, h_BTD, mask_BT, want=want)

    def settle(self, step: int, answer: Array, *, quiet: bool = False) -> Array | None:
        self.seen.append(answer.copy())
        return self._encoder.settle(step, answer, quiet=quiet)

    def close(self) -> None:
        self._encoder.close()


def label_clustering(samples: int = 512, seed: int = 0) -> float:
    """Share of labels that k-means on one step's per-sample gradients finds, clusters matched to classes.

    Chance is about one in ten.
    """
    backbone = Backbone.find("vit-glyphs")
    examples = data.load_source("digits", site="probe", max_samples=samples)
    spec = ModuleSpec(classes=examples.classes)
    tensors = module.initial(backbone, spec, seed=seed)
    # A small random classifier stands for an early step: behind the all-zero one no gradient flows back.
    rng = np.random.default_rng(seed)
    tensors["classifier.weight"] = rng.normal(0, 0.05, tensors["classifier.weight"].shape).astype(
        np.float32
    )
    device, server = device_part(backbone, CUT, spec), server_part(backbone, spec)
    module.load(device, tensors)
    module.load(server, tensors)
    tap = _Tap(LocalEncoder(server, CUT))
    model = SplitModel(device, CUT, tap)
    transform = data.ImageTransform.from_backbone(backbone.path)
    labels = []
    for batch in data.batches(examples, range(len(examples)), transform, batch_size=32):
        loss = torch.nn.functional.cross_entropy(model(batch.inputs, batch.mask), batch.labels)
        loss.backward()
        labels.append(batch.labels.numpy())
    gradients = np.concatenate([dz[:, 0] for dz in tap.seen])
    gradients /= np.linalg.norm(gradients, axis=1, keepdims=True) + 1e-12
    found = KMeans(len(examples.classes), n_init=10, random_state=seed).fit_predict(gradients)
    return _matched(found, np.concatenate(labels), len(examples.classes))


def _matched(found: np.ndarray, labels: np.ndarray, classes: int) -> float:
    table = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(table, (found, labels), 1)
    rows, columns = linear_sum_assignment(-table)
    return float(table[rows, columns].sum() / len(labels))


def main() -> None:
    """Measure, print the JSON and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--leak-only", action="store_true")
    args = parser.parse_args()
    if args.leak_only:
        print(json.dumps({"label_clustering_accuracy": label_clustering()}))
        return
    result = run(args.seeds)
    path = Path(__file__).parent / "results" / "device-training.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""Linear probe of the bundled backbone on scikit-learn's scanned digits.

Frozen CLS features (after the final layer norm) are standardised and given to a logistic
regression, for the bundled weights and for the same architecture with random weights.  Two
settings: the whole training split, and ten images of each class.  The backbone never saw a digit
during pre-training, so the gap between the two rows is what pre-training is worth.

    python scripts/probe_backbone.py [--json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional
from transformers import ViTConfig, ViTModel
from transformers.utils import logging as transformers_logging

BUNDLED = Path(__file__).resolve().parent.parent / "fedsplit" / "assets" / "vit-glyphs"
SPLIT_SEED = 0  # one fixed split: the probe's seeds vary only what is named in the table
TEST_SHARE = 0.2

Features = NDArray[np.float32]
Labels = NDArray[np.int64]
Split = tuple[Features, Features, Labels, Labels]


def digit_pixels() -> tuple[Tensor, Labels]:
    """The digits as model input: (n, 3, 32, 32) in [-1, 1], and their labels."""
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] / 16
    big = functional.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    return ((big - 0.5) / 0.5).expand(-1, 3, -1, -1).contiguous(), digits.target.astype(np.int64)


@torch.inference_mode()
def cls_features(model: ViTModel, pixels: Tensor, batch: int = 256) -> Features:
    """CLS features after the final layer norm, with the model frozen."""
    model.eval()
    parts = [model(pixel_values=part).last_hidden_state[:, 0] for part in pixels.split(batch)]
    return torch.cat(parts).numpy()


def random_backbone(config: ViTConfig, seed: int) -> ViTModel:
    """The bundled architecture with freshly drawn weights."""
    torch.manual_seed(seed)
    return ViTModel(config, add_pooling_layer=False)


def few_shot_rows(labels: Labels, per_class: int, seed: int) -> NDArray[np.int64]:
    """Indices of `per_class` randomly chosen images of each class."""
    rng = np.random.default_rng(seed)
    picks = [rng.permutation(np.flatnonzero(labels == c))[:per_class] for c in np.unique(labels)]
    return np.concatenate(picks)


def probe_accuracy(
    train: tuple[Features, Labels], test: tuple[Features, Labels], max_iter: int = 2000
) -> float:
    """Test accuracy of a logistic regression on standardised features."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=max_iter))
    return float(probe.fit(*train).score(*test))


def split_features(model: ViTModel, pixels: Tensor, labels: Labels) -> Split:
    """Train and test features, then train and test labels, over the fixed stratified split."""
    features = cls_features(model, pixels)
    x_train, x_test, y_train, y_test = train_test_split(
        features, labels, test_size=TEST_SHARE, stratify=labels, random_state=SPLIT_SEED
    )
    return x_train, x_test, y_train, y_test


def probe(split: Split, shots: int, seed: int) -> list[float]:
    """Accuracy with all training images, then with `shots` images of each class."""
    x_train, x_test, y_train, y_test = split
    rows = few_shot_rows(y_train, shots, seed)
    test = (x_test, y_test)
    full = probe_accuracy((x_train, y_train), test)
    return [full, probe_accuracy((x_train[rows], y_train[rows]), test)]


def run(folder: Path, seeds: Sequence[int], shots: int) -> dict[str, object]:
    """Probe both backbones for each seed; the seed draws random weights and few-shot images."""
    pixels, labels = digit_pixels()
    bundled = ViTModel.from_pretrained(folder, add_pooling_layer=False)
    bundled_split = split_features(bundled, pixels, labels)
    scores: dict[str, list[list[float]]] = {"bundled": [], "random": []}
    for seed in seeds:
        scores["bundled"].append(probe(bundled_split, shots, seed))
        fresh = random_backbone(bundled.config, seed)
        scores["random"].append(probe(split_features(fresh, pixels, labels), shots, seed))
    return {
        "seeds": list(seeds),
        "shots_per_class": shots,
        "test_images": round(TEST_SHARE * len(labels)),
        "accuracy": {name: _summary(rows) for name, rows in scores.items()},
    }


def _summary(rows: list[list[float]]) -> dict[str, dict[str, float | list[float]]]:
    columns = np.asarray(rows).T
    return {
        name: {
            "mean": round(float(column.mean()), 4),
            "min": round(float(column.min()), 4),
            "max": round(float(column.max()), 4),
            "each": [round(float(value), 4) for value in column],
        }
        for name, column in zip(("full", "few_shot"), columns, strict=True)
    }


def print_table(result: dict[str, object], console: Console) -> None:
    """Show mean test accuracies and their ranges over the seeds."""
    shots, seeds = result["shots_per_class"], result["seeds"]
    table = Table(title=f"Linear probe on scikit-learn digits, seeds {seeds}: mean (range)")
    table.add_column("weights")
    table.add_column("all training images", justify="right")
    table.add_column(f"{shots} images per class", justify="right")
    accuracy = result["accuracy"]
    assert isinstance(accuracy, dict)
    for name, row in accuracy.items():
        cells = [
            f"{cell['mean']:.3f} ({cell['min']:.3f} to {cell['max']:.3f})"
            for cell in (row["full"], row["few_shot"])
        ]
        table.add_row(name, *cells)
    console.print(table)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Linear probe of the bundled backbone on digits.")
    parser.add_argument("--model", type=Path, default=BUNDLED, help="checkpoint folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--shots", type=int, default=10, help="few-shot images of each class")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads torch may use")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    transformers_logging.disable_progress_bar()
    # BLAS threads of scikit-learn and of torch slow each other down on few cores.
    with threadpool_limits(args.threads):
        result = run(args.model, args.seeds, args.shots)
    if args.json:
        print(json.dumps(result))
    else:
        print_table(result, Console())


if __name__ == "__main__":
    main()

"""The bundled backbone: it loads whole, is small, and its pre-training is really worth something.

The probe comes from `scripts/probe_backbone.py`, so the tests and the model card use one method.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors import safe_open
from threadpoolctl import threadpool_limits
from transformers import ViTForImageClassification, ViTModel

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "fedsplit" / "assets" / "vit-glyphs"
WEIGHTS = FOLDER / "model.safetensors"
MAX_BYTES = 8_000_000


def _load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up while it loads
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def backbone() -> ViTModel:
    return ViTModel.from_pretrained(FOLDER, add_pooling_layer=False).eval()


def test_weights_file_is_small_fp32() -> None:
    assert WEIGHTS.stat().st_size <= MAX_BYTES
    with safe_open(WEIGHTS, framework="pt") as weights:
        dtypes = {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
    assert dtypes == {"F32"}


def test_no_key_is_missing_or_unexpected() -> None:
    _, info = ViTModel.from_pretrained(FOLDER, add_pooling_layer=False, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], kind


def test_image_classifier_lacks_only_its_head() -> None:
    _, info = ViTForImageClassification.from_pretrained(FOLDER, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]


def test_config_is_the_documented_one(backbone: ViTModel) -> None:
    config = backbone.config
    assert (config.image_size, config.patch_size, config.num_channels) == (32, 8, 3)
    assert config.num_hidden_layers == 6
    assert config.hidden_dropout_prob == 0
    assert config.attention_probs_dropout_prob == 0


def test_preprocessor_matches_the_training_images() -> None:
    preprocessor = json.loads((FOLDER / "preprocessor_config.json").read_text())
    assert preprocessor["image_processor_type"] == "ViTImageProcessor"
    assert preprocessor["size"] == {"height": 32, "width": 32}
    assert preprocessor["image_mean"] == preprocessor["image_std"] == [0.5] * 3
    assert preprocessor["rescale_factor"] == pytest.approx(1 / 255)


def test_weights_and_output_are_finite(backbone: ViTModel) -> None:
    assert all(torch.isfinite(weight).all() for weight in backbone.parameters())
    with torch.inference_mode():
        tokens = backbone(pixel_values=torch.zeros(2, 3, 32, 32)).last_hidden_state
    assert tokens.shape == (2, 17, backbone.config.hidden_size)
    assert torch.isfinite(tokens).all()


def test_few_shot_probe_beats_random_weights(backbone: ViTModel) -> None:
    script = _load_script("probe_backbone")
    pixels, labels = (part[:800] for part in script.digit_pixels())
    models = {"bundled": backbone, "random": script.random_backbone(backbone.config, seed=0)}
    scores: dict[str, list[float]] = {}
    # One thread: quick enough, and immune to other busy processes on the same cores.
    with threadpool_limits(1):
        for name, model in models.items():
            x_train, x_test, y_train, y_test = script.split_features(model, pixels, labels)
            draws = [script.few_shot_rows(y_train, 10, seed) for seed in range(3)]
            scores[name] = [
                script.probe_accuracy((x_train[rows], y_train[rows]), (x_test, y_test))
                for rows in draws
            ]
    assert np.mean(scores["bundled"]) > 0.80
    # The margin is far above the spread over seeds (the model card shows both).
    assert min(scores["bundled"]) > max(scores["random"]) + 0.15


def test_glyphs_are_reproducible_and_normalised() -> None:
    script = _load_script("pretrain_backbone")
    draws = []
    for _ in range(2):
        bank = script.make_bank(5, seed=3)
        draws.append(script.draw_batch(bank, 8, 1.0, torch.Generator().manual_seed(4)))
    (pixels, labels), (again, same_labels) = draws
    assert torch.equal(pixels, again)
    assert torch.equal(labels, same_labels)
    assert pixels.shape == (8, 3, 32, 32)
    assert pixels.min() >= -1
    assert pixels.max() <= 1

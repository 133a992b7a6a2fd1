"""The digest: equal where the same is computed of the same input, and what differs is said in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsplit.model.backbone import Backbone
from fedsplit.model.files import SINGLE
from fedsplit.model.processors import FILE
from tests.model.copies import WORDS, add_tokenizer, copy_of

Copy = Callable[..., Path]
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "size": 16}


@pytest.fixture
def copy(tiny: dict[str, Path], tmp_path: Path) -> Copy:
    def make(family: str = "vit", **config: Any) -> Path:
        return copy_of(
            tiny[family], tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}", **config
        )

    return make


def sha256(folder: Path) -> str:
    return Backbone.find(str(folder)).sha256


def said(one: Path, other: Path) -> str:
    return Backbone.find(str(one)).differs(sha256(other))


def with_file(folder: Path, settings: Any) -> Path:
    (folder / FILE).write_text(json.dumps(settings, indent=3))
    return folder


def test_it_covers_config_and_weights(copy: Copy) -> None:
    same, again = copy(), copy()
    assert sha256(same) == sha256(again)
    assert len(sha256(same)) == 64
    other_weights = copy()
    data = bytearray((other_weights / SINGLE).read_bytes())
    data[-1] ^= 1
    (other_weights / SINGLE).write_bytes(bytes(data))
    for other in (copy(layer_norm_eps=1e-6), other_weights):
        assert said(same, other).startswith("config.json or weights differ")


def test_it_leaves_out_what_does_not_compute(copy: Copy) -> None:
    plain, with_readme = copy(), copy()
    (with_readme / "README.md").write_text("read me")
    (with_readme / "tokenizer.json").write_text("{}")
    assert sha256(plain) == sha256(with_readme)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 16, "width": 16}},
        {"rescale_factor": 0.00392156862745098, "image_processor_type": "ViTImageProcessor"},
        {"rescale_factor": 0.003921569, "do_convert_rgb": True, "processor_class": "X"},
        {"image_mean": 0.5},
    ],
)
def test_settings_of_the_same_effect_are_equal(settings: dict[str, Any], copy: Copy) -> None:
    assert sha256(with_file(copy(), HALF)) == sha256(with_file(copy(), HALF | settings))


def test_no_file_equals_a_file_that_says_the_same(copy: Copy) -> None:
    assert sha256(copy()) == sha256(with_file(copy(), HALF))


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 18}, {"resample": 3}, {"image_mean": [0.485, 0.456, 0.406]}, {"image_std": [0.5, 0.5, 0.4]},
        {"do_normalize": False}, {"do_rescale": False}, {"do_center_crop": True, "crop_size": 12},
    ],
)  # fmt: skip
def test_settings_of_another_effect_differ_and_are_named(
    settings: dict[str, Any], copy: Copy
) -> None:
    one, other = with_file(copy(), HALF), with_file(copy(), HALF | settings)
    assert said(one, other).startswith("image preprocessing differ")


def test_tokenizers_of_the_same_effect_are_equal(copy: Copy) -> None:
    plain, other = (
        add_tokenizer(copy("bert")),
        add_tokenizer(copy("bert"), name_or_path="elsewhere"),
    )
    path = other / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7, sort_keys=True))
    assert sha256(plain) == sha256(other)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_lower_case": False},
        {"words": (*WORDS, "hose")},
        {"words": (*WORDS[:5], *WORDS[:4:-1])},
        {"model_max_length": 20},
        {"truncation_side": "left"},
    ],
)
def test_tokenizers_of_another_effect_differ_and_are_named(
    settings: dict[str, Any], copy: Copy
) -> None:
    plain, other = add_tokenizer(copy("bert")), add_tokenizer(copy("bert"), **settings)
    assert said(plain, other).startswith("tokenizer differ")


def test_both_parts_are_named(copy: Copy) -> None:
    one, other = (
        add_tokenizer(copy("bert")),
        add_tokenizer(copy("bert", layer_norm_eps=1e-6), do_lower_case=False),
    )
    assert said(one, other).startswith("config.json or weights and tokenizer differ")


def test_a_real_one(minilm: Path) -> None:
    assert Backbone.find(str(minilm)).sha256[:32] != Backbone.find(str(minilm)).sha256[32:]

"""What a preprocessor_config.json leaves unsaid or says oddly is read as transformers reads it, or told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

from fedsplit.core.errors import BackboneError
from fedsplit.model.preprocess import read_preprocess
from fedsplit.model.processors import DEFAULTS, FILE
from fedsplit.training.data import ImageTransform

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PICTURE = np.random.default_rng(0).integers(0, 256, size=(300, 260, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    def write(settings: dict[str, Any] | None, model_type: str = "vit") -> Path:
        config = {"model_type": model_type, "image_size": 48}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if settings is not None:
            (tmp_path / FILE).write_text(json.dumps(settings))
        return tmp_path

    return write


def transformers_own(name: str, settings: dict[str, Any]) -> Any:
    """The processor class in numpy, which needs no torchvision."""
    return getattr(transformers, f"{name}Pil")(**settings)


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_defaults_are_the_classes_own(name: str) -> None:
    own = transformers_own(name, {})
    said = DEFAULTS[name]
    for key in ("size", "resample", "image_mean", "image_std", "crop_pct"):
        got = getattr(own, key, None)
        if isinstance(got, tuple):
            got = list(got)
        assert said.get(key) == (dict(got) if key == "size" else got)
    assert bool(said.get("do_center_crop")) == bool(own.do_center_crop)
    if own.do_center_crop:
        assert dict(own.crop_size) == {"height": said["crop_size"], "width": said["crop_size"]}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DeiTImageProcessor", {}),
        ("ViTImageProcessor", {"size": 64}),
        ("BitImageProcessor", {"image_mean": IMAGENET[0], "image_std": IMAGENET[1]}),
        ("CLIPImageProcessor", {"size": 250}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}, "crop_pct": 0.875}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
        ("ConvNextImageProcessor", {}),
    ],
)
def test_pixels_are_those_of_transformers_own_class(
    name: str, settings: dict[str, Any], folder: Callable[..., Path]
) -> None:
    transform = ImageTransform.from_backbone(folder({"image_processor_type": name} | settings))
    wanted = transformers_own(name, settings)(Image.fromarray(PICTURE), return_tensors="np")
    got = transform(PICTURE).numpy()
    assert got.shape == wanted["pixel_values"][0].shape
    # Where an odd number of pixels is cropped away the two may start one pixel apart; nothing else may differ.
    np.testing.assert_allclose(got, wanted["pixel_values"][0], atol=1e-5)


def test_what_is_left_to_the_class_is_told(folder: Callable[..., Path]) -> None:
    (note,) = read_preprocess(folder({"image_processor_type": "DeiTImageProcessor"})).notes
    assert "leaves this to DeiTImageProcessor" in note
    assert "crop_size 224" in note


@pytest.mark.parametrize(("family", "own"), [("dinov2", "Bit"), ("deit", "DeiT"), ("vit", "ViT")])
def test_a_file_without_a_class_means_the_familys(
    family: str, own: str, folder: Callable[..., Path]
) -> None:
    (note,) = read_preprocess(folder({"do_normalize": True}, family)).notes
    assert f"{own}ImageProcessor, whose own" in note


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2"])
def test_without_the_file_the_familys_own_is_used_and_told(
    family: str, folder: Callable[..., Path]
) -> None:
    got = read_preprocess(folder(None, family))
    half = ((0.5,) * 3, (0.5,) * 3)
    assert (got.mean, got.std) == (half if family == "vit" else IMAGENET)
    assert got.size == got.output == (48, 48)
    (note,) = got.notes
    assert f"has no {FILE}: pictures are resized to 48 px" in note
    assert str(got.mean[0]) in note


def test_a_mean_for_pixels_of_255_is_followed_and_told(folder: Callable[..., Path]) -> None:
    scaled = {
        "size": 16,
        "resample": 2,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.2, 0.2],
    }
    wide = scaled | {k: [255 * v for v in scaled[k]] for k in ("image_mean", "image_std")}  # type: ignore[attr-defined]
    wanted = ImageTransform.from_backbone(folder(scaled))(PICTURE)
    transform = ImageTransform.from_backbone(folder(wide))
    np.testing.assert_allclose(transform(PICTURE), wanted, atol=1e-5)
    (note,) = transform.settings.notes
    assert "pixels of 0 .. 255" in note


WHOLE = {"size": 32, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"crop_pct": 0.9}, "not followed: crop_pct=0.9"),
        ({"do_pad": True, "size_divisor": 32}, "not followed: do_pad=True, size_divisor=32"),
        ({"do_flip_channel_order": True}, "not followed: do_flip_channel_order"),
        ({"do_resize": False}, "not followed: do_resize=false"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, r"not followed: size\.longest_edge"),
        ({"size": {"shortest_edge": 32}}, "no crop: of a picture that is not square the middle"),
        ({"image_processor_type": "LevitImageProcessor"}, "what the class LevitImageProcessor does"),
        ({"do_center_crop": True, "crop_size": 48}, "crop_size is larger than size"),
        ({"do_rescale": False}, "a white one 509, which is far from"),
        ({"rescale_factor": 1.0}, "a white one 509, which is far from"),
        ({"image_std": [0.001] * 3}, "far from what backbones are trained on"),
    ],
)  # fmt: skip
def test_what_changes_pixels_and_is_not_followed_is_told(
    settings: dict[str, Any], says: str, folder: Callable[..., Path]
) -> None:
    notes = read_preprocess(folder(WHOLE | settings)).notes
    assert len([note for note in notes if re.search(says, note)]) == 1


def test_what_changes_nothing_is_not_told(folder: Callable[..., Path]) -> None:
    idle = {
        "do_pad": False,
        "do_convert_rgb": True,
        "auto_map": {"AutoImageProcessor": "own.Own"},
        "offset": None,
    }
    assert not read_preprocess(folder(WHOLE | idle)).notes


def test_an_unknown_class_that_leaves_values_out_is_refused(folder: Callable[..., Path]) -> None:
    says = r"leaves image_mean, image_std to its class 'Own.*write them into the file"
    with pytest.raises(BackboneError, match=says):
        read_preprocess(folder({"image_processor_type": "OwnProcessor", "size": 32, "resample": 3}))

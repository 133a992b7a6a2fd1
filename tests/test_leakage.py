"""experiments/leakage: what the docs say of each mode holds on the bundled backbone, on tensors of real training steps."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from experiments.leakage import inputs, labels, measure, steps, table
from experiments.leakage import scene as scenes
from experiments.leakage.__main__ import main
from experiments.leakage.scene import Scene
from experiments.leakage.wire import Recorder
from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Array, Mask, Want

CUT = Cut(1, 5)


@pytest.fixture(scope="module")
def digits() -> Scene:
    return scenes.digits(160, 200)


@pytest.fixture(scope="module")
def seen(digits: Scene) -> dict[str, steps.Seen]:
    return {mode: steps.train(digits, mode, CUT, epochs=2) for mode in steps.MODES}


@pytest.mark.parametrize(
    ("mode", "crossed"),
    [
        ("head+tail", {"h", "z", "dz", "dh"}),
        ("hosted", {"h", "z", "dz"}),
        ("frozen", {"h", "z"}),
        ("zeroth-order", {"h", "z", "losses"}),
    ],
)
def test_what_crosses_in_each_mode(
    seen: dict[str, steps.Seen], mode: str, crossed: set[str]
) -> None:
    found = seen[mode].tensors
    assert set(found) == crossed
    for name in crossed - {"losses"}:
        assert found[name].shape == (160, 17, 128)
    assert seen[mode].accuracy > 0.9


@pytest.mark.parametrize("mode", ["head+tail", "hosted"])
def test_gradients_tell_every_label(seen: dict[str, steps.Seen], mode: str) -> None:
    found, chance = labels.clustering(seen[mode].tensors["dz"], seen[mode].labels)
    assert found > 0.98
    assert chance < 0.3


def test_losses_of_a_batch_tell_no_label_of_a_sample(seen: dict[str, steps.Seen]) -> None:
    of = seen["zeroth-order"]
    assert of.tensors["losses"].shape == (5, 4)
    found, chance = labels.clustering(of.tensors["losses"][of.steps_of], of.labels)
    assert found < chance + 0.15


def test_the_loss_of_one_sample_tells_its_label_to_who_has_the_module(
    digits: Scene, seen: dict[str, steps.Seen]
) -> None:
    known = seen["zeroth-order"]
    one = steps.train(
        digits, "zeroth-order", CUT, epochs=1, batch=1, indices=np.arange(40), after=known
    )
    assert one.tensors["losses"].shape == (40, 4)
    shares = steps.log_shares(digits, known, one)
    assert labels.of_losses(one.tensors["losses"][:, 0], shares, one.labels) > 0.7


def test_without_gradients_the_backbones_own_clusters_remain(
    digits: Scene, seen: dict[str, steps.Seen]
) -> None:
    """Not nothing, and not what the gradients tell: as much as the public backbone sees in the images."""
    of = seen["frozen"]
    found, chance = labels.clustering(steps.features(of), of.labels)
    assert chance + 0.2 < found < 0.98
    assert steps.features(of).shape == (160, 128)


def test_the_patch_embedding_turns_round(digits: Scene) -> None:
    truth = np.stack([digits.transform.resize(digits.site.image(i)) for i in range(16)])
    decode = inputs.pseudo_inverse(digits, grey=True)
    exact, half = (
        inputs.psnr(truth, decode(inputs.Uplink(digits, 0, codec)(truth)))
        for codec in ("fp32", "fp16")
    )
    assert exact > half > 30
    assert inputs.psnr(truth, inputs.mean_colour(truth)) < 15


def test_a_decoder_of_other_images_sees_less_the_deeper_the_cut(digits: Scene) -> None:
    truth = np.stack([digits.transform.resize(digits.site.image(i)) for i in range(16)])
    public = digits.public["photos"]
    found = []
    for a in (0, 2):
        up = inputs.Uplink(digits, a, "fp32")
        decode = inputs.linear_decoder(up(public), public, inputs.patch_side(digits))
        found.append(inputs.psnr(truth, decode(up(truth))))
    assert found[0] > 30
    assert found[0] > found[1] > inputs.psnr(truth, inputs.mean_colour(truth)) + 3


def test_patches_there_and_back() -> None:
    pixels = np.random.default_rng(0).random((2, 8, 8, 3))
    there = inputs._to_patches(pixels, 4)
    assert there.shape == (2, 4, 48)
    assert np.array_equal(inputs._from_patches(there, 4), pixels)


def test_matching_and_scores() -> None:
    truth = np.array([0, 0, 1, 1, 2, 2])
    assert labels.matched(np.array([2, 2, 0, 0, 1, 1]), truth) == 1
    assert labels.matched(np.array([0, 0, 0, 0, 1, 1]), truth) == pytest.approx(4 / 6)
    lengths = np.array([[9.0], [8], [1], [2], [1], [1]], dtype=np.float32)
    assert labels.norm_score(lengths, (truth == 0).astype(np.int64)) == 1
    assert labels.classes_of(np.array([-1.0, 3, 2, 0], dtype=np.float32), np.array([1, 3])) == (
        0.5,
        0.5,
    )


class _Echo:
    trains = False

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, want: Want = "output"
    ) -> Array:
        return np.stack([h_BTD, h_BTD]) if want == "probes" else h_BTD + 1

    def settle(self, step: int, answer: Array, *, quiet: bool = False) -> Array | None:
        return None if quiet or answer.ndim == 1 else answer * 2

    def close(self) -> None: ...


def test_the_recorder_keeps_what_the_codec_leaves() -> None:
    third = np.full((1, 1, 2), 1 / 3, dtype=np.float32)
    wire = Recorder(_Echo(), "fp16")
    z = wire.encode(1, third)
    wire.settle(1, z)
    wire.settle(2, third, quiet=True)
    wire.encode(3, third, want="probes")
    wire.settle(3, np.ones(2, dtype=np.float32))
    half = third.astype(np.float16).astype(np.float32)
    assert np.array_equal(wire.seen["h"][0], half)
    assert np.array_equal(wire.seen["z"][0], z)
    assert [len(wire.seen[name]) for name in ("h", "z", "dz", "dh", "losses")] == [2, 2, 2, 1, 1]
    assert wire.seen["z"][1].shape == (2, 1, 1, 2)


def test_rows_become_tables(tmp_path: Path, digits: Scene) -> None:
    rows = list(measure.class_rows(digits, epochs=1, sites=2))
    assert rows[0].value >= rows[0].reference == 0.2
    paths = table.write(rows, tmp_path)
    with paths[0].open(newline="") as file:
        (read,) = csv.DictReader(file)
    assert read["target"] == "classes"
    assert float(read["reference"]) == 0.2
    page = paths[1].read_text()
    assert "## digits, vit-glyphs: classes" in page
    assert "| all that average a classifier | 1,5 | fp32 |" in page


def test_cifar10_is_left_out_where_it_is_not(tmp_path: Path) -> None:
    assert scenes.cifar10(100, 100, data=tmp_path) is None


@pytest.mark.parametrize("words", [["--samples", "10"], ["--images", "0"], ["--scene", "mnist"]])
def test_a_bad_command_line(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2

"""experiments/prepare.py: raw files in, what fedsplit reads out; on small made-up sources, and on the real ones where they are."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import prepare
from fedsplit.training.data import load_source
from tests.conftest import SHARED

NO_MINILM = [name for name in prepare.PIECES if name != "minilm"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A source folder of the real one's layout: 30 photos, 12 crops of 6 boards, some texts, a model folder."""
    root = tmp_path / "source"
    for folder in ("cifar10", "deeppcb", "banking77", "work_orders"):
        (root / "data" / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    np.savez(root / prepare.CIFAR, classes=np.array(["cat", "dog"]), **photos(rng))
    np.savez(root / prepare.PCB, classes=np.array(["normal", "open"]), **crops(rng))
    for name in prepare.BANKING:
        (root / name).write_text('text,category\n"my card, please",card\nwhere is it?,arrival\n')
    for i, name in enumerate(prepare.ORDERS):
        (root / name).write_text(f"pump {i}  leaks,Leak\nstopped,Plugged / choked\n")
    model = root / "models" / "vit-tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    model.chmod(0o555)  # as on a machine where the source must not be changed
    return root


def photos(rng: np.random.Generator) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for side, count in (("train", 20), ("test", 10)):
        files = []
        for shade in range(count):
            stream = io.BytesIO()
            Image.new("RGB", (32, 32), (shade * 10, 0, 200)).save(stream, "jpeg")
            files.append(np.frombuffer(stream.getvalue(), np.uint8))
        arrays[f"{side}_bytes"] = np.concatenate(files)
        arrays[f"{side}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{side}_labels"] = rng.permutation(np.arange(count) % 2).astype(np.uint8)
    return arrays


def crops(rng: np.random.Generator) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for side in ("train", "test"):
        bits = rng.integers(0, 2, (6, 96, 96), dtype=np.uint8)
        arrays[f"{side}_packed"] = np.packbits(bits.reshape(6, -1), axis=1)
        arrays[f"{side}_labels"] = np.array([0, 1] * 3, dtype=np.uint8)
        arrays[f"{side}_image_id"] = np.repeat(np.arange(3, dtype=np.int32), 2)
    return arrays


def made(source: Path, out: Path, *more: str) -> Path:
    assert prepare.main([str(source), "--out", str(out), *more]) == 0
    return out


def test_everything_reads_as_a_source(source: Path, tmp_path: Path) -> None:
    out = made(source, tmp_path / "out", "--only", *NO_MINILM)
    cifar = load_source(f"npz:{out / 'cifar10.npz'}", site="a")
    assert len(cifar) == 30
    assert cifar.classes == ("cat", "dog")
    assert np.abs(cifar.image(7).astype(int) - (70, 0, 200)).max() < 5
    boards = load_source(f"npz:{out / 'deeppcb.npz'}", site="a")
    assert boards.groups is not None
    assert boards.groups.tolist() == np.repeat(np.arange(6), 2).tolist()
    assert set(np.unique(boards.image(3))) == {0, 255}
    texts = load_source(f"csv:{out / 'banking77.csv'}", site="a")
    assert texts.text(0) == "my card, please"
    assert texts.classes == ("arrival", "card")
    orders = load_source(f"csv:{out / 'work-orders.csv'}", site="a")
    assert [orders.text(i) for i in (0, 4)] == ["pump 0 leaks", "pump 2 leaks"]
    assert (out / "vit-tiny" / "model.safetensors").read_bytes() == b"weights"
    assert sorted(p.name for p in out.iterdir()) == sorted(
        prepare.PIECES[name].target for name in NO_MINILM
    )


def test_a_second_time_replaces_the_first(source: Path, tmp_path: Path) -> None:
    out = made(source, tmp_path / "out", "--only", "vit-tiny", "work-orders")
    (out / "vit-tiny" / "old.txt").write_text("")
    made(source, out, "--only", "vit-tiny", "--link")
    assert (out / "vit-tiny").is_symlink()
    made(source, out, "--only", "vit-tiny")
    assert not (out / "vit-tiny").is_symlink()
    assert not (out / "vit-tiny" / "old.txt").exists()
    assert (source / "models" / "vit-tiny" / "config.json").exists()


def test_subsets(source: Path, tmp_path: Path) -> None:
    chosen = ("--cifar10", "8", "--boards", "2", "--banking77", "2")
    out = made(source, tmp_path / "out", *chosen, "--only", "cifar10", "deeppcb", "banking77")
    cifar = load_source(f"npz:{out / 'cifar10.npz'}", site="a")
    assert np.bincount(cifar.labels).tolist() == [4, 4]
    boards = load_source(f"npz:{out / 'deeppcb.npz'}", site="a")
    assert boards.groups is not None
    assert np.bincount(boards.groups).tolist() == [2, 2]
    assert len(load_source(f"csv:{out / 'banking77.csv'}", site="a")) == 2


def test_balanced_takes_as_many_of_each_class_as_there_are() -> None:
    labels = np.array([0] * 9 + [1] * 2 + [2] * 9)
    assert np.bincount(labels[prepare.balanced(labels, 12)]).tolist() == [5, 2, 5]
    assert len(prepare.balanced(labels, 0)) == len(prepare.balanced(labels, 99)) == 20


def test_all_that_is_missing_is_named_at_once(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / prepare.CIFAR).unlink()
    (source / prepare.ORDERS[1]).unlink()
    out = tmp_path / "out"
    assert prepare.main([str(source), "--out", str(out), "--only", *NO_MINILM]) == 2
    told = capsys.readouterr().err
    assert "cifar10_jpeg_20k_5k.npz is not there; give the folder that holds data/ and" in told
    assert "work-orders: " in told
    assert not out.exists()


@pytest.mark.parametrize(
    ("need", "content", "name", "pattern"),
    [
        (prepare.CIFAR, b"no zip", "cifar10", "ValueError"),
        (prepare.BANKING[0], b"a,b\n", "banking77", "train.csv does not start with text,category"),
        (prepare.ORDERS[0], b"a,b,c\n", "work-orders", "train.txt:1: 3 columns, not 2"),
    ],
)
def test_a_source_that_is_something_else(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    *,
    need: str,
    content: bytes,
    name: str,
    pattern: str,
) -> None:
    (source / need).write_bytes(content)
    out = tmp_path / "out"
    assert prepare.main([str(source), "--out", str(out), "--only", name]) == 2
    told = capsys.readouterr().err
    assert f"error: {name}: " in told
    assert pattern in told
    assert list(out.iterdir()) == []


def test_minilm_without_its_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(prepare, "MINILM", "no_such_package")
    assert prepare.main([str(tmp_path), "--out", str(tmp_path / "o"), "--only", "minilm"]) == 2
    assert "the package no-such-package is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["x", "--only", "mnist"], ["x", "--boards", "-1"]])
def test_a_bad_command_line(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSPLIT_SHARED", raising=False)
    with pytest.raises(SystemExit) as ended:
        prepare.main(words)
    assert ended.value.code == 2


def test_the_real_sources(tmp_path: Path) -> None:
    """The small ones of the real files; CIFAR-10's JPEGs are decoded in test_real_photos_as_npz."""
    shared = Path(os.environ.get("FEDSPLIT_SHARED", SHARED))
    if not shared.is_dir():
        pytest.skip(f"real files are not on this machine: {shared.name}; set FEDSPLIT_SHARED")
    out = made(shared, tmp_path, "--link", "--only", "deeppcb", "banking77", "work-orders")
    boards = load_source(f"npz:{out / 'deeppcb.npz'}", site="a")
    assert boards.groups is not None
    assert (len(boards), len(boards.classes), len(np.unique(boards.groups))) == (11_513, 7, 1_500)
    assert len(load_source(f"csv:{out / 'banking77.csv'}", site="a")) == 13_083
    orders = load_source(f"csv:{out / 'work-orders.csv'}", site="a")
    assert (len(orders), len(orders.classes)) == (626, 22)

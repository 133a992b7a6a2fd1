"""`fedsplit evaluate` as people type it: tables, one JSON object, and what cannot be judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from fedsplit.cli.main import call


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 scanned digits of three classes; one of each class has a wrong label."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    root = tmp_path_factory.mktemp("photos")
    for label in range(3):
        folder = root / str(label)
        folder.mkdir()
        for i in [j for j in range(400) if digits.target[j] == label][:12]:
            Image.fromarray((digits.images[i] * 15).astype("uint8")).save(folder / f"写真-{i}.png")
        odd = next(i for i in range(400, 500) if digits.target[i] == (label + 1) % 3)
        Image.fromarray((digits.images[odd] * 15).astype("uint8")).save(folder / f"odd-{odd}.png")
    return root


def test_a_page_with_pictures(
    trained_image_module: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--module", str(trained_image_module), "--data", f"folder:{photos}", "--json"]
    assert call(["evaluate", *args, "--out", str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out)
    page = Path(found["page"]).read_text(encoding="utf-8")
    assert "odd-" in page
    assert (tmp_path / "out" / "wrong.png").is_file()
    assert (tmp_path / "out" / "confusion.svg").is_file()


def test_the_json_object(
    trained_image_module: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--module", str(trained_image_module), "--data", f"folder:{photos}", "--json"]
    assert call(["evaluate", *args, "--against", str(trained_image_module), "--risk", "0.2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 39
    assert found["accuracy"] == pytest.approx(sum(found["confusion"][i][i] for i in range(10)) / 39)
    assert found["recall"]["0"] == pytest.approx(found["confusion"][0][0] / 13)
    assert found["recall"]["9"] is None
    odd = [w for w in found["wrong"] if Path(w["input"]).name.startswith("odd-")]
    assert len(odd) == 3  # what is labelled wrongly is among what it "got wrong"
    assert all(
        w["probability"] >= v["probability"]
        for w, v in zip(found["wrong"], found["wrong"][1:], strict=False)
    )
    assert any("there is no sample of 3, 4" in note for note in found["notes"])
    assert found["against"]["p"] == 1.0
    assert found["against"]["told_apart"] is False


def test_the_tables(
    trained_image_module: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--module", str(trained_image_module), "--data", f"folder:{photos}"]
    assert call(["evaluate", *args, "--against", str(trained_image_module)]) == 0
    told = capsys.readouterr().out
    for words in (
        "Recall",
        "Ask a person below",
        "always ask",
        "Labels (rows) and answers (columns)",
        "cannot tell them apart",
    ):
        assert words in told
    assert "Wrong, the surest first" in told


def test_what_cannot_be_judged(
    trained_image_module: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = ["evaluate", "--module", str(trained_image_module), "--data"]
    (tmp_path / "empty").mkdir()
    for data, said in (
        (f"folder:{tmp_path / 'empty'}", "the folder is empty"),
        ("floder:x", "is not known"),
        (f"folder:{tmp_path / 'gone'}", "does not exist"),
    ):
        assert call([*module, data]) == 2
        told = capsys.readouterr().err
        assert said in told, told
        assert "site 'here'" not in told
    assert call([*module, f"folder:{photos}", "--risk", "2"]) == 2
    assert "--risk 2 is no share" in capsys.readouterr().err
    assert call(["evaluate", "--module", str(tmp_path), "--data", f"folder:{photos}"]) == 2
    assert "has no module" in capsys.readouterr().err

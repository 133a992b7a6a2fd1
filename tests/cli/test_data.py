"""`fedsplit data`: what a person sees of a source, and the one JSON object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsplit.cli.main import call


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in ("傷", "良品"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(4):
            noise = np.random.default_rng([i, ord(name[0])]).integers(0, 256, (10, 12, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / "set" / name / f"{i}.png")
    double = tmp_path / "set" / "傷" / "0.png"
    (tmp_path / "set" / "良品" / "copy.png").write_bytes(double.read_bytes())
    (tmp_path / "set" / "傷" / "copy.png").write_bytes(double.read_bytes())
    return tmp_path / "set"


def answer(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict[str, Any]]:
    code = call(["data", *args, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_images_with_doubles(pictures: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:  # fmt: skip
    sheet = tmp_path / "sheet.png"
    code, told = answer(capsys, f"folder:{pictures}", "--sheet", str(sheet))
    assert code == 0
    assert told["classes"] == {"傷": 5, "良品": 5}
    assert told["sizes"] == {"12x10": 10}
    assert told["range"] == {"white": 255.0}
    assert told["duplicates"] == {"within": 1, "across": 3}
    assert any("have different classes, so labels are wrong" in note for note in told["notes"])
    assert told["errors"] == []
    for name, counts in told["split"].items():
        assert counts["train"] + counts["test"] == told["classes"][name]
    with Image.open(sheet) as image:
        assert image.size[0] > 800
        assert len(set(np.asarray(image.convert("L")).ravel())) > 50


def test_what_cannot_be_read_is_an_error_in_the_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = answer(capsys, f"folder:{tmp_path / 'none'}")
    assert code == 2
    assert told["classes"] == {}
    assert told["errors"][0].startswith(str(tmp_path / "none"))
    assert "does not exist" in told["errors"][0]
    assert call(["data", "nonsense"]) == 2
    assert "is not known" in capsys.readouterr().err


def test_texts_through_a_backbone(
    tmp_path: Path, minilm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.csv"
    rows = "\n".join(f"{'word ' * n},{'long' if n > 100 else 'short'}" for n in (3, 5, 400, 900))
    path.write_text(f"text,label\n{rows}\n検査装置の異常,short\n", encoding="utf-8")
    code, told = answer(capsys, f"csv:{path}", "--backbone", str(minilm), "--set", "max-length=64")
    assert code == 0
    assert told["tokens"]["cut"] == 2
    assert told["tokens"]["largest"] > 900
    assert "2 of 5 texts are longer than 64 tokens and are cut there" in "\n".join(told["notes"])
    assert told["range"] is None
    path.write_text("text,label\n検査装置の異常,a\n検品工程停止,b\n設備点検,a\n", encoding="utf-8")
    _, told = answer(capsys, f"csv:{path}", "--backbone", str(minilm))
    assert told["tokens"]["unknown_share"] > 0.05
    assert any("unknown to the backbone's tokenizer" in note for note in told["notes"])


def test_a_backbone_of_the_other_kind_is_told(
    pictures: Path, minilm: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sheet = str(tmp_path / "s.png")
    code, told = answer(capsys, f"folder:{pictures}", "--backbone", str(minilm), "--sheet", sheet)
    assert code == 0
    assert any("reads texts: it cannot train on them" in note for note in told["notes"])


def test_what_is_guessed_of_an_image_backbone_is_told(
    pictures: Path, tiny: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sheet = str(tmp_path / "s.png")
    code, told = answer(
        capsys, f"folder:{pictures}", "--backbone", str(tiny["dinov2"]), "--sheet", sheet
    )
    assert code == 0
    assert any("has no preprocessor_config.json" in note for note in told["notes"])


def test_a_machine_without_a_font_for_the_names_is_told(
    pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    from fedsplit.report import contact_sheet, fonts

    monkeypatch.setattr(fonts, "wide_files", lambda: ())
    monkeypatch.setattr(contact_sheet, "MOST_CLASSES", 1)
    _, told = answer(capsys, f"folder:{pictures}", "--sheet", str(tmp_path / "s.png"))
    assert "the contact sheet shows the first 1 of 2 classes" in told["notes"]
    assert any("show boxes in place of them" in note for note in told["notes"])

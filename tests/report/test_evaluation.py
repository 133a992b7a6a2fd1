"""What `fedsplit evaluate --out` leaves: pictures, contact sheet and page, with names that are Japanese, long or hostile."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fedsplit.core.errors import RunDirError
from fedsplit.predict.found import FoundModule
from fedsplit.predict.judge import compare, compare_numbers, judge_classes, judge_numbers
from fedsplit.predict.judge.judged import Judged
from fedsplit.report.evaluation import PAGE, SHEET, write
from fedsplit.training.data import load_source

CLASSES = ("OK", "きず", "汚れ$x$", "<b>dent")
MODULE = FoundModule(Path("m"), "ab" * 32, "表面@<script>alert(1)</script>", "surface")


def images(folder: Path, each: int = 12) -> Path:
    """A few noisy squares a class, with Japanese and hostile file names."""
    rng = np.random.default_rng(0)
    for place, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 60, (32, 32, 3), np.uint8) + np.uint8(60 * place)
            stem = "検査画像_ライン3_2026-11-28_" if i % 2 else "<img src=x>"
            Image.fromarray(pixels).save(folder / name / f"{stem}{i}.png")
    return folder


def judged_classes(folder: Path, *, skill: float = 1.5, risk: float = 0.2) -> Judged:
    """Made-up answers on real samples."""
    source = f"folder:{images(folder)}"
    examples = load_source(source, site="here", classes=CLASSES)
    return _of_classes(source, examples, skill, risk)


def _of_classes(source: str, examples: object, skill: float, risk: float) -> Judged:
    from fedsplit.training.data import Examples

    assert isinstance(examples, Examples)
    n, c = len(examples), len(examples.classes)

    def shares(seed: int) -> NDArray[np.float64]:
        logits = np.random.default_rng(seed).normal(size=(n, c))
        logits[np.arange(n), examples.labels] += skill
        raised = np.exp(logits)
        return raised / raised.sum(axis=1, keepdims=True)

    mine, other = shares(1), shares(2)
    answers, sure = mine.argmax(axis=1), mine.max(axis=1)
    off = np.flatnonzero(answers != examples.labels)
    compared = compare(answers, other.argmax(axis=1), examples.labels)
    return Judged(
        source=source, module=MODULE, examples=examples,
        verdict=judge_classes(mine, examples.labels, examples.classes, risk=risk),
        answers=answers.astype(np.float64), sure=sure,
        wrong=tuple(int(i) for i in off[np.argsort(-sure[off])]),
        against=(FoundModule(Path("o"), "cd" * 32, "other", ""), compared),
        notes=("whether the module was trained on some of the samples is not known",),
    )  # fmt: skip


def parts_from_outside(page: str) -> list[str]:
    """What the page would load."""
    found = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    return [one for one in found if not one.startswith("data:image/png;base64,")]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Judged, Path]:
    folder = tmp_path_factory.mktemp("evaluation")
    judged = judged_classes(folder / "photos")
    assert write(folder / "out", judged) == folder / "out" / PAGE
    return judged, folder / "out"


def test_the_folder_has_pictures_a_sheet_and_one_page(written: tuple[Judged, Path]) -> None:
    judged, out = written
    names = {"confusion", "recall", "reliability", "risk-coverage"}
    assert {p.name for p in out.iterdir()} == {
        PAGE, SHEET, *(f"{name}.{kind}" for name in names for kind in ("png", "svg")),
    }  # fmt: skip
    page = (out / PAGE).read_text(encoding="utf-8")
    assert parts_from_outside(page) == []
    assert page.count("data:image/png") == 4 + len(judged.wrong)
    assert "<script" not in page
    assert "<b>dent" not in page
    assert "<img src=x>" not in page
    assert "&lt;b&gt;dent" in page
    assert "きず" in page
    assert "検査画像_ライン3_2026-11-28_" in page
    assert "Whether the module was trained on some of the samples is not known." in page
    assert "McNemar" in page
    rows = -(-len(judged.wrong) // 6)
    with Image.open(out / SHEET) as sheet:
        assert sheet.height > rows * 128


def test_a_new_evaluation_leaves_no_old_sheet(tmp_path: Path) -> None:
    write(tmp_path / "out", judged_classes(tmp_path / "photos"))
    perfect = _of_classes(
        f"folder:{tmp_path / 'photos'}",
        load_source(f"folder:{tmp_path / 'photos'}", site="here", classes=CLASSES), 50.0, 0.2,
    )  # fmt: skip
    assert perfect.wrong == ()
    page = write(tmp_path / "out", perfect).read_text(encoding="utf-8")
    assert "None." in page
    assert not (tmp_path / "out" / SHEET).exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="cannot be made a folder"):
        write(tmp_path / "file", perfect)


def test_texts_and_many_classes(tmp_path: Path) -> None:
    table = tmp_path / "texts.csv"
    rows = [f"ポンプ {i} <i>leaks</i>,kind {i % 60:02d}" for i in range(180)]
    table.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    examples = load_source(f"csv:{table}", site="here")
    judged = _of_classes(f"csv:{table}", examples, 3.0, 0.1)
    out = tmp_path / "out"
    page = write(out, judged).read_text(encoding="utf-8")
    assert not (out / "recall.png").exists()
    assert not (out / SHEET).exists()
    assert "ポンプ" in page
    assert "&lt;i&gt;leaks" in page
    assert "texts.csv:" in page


def test_numbers_have_residuals(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = tmp_path / "numbers.csv"
    labels = rng.normal(50, 10, 80).round(3)
    table.write_text(
        "text,label\n" + "".join(f"part {i},{y}\n" for i, y in enumerate(labels)), encoding="utf-8"
    )
    examples = load_source(f"csv:{table}", site="here", target="number")
    answers, other = labels + rng.normal(0, 2, 80), labels + rng.normal(0, 4, 80)
    judged = Judged(
        source=f"csv:{table}", module=MODULE, examples=examples, verdict=judge_numbers(answers, labels),
        answers=answers, sure=np.ones(80), wrong=tuple(np.argsort(-np.abs(answers - labels)).tolist()),
        against=(FoundModule(Path("o"), "cd" * 32, "other", ""), compare_numbers(answers, other, labels)), notes=(),
    )  # fmt: skip
    page = write(tmp_path / "out", judged).read_text(encoding="utf-8")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {PAGE, "residuals.png", "residuals.svg"}  # fmt: skip
    assert "root mean squared error" in page
    assert "The first 60 of 80." in page
    assert "the sign test" in page

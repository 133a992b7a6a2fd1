"""The ranked picture of a grid's final accuracies, and the pages and pictures of docs/ that are made of such rows."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from fedsplit.core.errors import RunDirError
from fedsplit.experiment.results import Row, read_csv, write_csv
from fedsplit.report.comparison_table import Columns
from fedsplit.report.ranking import places, ranking, write_ranking

ROOT = Path(__file__).resolve().parents[2]
METHODS = ["Low", "High", "Bound", "Failed"]


def row(method: str, seed: int, reached: float | None, **other: object) -> Row:
    fields: dict[str, object] = {
        "run": f"{method}-{seed}", "method": method, "problem": "p", "axes": (("partition", "iid"), ("sites", 4)),
        "seed": seed, "outcome": "complete", "accuracy_global": reached, "bytes_module_up": 1500,
    }  # fmt: skip
    return Row.model_validate(fields | other)


@pytest.fixture
def rows() -> list[Row]:
    found = [row("Low", s, 0.5 + 0.01 * s) for s in range(3)]
    found += [row("High", s, 0.6 + 0.02 * s) for s in range(2)]
    found += [row("Bound", s, 0.9, gathers_data=True) for s in range(3)]
    return [*found, row("Failed", 0, 0.99, outcome="failed", reason='a "quoted",\nreason')]


def texts(axes: object) -> list[str]:
    return [text.get_text() for text in axes.texts]  # type: ignore[attr-defined]


def test_the_best_is_on_top_and_a_bound_is_no_rival(rows: list[Row]) -> None:
    found = places(rows, METHODS, Columns(rows), "iid")
    assert [place.method for place in found] == ["Bound", "High", "Low"]
    figure = ranking(rows, METHODS)
    (axes,) = figure.axes
    assert axes.get_xlim() == (0, 100)
    labels = axes.get_yticklabels()
    assert [t.get_text() for t in labels] == ["Bound (data in one place)", "High (n=2)", "Low"]
    assert [t.get_fontweight() for t in labels] == ["normal", "bold", "bold"]
    assert {"61.0 %", "51.0 %", "1.50 kB"} <= set(texts(axes))
    # Differences of the two seeds that both have: 10 and 11 points; Student's t for one degree of freedom is 12.7.
    told = "in colour: 10.5 points apart, outside the noise (95 %: 4.1 to 16.9)"
    assert told in texts(axes)


def test_one_seed_tells_no_difference(rows: list[Row]) -> None:
    (axes,) = ranking([r for r in rows if r.seed == 0], METHODS).axes
    assert "in colour: too few seeds to tell the difference from noise" in texts(axes)


def test_nothing_is_cut_off(rows: list[Row]) -> None:
    long = [
        r.model_copy(update={"method": f"{r.method}, {'long name ' * 8}", "problem": problem})
        for r in rows
        for problem in ("p", "q")
    ]
    figure = ranking(long, list(dict.fromkeys(r.method for r in long)))
    figure.draw_without_rendering()
    for axes in figure.axes:
        for text in (*axes.texts, *axes.get_yticklabels(), axes.title):
            box = text.get_window_extent()
            assert figure.bbox.x0 <= box.x0, text
            assert box.x1 <= figure.bbox.x1, text


def test_it_is_written_beside_the_others(rows: list[Row], tmp_path: Path) -> None:
    written = write_ranking(tmp_path, rows, methods=METHODS)
    assert [path.name for path in written] == ["accuracy-final.png", "accuracy-final.svg"]
    assert all(path.stat().st_size > 1000 for path in written)
    assert write_ranking(tmp_path, rows[-1:], methods=METHODS) == ()


def test_what_was_written_is_read_back(rows: list[Row], tmp_path: Path) -> None:
    other = (("partition", "dirichlet:0.1"), ("rate", 0.5), ("cached", True))
    rows = [*rows, row("Low", 4, None, axes=other, problem="", bytes_module_up=0)]
    path = tmp_path / "results.csv"
    write_csv(path, rows)
    assert read_csv(path) == rows
    # As an earlier version wrote it.
    head, *lines = path.read_text(encoding="utf-8").split("\n")
    assert head.endswith(",gathers_data")
    shorter = "\n".join(line.removesuffix(",True").removesuffix(",False") for line in lines)
    path.write_text(head.removesuffix(",gathers_data") + "\n" + shorter, encoding="utf-8")
    assert read_csv(path) == [r.model_copy(update={"gathers_data": False}) for r in rows]


@pytest.mark.parametrize("text", ["run,method\na,b\n", "run,method,seed\na\n", "\0", "run\na,b\n"])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text(text, encoding="utf-8")
    if text == "\0":
        path.write_bytes(b"run\n\xff\n")
    with pytest.raises(RunDirError, match=r"results\.csv"):
        read_csv(path)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "results_pages", ROOT / "scripts" / "results_pages.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_and_pictures_are_up_to_date(script: ModuleType) -> None:
    assert len(script.pages()) >= 15
    assert not list(script.out_of_date()), "run: python scripts/results_pages.py"


def test_another_number_is_noticed_and_mended(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "skew-order"
    (tmp_path / "results").mkdir()
    (tmp_path / "images").mkdir()
    for kind in ("csv", "md"):
        shutil.copy(ROOT / "docs" / "results" / f"{name}.{kind}", tmp_path / "results")
    monkeypatch.setattr(script, "DOCS", tmp_path)
    monkeypatch.setattr(script, "PICTURES", {"picture": (name,)})
    page, picture = tmp_path / "results" / f"{name}.md", tmp_path / "images" / "picture.png"
    before = page.read_text(encoding="utf-8")
    page.write_text(before.replace("71.9 ± 2.4", "**99.9 ± 2.4**"), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["results_pages.py", "--check"])
    assert script.main() == 1
    monkeypatch.setattr("sys.argv", ["results_pages.py"])
    assert script.main() == 0
    assert page.read_text(encoding="utf-8") == before
    assert picture.stat().st_size > 1000
    monkeypatch.setattr("sys.argv", ["results_pages.py", "--check"])
    assert script.main() == 0

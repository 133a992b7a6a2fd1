"""`fedsplit predict`: rows, CSV and JSON of every kind of input, and what a person is told where one is wrong."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsplit.cli.main import call
from fedsplit.predict.predictor import load_predictor
from fedsplit.predict.usage import used
from tests.predict.samples import photos

from .conftest import COMMAND


def answer(
    capsys: pytest.CaptureFixture[str], module: Path, *args: str | Path
) -> tuple[int, dict[str, Any]]:
    code = call(["predict", "--module", str(module), *map(str, args), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_folder_with_subfolders_as_csv(
    trained_image_module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    photos(Path("photos"))
    (tmp_path / "photos" / "readme.md").write_text("no image")
    module = str(trained_image_module)
    assert call(["predict", "--module", module, "photos", "--csv", "out.csv", "--scores"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "1 .md" in said.err
    assert "4 images in" in said.err
    with Path("out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["input"] for row in rows] == [
        "photos/b/deeper/1.png", "photos/b/deeper/3.png", "photos/検査/0.png", "photos/検査/2.png",
    ]  # fmt: skip
    predictor = load_predictor(trained_image_module)
    prepared = [predictor.prepare(Path(row["input"])) for row in rows]
    shares = predictor.probabilities(predictor.outputs(prepared))
    for row, own in zip(rows, shares, strict=True):
        assert row["class"] == predictor.classes[own.argmax()]
        assert float(row["probability"]) == own.max()
        assert [float(row[f"score:{name}"]) for name in predictor.classes] == own.tolist()
    assert not Path("out.csv.part").exists()


def test_a_broken_image_in_the_middle_stops_nothing(
    trained_image_module: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = photos(tmp_path / "photos", 6)
    broken = folder / "検査" / "2.png"
    broken.write_bytes(broken.read_bytes()[:200])
    code, told = answer(capsys, trained_image_module, folder)
    assert code == 3
    assert len(told["answers"]) == told["samples"] == 5
    assert [one["input"] for one in told["unreadable"]] == [str(broken)]
    assert "not a readable image" in told["unreadable"][0]["problem"]


def test_rows_name_class_probability_and_input(
    trained_image_module: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = photos(tmp_path / "photos", 2)
    assert call(["predict", "--module", str(trained_image_module), str(folder), "--scores"]) == 0
    head, first, scores, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["class", "probability", "input"]
    name, share, where = first.split(maxsplit=2)
    assert where == str(folder / "b/deeper/1.png")
    assert scores.split()[:2] == [name, share]


def test_texts_of_tables_and_lines(
    trained_text_module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    texts = ["pump leaks oil", "belt 3", "ポンプ, oil"]
    table = tmp_path / "orders.csv"
    table.write_text('id;Text\n1;pump leaks oil\n2;belt 3\n3;"ポンプ, oil"\n', encoding="utf-8-sig")
    lines = tmp_path / "orders.jsonl"
    lines.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    plain = tmp_path / "orders.txt"
    plain.write_bytes("\r\n\r\n".join(texts).encode())
    found = []
    for given in (table, lines, plain):
        code, told = answer(capsys, trained_text_module, given)
        assert code == 0
        found.append(told["answers"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(plain.read_bytes())))
    code, told = answer(capsys, trained_text_module, "-")
    assert code == 0
    assert found[0] == found[1] == found[2] == told["answers"]
    assert [one["input"] for one in found[0]] == texts
    assert [one["class"] for one in found[0][:2]] == ["pump", "belt"]


def test_what_is_wrong_in_a_row_is_told_and_the_others_answered(
    trained_text_module: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "orders.csv"
    table.write_text('text,id\npump,1\n  ,2\nbelt,3,4\nbelt 3,5\n"oil,6\n')
    code, told = answer(capsys, trained_text_module, table)
    assert (code, [one["input"] for one in told["answers"]]) == (3, ["pump", "belt 3"])
    problems = [one["problem"] for one in told["unreadable"]]
    assert ["orders.csv:3: the text is empty" in problems[0], "3 columns" in problems[1]] == [
        True,
        True,
    ]
    assert "check its quotes; the rest of the file is not read" in problems[2]


def test_images_of_a_table_of_an_array_and_of_stdin(
    trained_image_module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    folder = photos(tmp_path / "photos", 2)
    names = ["b/deeper/1.png", "検査/0.png"]
    (folder / "list.csv").write_text("file\n" + "\n".join(names), encoding="utf-8")
    pixels = np.stack([np.asarray(Image.open(folder / name)) for name in names])
    np.savez(tmp_path / "parts.npz", x=pixels)
    _, of_table = answer(capsys, trained_image_module, folder / "list.csv")
    _, of_array = answer(capsys, trained_image_module, tmp_path / "parts.npz")
    raw = (folder / names[0]).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    _, of_stdin = answer(capsys, trained_image_module, "-")
    assert [one["input"] for one in of_table["answers"]] == names
    assert [one["input"] for one in of_array["answers"]] == [
        f"{tmp_path}/parts.npz[x][{i}]" for i in range(2)
    ]
    shares = [[one["probability"] for one in told["answers"]] for told in (of_table, of_array)]
    assert shares[0] == shares[1]
    assert of_stdin["answers"][0]["probability"] == pytest.approx(shares[0][0], rel=1e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["empty"], "there is no image in it or below; it is empty"),
        (["notes"], "there is no image in it or below; it has 1 .md"),
        (["nowhere.png"], "there is no such file or folder"),
        (["nowhere.png", "empty"], "2 inputs cannot be read, and nothing was predicted"),
        (["-", "-"], "given more than once"),
        (["--batch-size", "0", "empty"], "batch-size=0"),
        (["--pixel-max", "-1", "empty"], "no value of white"),
        (["table.csv"], "no column 'file'"),
        (["cp932.csv"], "it looks like Shift_JIS"),
    ],
)
def test_what_cannot_be_read_is_told_before_anything(
    given: list[str], said: str, trained_image_module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "notes"):
        Path(name).mkdir()
    Path("notes/a.md").write_text("none")
    Path("table.csv").write_text("image,size\na.png,3\n")
    Path("cp932.csv").write_bytes("file\nきずあり.png\n".encode("cp932"))
    code, told = answer(capsys, trained_image_module, *given)
    assert code == 2
    assert said in told["error"]["message"]


def test_texts_are_not_for_a_module_of_images(
    trained_image_module: Path, trained_text_module: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    folder = photos(tmp_path / "photos", 2)
    code, told = answer(capsys, trained_text_module, folder)
    assert (code, "the module reads texts" in told["error"]["message"]) == (2, True)
    code, told = answer(capsys, trained_text_module, folder / "検査" / "0.png")
    assert (code, "the module reads texts" in told["error"]["message"]) == (2, True)
    note = tmp_path / "note.txt"
    note.write_text("a pump")
    code, told = answer(capsys, trained_image_module, note)
    assert (code, len(told["unreadable"])) == (3, 1)


def test_no_module_and_a_wrong_one(
    trained_image_module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert call(["predict", "digits"]) == 2
    assert "--module" in capsys.readouterr().err
    for reference, said in (
        ("nothing", "there is no module 'nothing'"),
        ("./nothing", "there is no folder ./nothing"),
        (str(tmp_path), "has no module"),
        (str(trained_image_module / "summary.json"), "is a file"),
        (str(trained_image_module.parent), "a folder of runs; name one of them"),
    ):
        code, told = answer(capsys, Path(reference) if reference[0] == "/" else reference, "digits")  # type: ignore[arg-type]
        assert code == 2
        assert said in told["error"]["message"]


def test_a_csv_file_that_cannot_be_written(
    trained_image_module: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = photos(tmp_path / "photos", 2)
    for target, said in (
        (tmp_path, "is a folder"),
        (tmp_path / "nowhere" / "a.csv", "lies in a folder that is not there"),
        (Path("/dev/full"), "No space left"),
    ):
        code, told = answer(capsys, trained_image_module, folder, "--csv", target)
        assert (code, said in told["error"]["message"]) == (1, True)


def test_who_reads_the_rows_may_go(
    trained_image_module: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """A pipe that is closed, as `head` closes it: no traceback, a code of its own, and the answers before it are whole."""
    command = [
        *COMMAND,
        "predict",
        "--module",
        str(trained_image_module),
        "digits",
        "--batch-size",
        "8",
    ]
    program = subprocess.Popen(
        command,
        env=environment | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    assert program.stdout.readline().split() == ["class", "probability", "input"]
    program.stdout.close()
    assert program.stderr is not None
    said = program.stderr.read()
    program.stderr.close()
    assert program.wait(60) == 141
    assert "Traceback" not in said
    assert "Error" not in said


def test_answers_at_a_site_are_counted_for_it(
    trained_image_module: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A module in a site's folder: how often each class came, and nothing of the inputs."""
    folder, site = photos(tmp_path / "photos", 4), tmp_path / "site"
    (folder / "検査" / "0.png").write_bytes(b"no image")
    module = site / "modules" / "abc"
    shutil.copytree(trained_image_module / "module", module)
    answer(capsys, module, folder)
    assert not (site / "usage").exists()
    (site / "site.toml").write_text("")
    code, told = answer(capsys, module, folder)
    assert code == 3
    (day,) = (site / "usage").glob("*.json")
    sums = used(site, day.stem)[told["module"]["digest"]]
    assert sums.classes == Counter(one["class"] for one in told["answers"])
    assert sums.confidence == pytest.approx(sum(one["probability"] for one in told["answers"]))
    assert "photos" not in day.read_text()


def test_names_that_are_no_text(
    trained_image_module: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = photos(tmp_path / "photos", 1)
    odd = os.fsencode(folder) + "/キズ.png".encode("cp932")
    os.rename(folder / "検査" / "0.png", odd)  # noqa: PTH104 - its name is no text
    target = tmp_path / "out.csv"
    code, told = answer(capsys, trained_image_module, folder, "--csv", target)
    assert (code, len(told["answers"])) == (0, 1)
    assert "\\udc" in target.read_text(encoding="utf-8")

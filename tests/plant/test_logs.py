"""Log files of JSON lines: their form, their bounds, levels that are guessed, and a disk that is full."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.plant.logs import MAX_LINE_CHARS, JsonLines, guessed_level, read_tail


def test_a_line_says_when_who_and_what(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "a.jsonl", "superlink") as log:
        log.write("\x1b[92mINFO \x1b[0m:      工場 is here\n")
        log.write("\n")
        log.write("x" * (MAX_LINE_CHARS + 1))
    first, second = map(json.loads, (tmp_path / "a.jsonl").read_text("utf-8").splitlines())
    assert first["text"] == "INFO :      工場 is here"
    assert (first["service"], first["level"]) == ("superlink", "info")
    assert first["time"].endswith("+00:00")
    assert second["text"].endswith(f"... ({MAX_LINE_CHARS + 1} characters)")


def test_files_are_turned_over_and_bounded(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "a.jsonl", "x", max_bytes=2000, files=3) as log:
        for number in range(200):
            log.write(f"line {number}")
        assert log.tail(2) == "line 198\nline 199"
    files = sorted(tmp_path.iterdir())
    assert [f.name for f in files] == ["a.jsonl", "a.jsonl.1", "a.jsonl.2"]
    assert all(f.stat().st_size <= 2000 for f in files)
    assert read_tail(tmp_path / "a.jsonl", 1)[0]["text"] == "line 199"


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("2026/11/27 10:00:00 [warn] 12#12: low", "warning"),
        ("2026/11/27 10:00:00 [emerg] 12#12: bind() failed", "error"),
        ("ERROR :     broken", "error"),
        ("INFO:     127.0.0.1 - GET /hello", "info"),
        ("Traceback (most recent call last):", "error"),
        ("ConfigError: the file cannot be used", "error"),
        ("sqlalchemy.exc.OperationalError: database is locked", "error"),
        ("DEBUG x", "debug"),
        ("information", "info"),
        ("a sentence " + "of words " * 20 + "with an error in it", "info"),
    ],
)
def test_the_level_is_guessed(line: str, level: str) -> None:
    assert guessed_level(line) == level


def test_a_full_disk_loses_lines_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with JsonLines(tmp_path / "none" / "a.jsonl", "x") as log:
        log.write("lost")
        log.write("lost too")
        assert log.tail() == "lost\nlost too"
        (tmp_path / "none").mkdir()
        log.write("kept")
    texts = [e["text"] for e in read_tail(tmp_path / "none" / "a.jsonl")]
    assert texts == ["2 lines before this one are lost: No such file or directory", "kept"]


def test_many_threads_write_whole_lines(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "a.jsonl", "x") as log:
        threads = [
            threading.Thread(target=lambda n=n: [log.write(f"{n} {i}") for i in range(50)])
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert len({json.loads(line)["text"] for line in lines}) == 200


@given(raw=st.binary(max_size=400))
def test_any_bytes_can_be_read(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("log") / "a.jsonl"
    path.write_bytes(raw)
    assert all(isinstance(e, dict) for e in read_tail(path))
    assert read_tail(path.with_name("none")) == []

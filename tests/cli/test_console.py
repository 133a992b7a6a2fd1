"""Output in narrow encodings, without a terminal, and when something takes long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from rich.table import Table

from fedsplit.cli.console import Output, print_error

WORDS = "über → 検査 \U0001f4a1 \udc83"
SCRIPT = f"""
from fedsplit.cli.console import Output, print_error, write_anything
from rich.table import Table
write_anything()
out = Output(as_json=False)
out.show({WORDS!r})
table = Table(title={WORDS!r})
table.add_row({WORDS!r})
out.show(table)
out.note({WORDS!r})
print_error("DataError", {WORDS!r}, as_json=False)
"""


def run(script: str, encoding: str) -> subprocess.CompletedProcess[bytes]:
    env = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    return subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, check=False)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp932", "utf-8"])
def test_no_encoding_is_too_narrow(encoding: str) -> None:
    done = run(SCRIPT, encoding)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    out = done.stdout.decode(encoding)
    assert "検査" in out or "\\u691c\\u67fb" in out
    assert "→" in out or " > " in out
    assert "DataError: " in done.stderr.decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_stays_json(encoding: str) -> None:
    script = f"""
from fedsplit.cli.console import print_json, write_anything
write_anything()
print_json({{"a": {WORDS!r}}})
"""
    done = run(script, encoding)
    assert json.loads(done.stdout.decode(encoding)) == {"a": WORDS}


def test_lines_are_whole_where_no_terminal_reads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "word " * 100 + "[end] of /the/[path]"
    for columns in ("40", ""):
        monkeypatch.setenv("COLUMNS", columns)
        out = Output(as_json=False)
        out.note(long)
        out.show(long)
        print_error("DataError", long, as_json=False)
        told = capsys.readouterr()
        assert told.out == f"{long}\n"
        assert told.err == f"{long}\nDataError: {long}\n"
    table = Table()
    table.add_row("x" * 150)
    out.show(table)
    assert "x" * 150 in capsys.readouterr().out


def test_what_takes_long_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(as_json=False)
    with out.if_long("quick", after_s=30):
        pass
    with out.if_long("checking ...", after_s=0.01):
        time.sleep(0.2)
    assert capsys.readouterr().err == "checking ...\n"

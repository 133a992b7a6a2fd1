"""The audit log: lines are added whole by several processes, full files are kept by number and bounded."""

from __future__ import annotations

import json
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from fedsplit.plant.server import audit
from fedsplit.plant.server.folder import FederationFolder

ROOT = Path(__file__).parents[3]


def test_every_word_of_the_audit_log_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "reference" / "federation-folder.md").read_text(encoding="utf-8")
    table = text.split("## `audit.jsonl`", 1)[1]
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    documented = set(re.findall(r"`([a-z-]+)`", "".join(first))) - {"what"}
    call = re.compile(r"audit\.record\(\s*[\w.]+,\s*\"([a-z-]+)\"")
    sources = [p.read_text(encoding="utf-8") for p in (ROOT / "fedsplit").rglob("*.py")]
    words = {word for source in sources for word in call.findall(source)}
    # The registry of modules tells whoever keeps the log.
    registry = (ROOT / "fedsplit" / "registry" / "registry.py").read_text(encoding="utf-8")
    assert documented == words | set(re.findall(r"\"(module-[a-z-]+)\"", registry))


def several(path: Path, who: str) -> None:
    folder = FederationFolder.at(path)
    for number in range(20):
        audit.record(folder, "joined", who, number=number)


def test_two_processes_add_whole_lines(folder: FederationFolder) -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as pool:
        list(pool.map(several, [folder.path] * 2, ["a", "b"]))
    lines = list(audit.read(folder))
    for who in "ab":
        assert [e["number"] for e in lines if e["who"] == who] == list(range(20))


def test_foreign_text_is_one_short_line(folder: FederationFolder) -> None:
    audit.record(folder, "refused", "x\ny\x1b[31m", reason="z" * 5000, names=["a\nb", "検査"])
    (text,) = folder.audit.read_text(encoding="utf-8").splitlines()
    line = json.loads(text)
    assert line["who"] == "x y\\x1b[31m"
    assert len(line["reason"]) == 1000
    assert line["names"] == ["a b", "検査"]


def test_half_a_line_of_a_power_cut_takes_no_other_with_it(folder: FederationFolder) -> None:
    audit.record(folder, "first", "server")
    with folder.audit.open("a") as file:
        file.write('{"time": "2026-')
    audit.record(folder, "second", "server")
    assert [e["what"] for e in audit.read(folder)] == ["first", "second"]


def test_full_files_are_numbered_and_the_oldest_go(folder: FederationFolder) -> None:
    text = (folder.path / "federation.toml").read_text() + "[retention]\naudit-mb = 1\n"
    (folder.path / "federation.toml").write_text(text)
    folder = FederationFolder.at(folder.path)
    for number in range(1300):
        audit.record(folder, "run-ended", "server", number=number, detail="x" * 1000)
    names = sorted(p.name for p in folder.path.glob("audit*.jsonl"))
    assert names == ["audit.3.jsonl", "audit.4.jsonl", "audit.5.jsonl", "audit.jsonl"]
    assert sum(p.stat().st_size for p in folder.path.glob("audit*.jsonl")) <= 2**20
    numbers = [e["number"] for e in audit.read(folder)]
    assert numbers == list(range(numbers[0], 1300))

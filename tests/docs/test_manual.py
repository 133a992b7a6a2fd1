"""The operations manual, done as it is written: a server and two sites, each a folder of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from fedsplit.core.programs import flower_environment, free_port
from tests.docs.manual import Step, steps
from tests.terminal import Terminal

ROOT = Path(__file__).parents[2]
ENGLISH = ROOT / "docs" / "how-to" / "operate.md"
JAPANESE = ROOT / "docs" / "ja" / "operate.md"
READY = {"server": "the server is up", "line-a": "is ready", "line-b": "is ready"}
MEMBERSHIP = re.compile(r"federation (?:add-site|rotate) ")


def test_both_languages_tell_the_same_steps() -> None:
    told = steps(ENGLISH)
    assert {step.machine for step in told} == {"server", "line-a", "line-b"}
    assert steps(JAPANESE) == told


def test_both_languages_have_the_same_blocks_and_headings() -> None:
    def shape(page: Path) -> tuple[list[str], int]:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^ {4,}\S.*$", text, re.MULTILINE)
        commands = [line.strip() for line in blocks if re.match(r"\s+[a-z#(]", line)]
        return [c for c in commands if not c.startswith("site line-")], len(re.findall(r"^##+ ", text, re.MULTILINE))  # fmt: skip

    assert shape(JAPANESE) == shape(ENGLISH)


class Plant:
    """Three machines, each a working folder, and what a person has on the paper beside."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.terminals: dict[str, Terminal] = {}
        self.code = ""
        self.env = flower_environment() | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SERVER": "localhost",
            "PORT": str(free_port()),
            "TASK": "inspection",
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
        }
        for key in ("FLWR_HOME", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            self.env.pop(key, None)

    def folder(self, machine: str) -> Path:
        return self.root / machine

    def do(self, step: Step) -> None:
        """One step, as a person would: on the right machine, with the code that was printed last."""
        cwd = self.folder(step.machine)
        cwd.mkdir(exist_ok=True)
        env = self.env | {"CODE": self.code, "DATA": f"folder:{self.root / 'data' / step.machine}"}
        if step.how == "Ctrl-C":
            assert self.terminals[step.machine].press_ctrl_c() == 0
        elif step.how == "keep running":
            if (before := self.terminals.get(step.machine)) is not None:
                assert before.process.wait(30) == 0, "\n".join(before.said)
                before.end()
            # `exec`: Ctrl-C is the command's, and no shell's that waits for it.
            terminal = self.terminals[step.machine] = Terminal(f"exec {step.commands}", cwd, env)
            terminal.wait_for(READY[step.machine])
        else:
            done = subprocess.run(
                ["sh", "-e", "-c", step.commands], cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True,
                text=True, timeout=600, check=False,
            )  # fmt: skip
            assert done.returncode == 0, (
                f"{step.machine}: {step.commands}\n{done.stdout}\n{done.stderr}\n{self.logs()}"
            )
            if MEMBERSHIP.search(step.commands):
                self.code = done.stdout.split()[-1]

    def logs(self) -> str:
        """The ends of all that runs, for a step that failed."""
        return "\n".join(f"--- {name}\n" + "\n".join(t.said[-15:]) for name, t in self.terminals.items())  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """What still runs of these machines."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            if any(str(self.root) in word for word in process.info["cmdline"] or []):
                found.append(process)
        return found


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Plant]:
    if shutil.which("nginx") is None and not Path("/usr/sbin/nginx").exists():
        pytest.skip("nginx is not on this machine: apt-get install nginx-light")
    rng = np.random.default_rng(0)
    for machine in ("line-a", "line-b"):
        for i in range(24):
            path = tmp_path / "data" / machine / ("crack", "fine")[i % 2] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 100, (32, 32, 3), dtype=np.uint8)
            pixels[8:24, 8:24] += np.uint8(100 * (i % 2))
            Image.fromarray(pixels).save(path)
    made = Plant(tmp_path)
    try:
        yield made
    finally:
        for terminal in made.terminals.values():
            terminal.end()
        for process in made.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_manual_does_what_it_says(plant: Plant) -> None:
    for step in steps(ENGLISH):
        plant.do(step)
    folder = plant.folder("server") / "federation"
    first, second = sorted(folder.glob("runs/*/summary.json"), key=lambda p: p.stat().st_mtime)
    for summary in (first, second):
        told = json.loads(summary.read_text())
        assert told["outcome"] == "complete", told["reason"]
        assert [site["name"] for site in told["sites"]] == ["line-a", "line-b"]
    started = json.loads((second.parent / "config.json").read_text())
    assert str(first.parent) in json.dumps(started), "the night does not start from the first run"
    (night,) = (folder / "logs" / "nightly.jsonl").read_text().splitlines()
    assert json.loads(night)["outcome"] == "complete"
    # What was revoked ends by itself, and says so; the others are ended as a person would.
    assert plant.terminals["line-b"].process.wait(60) == 4
    assert any("no member of the federation" in line for line in plant.terminals["line-b"].said)
    assert plant.terminals["line-a"].press_ctrl_c() == 0
    assert plant.terminals["server"].press_ctrl_c() == 0
    assert not plant.processes()

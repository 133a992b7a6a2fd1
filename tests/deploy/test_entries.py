"""The containers' entry scripts, run without a container: a server that makes itself, and a site that joins it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedsplit.core.programs import flower_environment, free_port
from tests.terminal import Terminal

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture
def env(tmp_path: Path) -> Iterator[dict[str, str]]:
    if shutil.which("nginx") is None and not Path("/usr/sbin/nginx").exists():
        pytest.skip("nginx is not on this machine: apt-get install nginx-light")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "parts.npz", x=pixels, y=np.array(["crack", "fine"] * 12))
    with contextlib.chdir(tmp_path):
        yield flower_environment() | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "FEDSPLIT_HOST": "localhost",
            "FEDSPLIT_PORT": str(free_port()),
            "FEDSPLIT_DATA": "npz:parts.npz",
            "FEDSPLIT_TASK": "inspection",
            "FEDSPLIT_CODE_FILE": "code",
            "NO_COLOR": "1",
        }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_and_a_site_by_their_entry_scripts(env: dict[str, str], tmp_path: Path) -> None:
    def entry(name: str, *words: str) -> str:
        command = ["sh", str(DEPLOY / f"{name}-entry.sh"), *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    with contextlib.ExitStack() as running:
        server = Terminal(f"exec sh {DEPLOY}/server-entry.sh", tmp_path, env)
        running.callback(server.end)
        server.wait_for("the server is up")
        (tmp_path / "code").write_text(entry("server", "federation", "add-site", "line-a").split()[-1] + "\n")  # fmt: skip
        site = Terminal(f"exec sh {DEPLOY}/site-entry.sh", tmp_path, env)
        running.callback(site.end)
        site.wait_for("is ready")
        assert "line-a" in entry("server", "status", "--once")
        assert "server" in entry("site", "doctor")
        assert site.press_ctrl_c() == 0
        assert server.press_ctrl_c() == 0

"""Fixtures of the system tests: a run with something wrong in it, and what its message must be.

`fails` is the ServerApp's own code over real ClientApps, in this process; its errors go through what
`fedsplit run --json` makes of Flower's log or of the summary.
"""

from __future__ import annotations

import json
import shutil
import socket
import textwrap
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsplit.cli.console import Output, print_error
from fedsplit.cli.execute import error_in_log
from fedsplit.cli.run import finish
from fedsplit.core.config import RunConfig
from fedsplit.core.errors import FedsplitError
from fedsplit.core.records import Summary
from fedsplit.federation.server.run import Run, settle
from server_app.app import _endpoint
from tests.federation.conftest import simulated
from tests.federation.grid import InProcessGrid

SCREEN = (24, 80)
BASE: dict[str, Any] = {
    "max-samples": 80, "rounds": 1, "cut": "0,6", "run-name": "run", "partition": "iid", "deadline-s": 60.0,
}  # fmt: skip
Nodes = list[dict[str, Any]]


def assert_one_screen(text: str) -> None:
    """A person can read it at once, on a terminal of the usual size."""
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, SCREEN[1]) or [""]]
    assert 0 < len(lines) <= SCREEN[0], text
    assert "Traceback" not in text
    assert 'File "' not in text


def one_object(stdout: str) -> dict[str, Any]:
    """`--json` is one JSON object on stdout and nothing else."""
    value = json.loads(stdout)
    assert isinstance(value, dict)
    return value


def run_once(
    flat: dict[str, Any], nodes: Nodes, *, in_simulation: bool = True, **grid: Any
) -> Summary:
    """What server_app does with these settings, in this process."""
    config = settle(RunConfig.from_flat(flat))
    with _endpoint(config) as endpoint:
        net = InProcessGrid(nodes, **grid)
        try:
            return Run(net, config, endpoint, simulated=in_simulation).go()
        finally:
            net.close()


@pytest.fixture
def fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run with bad settings; returns the message, as the command shows it and as it gives it with --json."""

    def call(nodes: Nodes | None = None, *, in_simulation: bool = True, **other: Any) -> str:
        flat = BASE | {"runs-dir": str(tmp_path / "runs")}
        flat |= {k.replace("_", "-"): v for k, v in other.items()}
        with pytest.raises(FedsplitError) as caught:
            run_once(flat, simulated(2) if nodes is None else nodes, in_simulation=in_simulation)
        assert_nothing_half_written(tmp_path)
        capsys.readouterr()
        folder = tmp_path / "runs" / str(flat["run-name"])
        if (folder / "summary.json").is_file():
            summary = Summary.model_validate_json((folder / "summary.json").read_text())
            assert summary.outcome == "failed"
            assert summary.reason == str(caught.value)
            assert json.loads((folder / "status.json").read_text())["phase"] == "failed"
            assert finish(summary, folder, Output(as_json=True)) == 1
        else:
            assert not folder.exists()
            log = (
                "".join(traceback.format_exception(caught.value))
                + "\x1b[91mERROR \x1b[0m:     Exit Code: 700\n\nx\n"
            )
            kind, message = error_in_log(log)
            assert (kind, message) == (type(caught.value).__name__, str(caught.value))
            print_error(kind, message, as_json=True)
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        error = one_object(shown.out)["error"]
        assert error["kind"]
        assert str(caught.value) in error["message"]
        assert_one_screen(error["message"])
        return str(error["message"])

    return call


def assert_nothing_half_written(root: Path) -> None:
    assert list(root.rglob("*.part")) == []


@pytest.fixture
def model(tiny: dict[str, Path], tmp_path: Path) -> Path:
    """A model folder of 4 blocks that a test may spoil."""
    return Path(shutil.copytree(tiny["vit"], tmp_path / "model"))


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])

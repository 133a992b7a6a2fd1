"""Sites that live on, with real SuperNodes: one load for all rounds, and what happens when one dies or a run is stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.system.conftest import run_once
from tests.system.flower import BIN, CONNECTION, ROOT, fedsplit
from tests.system.resident import ResidentSite, resident_deployment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS: dict[str, Any] = {
    "cut": "0,6", "rounds": 3, "seed": 0, "min-sites": 1, "device-training": "head+tail", "sites": 2,
    "deadline-s": 200, "classifier-init": "zero", "max-samples": 80,
}  # fmt: skip
NODES = [
    {"site": "line-a", "data": "digits", "threads": 1},
    {"site": "line-b", "data": "digits", "threads": 1, "cut": "2,4"},
]


def command(runs: Path, name: str, **other: Any) -> list[str]:
    flat = SETTINGS | {"run-name": name, "runs-dir": runs}
    flat |= {k.replace("_", "-"): v for k, v in other.items()}
    sets = [arg for k, v in flat.items() for arg in ("--set", f"{k}={v}")]
    return ["run", "--superlink", CONNECTION, *sets, "--json"]


def test_sites_that_live_on(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with resident_deployment(tmp_path / "home", NODES) as (env, sites):
        done = fedsplit(*command(runs, "first"), env=env)
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout)
        # Each has loaded its part once, and nobody says that it is slow.
        assert [s["backbone_loads"] for s in summary["sites"]] == [1, 1]
        assert [s["notes"] for s in summary["sites"]] == [[], []]
        a_site_dies(runs, env, sites)
        a_run_is_stopped(runs, env, sites)

    # As sites do without Flower around them.
    flat = SETTINGS | {"run-name": "plain", "runs-dir": str(runs)}
    nodes = [node | {"state-dir": str(tmp_path / "plain")} for node in NODES]
    assert run_once(flat, nodes, in_simulation=False).outcome == "complete"
    ours, theirs = (
        load_file(runs / name / "module" / "adapter_model.safetensors")
        for name in ("first", "plain")
    )
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def a_site_dies(runs: Path, env: dict[str, str], sites: list[ResidentSite]) -> None:
    """It is started again at once; the run hears of it then, not a minute later, and goes on with it."""
    site = sites[0]

    def kill() -> None:
        site.wait_for(200, run="killed", round=1, state="working")
        assert site.runtime is not None
        site.runtime.kill()
        site.start_runtime()

    killer = threading.Thread(target=kill)
    killer.start()
    done = fedsplit(*command(runs, "killed", local_epochs=40, rounds=2), env=env)
    killer.join()
    assert done.returncode == 3, done.stderr
    summary = json.loads(done.stdout)
    (left,) = summary["left_out"]
    assert (left["site"], left["rounds"]) == ("line-a", [1])
    assert "the site's runtime process ended while it worked on this order" in left["reason"]
    # What the killed process had loaded stands in no answer.
    assert [s["backbone_loads"] for s in summary["sites"]] == [1, 1]


def a_run_is_stopped(runs: Path, env: dict[str, str], sites: list[ResidentSite]) -> None:
    """Hours of work are dropped between two steps, also by a site that needs no encoder."""
    words = command(runs, "stopped", local_epochs=1000, batch_size=2, cut="6,6", deadline_s=3600)
    run = subprocess.Popen(
        [str(BIN / "fedsplit"), *words], env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )  # fmt: skip
    for site in sites:
        site.wait_for(200, run="stopped", round=1, state="working")
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130
    for site in sites:
        site.wait_for(15, state="idle")
    assert "its run is over" in sites[0].told["last_error"]

"""The whole program as a new user runs it: Flower's own `flwr run`, and `fedsplit run` on a model and images of their own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file
from sklearn.datasets import load_digits

from fedsplit.core.config import RunConfig
from fedsplit.core.programs import flower_environment, free_port
from fedsplit.core.records import SiteSummary, Status, Summary
from fedsplit.federation.engine.in_process import InProcessGrid
from fedsplit.federation.server.endpoint import hosted
from fedsplit.federation.server.run import Run
from fedsplit.federation.site import answer, new_runtime
from fedsplit.trunk.process import hosting
from tests.federation.conftest import simulated
from tests.system.flower import BIN, ROOT, fedsplit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PLOTS = {f"{name}.{kind}" for name in ("accuracy", "traffic") for kind in ("png", "svg")}
RUN: dict[str, Any] = {
    "max-samples": 60, "rounds": 1, "partition": "iid", "cut": "1,5;0,6", "classifier-init": "zero",
}  # fmt: skip
# What a summary holds at least.
FIELDS = {
    "run", "method", "backbone", "backbone_sha256", "rounds_done", "sites", "accuracy_global", "accuracy_global_start",
    "accuracy_local_only", "bytes_activation", "bytes_module", "bytes_full_model", "wall_s", "outcome", "left_out",
}  # fmt: skip
SITE_FIELDS = {
    "name", "cut", "samples", "accuracy_before", "accuracy", "bytes_up", "bytes_down", "seconds_device", "seconds_wait",
    "peak_rss_bytes", "rounds_missed",
}  # fmt: skip


def assert_complete(folder: Path, *, rounds: int) -> Summary:
    """The run folder holds all that docs/reference/run-directory.md promises, and no leftovers."""
    summary = Summary.model_validate_json((folder / "summary.json").read_text())
    assert summary.outcome == "complete", summary
    assert summary.rounds_done == rounds
    assert json.loads((folder / "config.json").read_text())["versions"]["fedsplit"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = [line["round"] for line in lines]
    assert all(told.count(r) == len(summary.sites) for r in range(1, rounds + 2))
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {
        f"round-{r:05d}" for r in range(1, rounds + 1)
    }
    assert {p.name for p in (folder / "module").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "fedsplit.json",
    }  # fmt: skip
    names = {p.name for p in folder.iterdir()}
    assert names == PLOTS | {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "status.json",
        "checkpoints",
        "module",
    }
    for plot in PLOTS:
        if plot.endswith(".png"):
            with Image.open(folder / plot) as image:
                assert min(image.size) > 400
                assert len(set(np.asarray(image.convert("L")).ravel())) > 20  # something is drawn
        else:
            assert "<svg" in (folder / plot).read_text()[:1000]
    return summary


class ManagedSuperLink:
    """The environment in which `flwr run` starts a SuperLink of its own, on free ports, and how to stop that one."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.env = flower_environment(home) | {
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
            "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
        }

    def flwr(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / "flwr"), *args], env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
        )  # fmt: skip

    def alive(self) -> dict[int, str]:
        """Whatever was started with this home: nobody else's processes have it."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = process.environ().get("FLWR_HOME") == str(self.home)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = " ".join(process.cmdline())
        return found

    def stop(self) -> None:
        """End the SuperLink by its id, as docs say, and nothing else."""
        (link,) = [pid for pid, line in self.alive().items() if "/flower-superlink" in line]
        psutil.Process(link).terminate()


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ManagedSuperLink]:
    managed = ManagedSuperLink(tmp_path_factory.mktemp("home"))
    try:
        yield managed
    finally:
        for pid in managed.alive():
            with contextlib.suppress(psutil.Error):
                psutil.Process(pid).kill()


@pytest.fixture(scope="module")
def flower(superlink: ManagedSuperLink, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that `flwr run` started."""
    runs = tmp_path_factory.mktemp("runs")
    settings = " ".join(f"{k}={json.dumps(v)}" for k, v in RUN.items())
    done = superlink.flwr(
        "run", ".", "--run-config", f"{settings} run-name='flower' runs-dir='{runs}'"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    wait_for_end(runs / "flower")
    return runs / "flower"


def test_flwr_run_trains_and_leaves_everything(flower: Path) -> None:
    summary = assert_complete(flower, rounds=1)
    assert [s.name for s in summary.sites] == ["site-0", "site-1"]
    assert summary.accuracy_global is not None
    assert summary.accuracy_global_start is not None
    assert summary.accuracy_global > summary.accuracy_global_start
    assert not (ROOT / "runs" / "flower").exists()


def test_in_process_grid_makes_the_same_module(flower: Path, tmp_path: Path) -> None:
    """Bit for bit: the order of a site's batches and of the average is that of seeds and names."""
    config = RunConfig.from_flat(RUN | {"run-name": "near", "runs-dir": str(tmp_path)})
    with hosting(config, None) as (server, host, key):
        endpoint = hosted(
            config, address=server.address, key=key, publish=host.publish, collect=host.collect
        )
        with InProcessGrid(simulated(2), partial(answer, runtime=new_runtime())) as grid:
            Run(grid, config, endpoint, simulated=True).go()
    far, near = (
        load_file(run / "module" / "adapter_model.safetensors")
        for run in (flower, tmp_path / "near")
    )
    assert far.keys() == near.keys()
    assert [n for n in far if not np.array_equal(far[n], near[n])] == []


def test_key_that_the_app_does_not_have_is_refused_before_anything_starts(
    superlink: ManagedSuperLink,
) -> None:
    refused = superlink.flwr("run", ".", "--run-config", "rouns=3")
    assert refused.returncode != 0
    assert "Invalid run configuration" in refused.stdout + refused.stderr
    assert "Traceback" not in refused.stdout + refused.stderr


def test_given_key_that_the_method_overrules_is_refused_though_it_is_the_default(
    superlink: ManagedSuperLink, flower: Path
) -> None:
    del flower  # its superlink runs
    told = superlink.flwr("run", ".", "--stream", "--run-config", "method='closed-form' rounds=5")
    assert "rounds=5: method=closed-form means rounds=0" in told.stdout + told.stderr


def test_superlink_that_is_ended_leaves_no_process(
    flower: Path, superlink: ManagedSuperLink
) -> None:
    superlink.stop()
    end = time.monotonic() + 30
    while superlink.alive() and time.monotonic() < end:
        time.sleep(0.2)
    assert superlink.alive() == {}


def wait_for_end(folder: Path, timeout_s: float = 300.0) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            status = Status.model_validate_json((folder / "status.json").read_text())
            if status.phase in {"done", "failed"} and all((folder / p).is_file() for p in PLOTS):
                time.sleep(1.0)  # the last plot is still being written
                return
        time.sleep(0.2)
    raise TimeoutError(f"{folder}: {sorted(p.name for p in folder.glob('*'))}")


# A model and images of one's own.


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    """A ViT of 12 blocks with random weights, as transformers saves it."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=16, patch_size=4, num_channels=3, hidden_size=24, num_hidden_layers=12, num_attention_heads=3,
        intermediate_size=48,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit12")
    return tmp_path / "vit12"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    digits = load_digits()
    for i in range(100):
        folder = root / f"digit-{digits.target[i]}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (digits.images[i] * 255 / 16).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    return root


def test_fedsplit_run_on_a_model_and_images_of_ones_own(
    backbone: Path, images: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "backbone": backbone, "data": f"folder:{images}", "cut": "2,10", "sites": 3, "partition": "dirichlet:0.3",
        "rounds": 2, "run-name": "own", "compare-local-only": "true",
    }  # fmt: skip
    sets = [arg for k, v in settings.items() for arg in ("--set", f"{k}={v}")]
    done = fedsplit("run", *sets, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # exactly one object, or this raises
    assert told.keys() >= FIELDS
    assert len(told["sites"]) == 3
    for site in told["sites"]:
        # Those of other targets than classes stay out.
        fields = {
            name for name in SiteSummary.model_fields if not name.startswith(("scores", "target"))
        }
        assert site.keys() == SITE_FIELDS | fields
        assert site["cut"] == "2,10"
        assert site["bytes_up"] > 0
        assert site["rounds_missed"] == 0
    assert told["accuracy_local_only"] is not None
    assert told["left_out"] == []
    assert told["backbone"] == str(backbone)
    folder = tmp_path / "runs" / "own"
    assert told["run_dir"] == str(folder)
    summary = assert_complete(folder, rounds=2)
    assert summary.outcome == told["outcome"]
    for words in ("Run own is complete", "site-2", "Accuracy", "Files:"):
        assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert_loads_without_fedsplit(backbone, folder / "module")


ALONE = """
import json, sys
sys.modules["fedsplit"] = None  # whoever imports it fails
import numpy as np, torch, transformers
from peft import PeftModel
from PIL import Image
backbone, module, picture = sys.argv[1:]
classes = json.load(open(f"{module}/fedsplit.json"))["classes"]
whole = transformers.ViTForImageClassification.from_pretrained(backbone, num_labels=len(classes))
peft = PeftModel.from_pretrained(whole, module).eval()
names = {n for n, p in peft.named_parameters() if ".lora_B." in n and bool(p.any())}
weight = peft.get_submodule("base_model.model.classifier").modules_to_save["default"].weight
pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    logits = peft(pixel_values=pixels).logits
print(json.dumps({"classes": classes, "lora": len(names), "head": bool(weight.any()), "shape": list(logits.shape),
                  "finite": bool(logits.isfinite().all())}))
"""


def assert_loads_without_fedsplit(backbone: Path, module: Path) -> None:
    """transformers and PEFT alone make the trained model of the folder, warnings as errors where they speak of keys."""
    env = dict(os.environ) | {"TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", ALONE, str(backbone), str(module), "-"],
        capture_output=True, text=True, timeout=200, env=env, cwd=module, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["classes"] == [f"digit-{i}" for i in range(10)]
    # Blocks 10 and 11, the tail, trained on the devices, with query and value each.
    assert told["lora"] == 4
    assert told["head"]
    assert told["shape"] == [2, 10]
    assert told["finite"]

"""The base install is what a site needs: with the extras' packages out of reach a site's path still works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each stands for itself and what only it brings (seaborn, pandas, pyarrow, dill, ...).
BLOCKED = (
    "sklearn", "scipy", "joblib", "matplotlib", "seaborn", "datasets", "flwr_datasets", "pandas", "pyarrow", "multiprocess", "ray", "prometheus_client",
)  # fmt: skip
# As where they are not installed: `find_spec` says None, and who asks for it may go on without.
BLOCK = f"""
import sys

class OfTheBase:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {BLOCKED!r}:
            return self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(OfTheBase, sys.meta_path)
"""
ROUNDS = """
import warnings; warnings.simplefilter("ignore")
import sys
from pathlib import Path
import numpy as np
from PIL import Image
from tests.federation.conftest import prepared, settings
from tests.model.copies import add_tokenizer
from tests.tiny import save

here = Path(sys.argv[1])
rng = np.random.default_rng(0)
pixels = rng.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
for i in range(24):
    path = here / "pictures" / "ab"[i % 2] / f"{i}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[i]).save(path)
np.savez(here / "parts.npz", x=pixels, y=np.array(["a", "b"] * 12))
rows = [f"pump {i},{'leak' if i % 2 else 'tear'}" for i in range(24)]
(here / "orders.csv").write_text("text,label\\n" + "\\n".join(rows))
words = str(add_tokenizer(save(here, "bert")))
for source, backbone, cut in (
    ("folder:pictures", "vit-glyphs", "0,6"), ("npz:parts.npz", "vit-glyphs", "6,6"), ("csv:orders.csv", words, "1,3"),
):
    kind, _, name = source.partition(":")
    nodes = [{"site": s, "data": f"{kind}:{here / name}"} for s in ("line-a", "line-b")]
    config = settings(here / "runs", run_name=kind, backbone=backbone, cut=cut, rounds=1, max_samples=0)
    with prepared(config, nodes, in_simulation=False) as (run, _):
        ended = run.go()
    print(kind, ended.outcome, ended.rounds_done, ended.accuracy_global is not None)
"""
# All that a site's machine may load, and the command line.
IMPORTS = """
import importlib, pkgutil, sys
import fedsplit
for name in ("site", "training", "model", "transport", "core", "cli", "plant.site"):
    package = importlib.import_module(f"fedsplit.{name}")
    for module in pkgutil.walk_packages(package.__path__, f"fedsplit.{name}."):
        importlib.import_module(module.name)
for name in ("federation.site", "federation.executor", "plant.checks", "plant.install", "plant.wheelhouse"):
    importlib.import_module(f"fedsplit.{name}")
import client_app.app
print("all")
"""
COMMAND = "from fedsplit.cli.main import call\nsys.exit(call(sys.argv[1:]))"
# A first import of torch and transformers on a busy machine.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def without(program: str, *args: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a program where the extras' packages cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", BLOCK + program, *map(str, args)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_a_roll_call_and_a_round_on_pictures_arrays_and_texts(tmp_path: Path) -> None:
    done = without(ROUNDS, tmp_path)
    told = [
        line for line in done.stdout.splitlines() if line.split()[0] in {"folder", "npz", "csv"}
    ]
    assert told == [f"{kind} complete 1 True" for kind in ("folder", "npz", "csv")], done.stderr


def test_all_modules_of_a_site_load() -> None:
    done = without(IMPORTS)
    assert done.stdout.splitlines()[-1:] == ["all"], done.stderr


def test_a_source_is_looked_at_with_its_contact_sheet(tmp_path: Path) -> None:
    lines = ["import numpy as np", "np.savez('parts.npz', x=np.arange(288, dtype=np.uint16).reshape(8, 6, 6), y=[0, 1] * 4)"]  # fmt: skip
    made = without("\n".join([*lines, COMMAND]), "data", "npz:parts.npz", "--json", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "contact-sheet.png").is_file()


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (("data", "digits"), r"data=digits needs a package .*\(No module named \'sklearn"),
        (("demo",), r"a simulation on this machine needs a package .*'ray'"),
    ],
)
def test_what_needs_an_extra_says_so(args: tuple[str, ...], wanted: str) -> None:
    done = without(COMMAND, *args)
    assert done.returncode == 2
    assert "ConfigError: " in done.stderr
    assert re.search(wanted, done.stderr), done.stderr
    assert done.stderr.rstrip().endswith('pip install "fedsplit[simulation]"')

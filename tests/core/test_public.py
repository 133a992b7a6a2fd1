"""What others may rely on, and what the lowest floor does without."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import subprocess
import sys

import fedsplit
import fedsplit.core

CORE = [f"fedsplit.core.{m.name}" for m in pkgutil.iter_modules(fedsplit.core.__path__)]
HEAVY = ("torch", "transformers", "peft", "grpc", "flwr", "datasets", "ray", "sklearn")


def test_the_public_surface() -> None:
    assert fedsplit.__all__ == ["__version__"]
    assert importlib.metadata.version("fedsplit") == fedsplit.__version__


def test_core_has_the_modules_that_the_floors_above_import() -> None:
    names = {name.rsplit(".", 1)[1] for name in CORE}
    assert names >= {"aggregation", "config", "cut", "encoder", "errors", "records"}
    assert all(importlib.import_module(name).__doc__ for name in CORE)


def test_core_imports_nothing_heavy() -> None:
    code = (
        f"import sys\nfor name in {CORE}: __import__(name)\n"
        f"found = sorted(sys.modules.keys() & set({HEAVY}))\n"
        f"sys.exit(f'core loaded {{found}}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

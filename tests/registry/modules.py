"""Module folders and facts for tests of the registry: small, and without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedsplit.registry.version import Facts, SiteFacts

BACKBONE = "b" * 64


def module(folder: Path, content: str = "weights", **about: Any) -> Path:
    """A module's folder as a run leaves it; other `content` makes another digest."""
    folder.mkdir(parents=True)
    said = {
        "classes": ["ng", "ok"],
        "backbone_sha256": BACKBONE,
        "backbone": {"name": "vit-glyphs", "model_type": "vit"},
        "module": {"kind": "lora"},
    }
    (folder / "fedsplit.json").write_text(json.dumps(said | about), encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(content.encode())
    return folder


def facts(task: str = "parts", run: str = "night", **given: Any) -> Facts:
    """What a run says of its module."""
    sites = (
        SiteFacts(name="工場A", samples=100, test_samples=20, scores={"accuracy": 0.9}),
        SiteFacts(name="line-b", samples=50, test_samples=10, scores={"accuracy": 0.8}),
    )
    whole: dict[str, Any] = {
        "task": task,
        "run": run,
        "sites": sites,
        "metrics": {"accuracy": 0.87},
        "settings": {"rounds": 3},
    }
    return Facts.model_validate(whole | given)

"""The three tasks, as settings of runs; real images, or digits alone for a small look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Value = str | int | float | bool
DATA = Path(__file__).resolve().parents[1] / "data"
_SIDE = 64


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task: its name and where its images are."""

    name: str
    data: str
    image_size: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much each task trains, alike in both ways."""

    backbone: str
    sites: int = 20
    samples: int = 500
    """Of a task, a fifth of them for testing."""
    rounds: int = 4
    local_epochs: int = 2
    batch_size: int = 8
    module_blocks: int = 2
    """FedYolo's LoRA sits on so many last blocks."""

    def settings(self, way: str, task: Task, seed: int) -> dict[str, Value]:
        """What a run is started with, but for its folders and where it starts."""
        return {
            "task": task.name,
            "data": task.data,
            "image-size": task.image_size,
            "backbone": self.backbone,
            "sites": self.sites,
            "max-samples": self.samples,
            "rounds": self.rounds,
            "local-epochs": self.local_epochs,
            "batch-size": self.batch_size,
            "partition": "iid",
            "test-fraction": 0.2,
            "seed": seed,
            "deadline-s": 1e7,
            **WAYS[way],
            **({"module-blocks": self.module_blocks} if way == "fedyolo" else {}),
        }


# In both ways the classifier starts at zero and takes the default's long strides; weights that are good already do not.
WAYS: Mapping[str, Mapping[str, Value]] = {
    "fedyolo": {
        "method": "fedyolo",
        "module": "lora",
        "lora-learning-rate": 2e-3,
        "classifier-init": "zero",
    },
    "full": {"method": "fedavg-full", "lora-learning-rate": 3e-4},
}


def real() -> list[Task] | None:
    """Photos, circuit boards, digits; None where experiments/prepare.py has not been run."""
    files = {name: DATA / f"{name}.npz" for name in ("cifar10", "deeppcb")}
    if not all(path.is_file() for path in files.values()):
        return None
    tasks = [Task(name=n, data=f"npz:{path}", image_size=_SIDE) for n, path in files.items()]
    return [*tasks, Task(name="digits", data="digits", image_size=_SIDE)]


def small(folder: Path) -> list[Task]:
    """Scikit-learn's digits as three tasks: 0 to 3, 4 to 6, 7 to 9. Writes their files to `folder`."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    tasks = []
    for first, last in ((0, 3), (4, 6), (7, 9)):
        chosen = (digits.target >= first) & (digits.target <= last)
        name = f"digits-{first}-{last}"
        np.savez(folder / f"{name}.npz", x=pixels[chosen], y=digits.target[chosen])
        tasks.append(Task(name=name, data=f"npz:{folder / name}.npz"))
    return tasks

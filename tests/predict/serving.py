"""A service over a trained module, its versions, and what a test asks it."""

from __future__ import annotations

import dataclasses
import io
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file

from fedsplit.predict.predictor import Predictor, load_predictor
from fedsplit.predict.serve.answering import Answering
from fedsplit.predict.serve.listening import Listening
from fedsplit.predict.serve.running import Serving


def png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pictures(count: int, seed: int = 0) -> list[bytes]:
    """Images of which no two are alike."""
    rng = np.random.default_rng(seed)
    return [png(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]


def version_of(module: Path, folder: Path, number: int) -> Predictor:
    """Another version of a module: its classifier is changed."""
    shutil.copytree(module, folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    rng = np.random.default_rng(number)
    for name, value in tensors.items():
        if "classifier" in name:
            tensors[name] = value + rng.normal(0, 1, value.shape).astype(value.dtype)
    save_file(tensors, file)
    return load_predictor(folder)


@contextmanager
def serving(
    answering: Answering, **settings: Any
) -> Iterator[tuple[Serving, list[dict[str, Any]]]]:
    """A service on a free port, and the lines of its access log."""
    lines: list[dict[str, Any]] = []
    grace_s = settings.pop("grace_s", 10.0)
    with Serving(answering, Listening(**settings), access=lines.append, grace_s=grace_s) as service:
        yield service, lines


@contextmanager
def client(service: Serving, **more: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.address, timeout=30, trust_env=False, **more) as made:
        yield made


class Gated:
    """A model that computes only when it may, and keeps how large its batches were."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.may = threading.Event()
        self.batches: list[int] = []

    def __call__(self, inputs: Any, mask: Any) -> Any:
        assert self.may.wait(30)
        self.batches.append(len(next(iter(inputs.values()))))
        return self._model(inputs, mask)


def gated(predictor: Predictor) -> tuple[Predictor, Gated]:
    model = Gated(predictor.model)
    made: Any = model
    return dataclasses.replace(predictor, model=made), model

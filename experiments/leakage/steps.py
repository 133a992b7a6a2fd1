"""A site's training steps in each mode, on the project's own split model and encoders, with the seam recorded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from experiments.leakage.scene import Scene
from experiments.leakage.wire import Recorder
from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Array, Encoder, EncoderTraining
from fedsplit.model import module, seam
from fedsplit.model.local_encoder import LocalEncoder
from fedsplit.model.module import ModuleSpec, ModuleTensors
from fedsplit.model.part import Part
from fedsplit.model.probing_encoder import ProbingEncoder
from fedsplit.model.split import SplitModel, device_part, server_part
from fedsplit.model.trained_tensors import TrainedTensors
from fedsplit.model.trained_tensors import trained_at as tensors_at
from fedsplit.model.training_encoder import TrainingEncoder
from fedsplit.training.data import Batch, CachedTransform, batches

Mode = Literal["head+tail", "hosted", "frozen", "zeroth-order"]
MODES: tuple[Mode, ...] = ("head+tail", "hosted", "frozen", "zeroth-order")
# The defaults of a run.
BATCH, CLASSIFIER_RATE, LORA_RATE = 32, 0.01, 0.0005


@dataclass(frozen=True)
class Seen:
    """What crossed in the last epoch, a row a sample (losses: a row a step), and what the attacker is after."""

    tensors: dict[str, Array]
    labels: NDArray[np.int64]
    steps_of: NDArray[np.int64]
    """[N], the step that a sample was in."""
    bias_change: Array
    """Of the classifier over all epochs: what the aggregator sees."""
    accuracy: float
    """Of the trained model on the site's own samples: what a server that holds the whole module can guess."""
    server: Part
    cut: Cut
    module: ModuleTensors
    """What the device holds at the end."""


def train(
    scene: Scene,
    mode: Mode,
    cut: Cut,
    *,
    codec: str = "fp32",
    epochs: int = 3,
    batch: int = BATCH,
    queries: int = 2,
    indices: NDArray[np.int64] | None = None,
    after: Seen | None = None,
) -> Seen:
    """Train the site for some epochs, as its first round would, and keep what crossed in the last.

    With `after` the round begins with the module that another one ended with.
    """
    spec = ModuleSpec(classes=scene.site.classes)
    start = module.initial(scene.backbone, spec, seed=0)
    if after is not None:
        start |= after.module
    device, server = device_part(scene.backbone, cut, spec), server_part(scene.backbone, spec)
    for part in (device, server):
        module.load(part, start)
    if mode != "head+tail":
        module.freeze_head(device, cut.a)
    wire = Recorder(_encoder(server, cut, mode, queries), codec)
    model, optimizer = SplitModel(device, cut, wire), _optimizer(device)
    transform = CachedTransform(scene.transform)
    chosen = np.arange(len(scene.site)) if indices is None else indices
    labels: list[NDArray[np.int64]] = []
    for epoch in range(epochs):
        wire.seen.clear()
        labels.clear()
        for number, one in enumerate(
            batches(scene.site, chosen, transform, batch_size=batch, seed=epoch)
        ):
            _step(model, wire, one, optimizer, mode, number + epoch * len(chosen))
            labels.append(one.labels.numpy())
    crossed = {name: _rows(name, parts) for name, parts in wire.seen.items()}
    bias, trained = start["classifier.bias"], module.read(device)
    accuracy = _accuracy(model, scene, chosen, transform) if batch > 1 else float("nan")
    return Seen(
        tensors=crossed,
        labels=np.concatenate(labels),
        steps_of=np.repeat(np.arange(len(labels)), [len(part) for part in labels]),
        bias_change=trained["classifier.bias"] - bias,
        accuracy=accuracy,
        server=server,
        cut=cut,
        module=trained,
    )


def _encoder(server: Part, cut: Cut, mode: Mode, queries: int) -> Encoder:
    if mode in {"head+tail", "frozen"}:
        return LocalEncoder(server, cut)
    training = EncoderTraining(
        mode="hosted" if mode == "hosted" else "zeroth-order",
        learning_rate=LORA_RATE,
        queries=queries,
    )
    tensors = TrainedTensors(tensors_at(server, cut), training)
    kind = TrainingEncoder if mode == "hosted" else ProbingEncoder
    return kind(server, cut, tensors)


def _optimizer(device: Part) -> torch.optim.Optimizer:
    own = {n: p for n, p in module.parameters(device).items() if p.requires_grad}
    groups = [
        {"params": [p for n, p in own.items() if ".lora_" not in n], "lr": CLASSIFIER_RATE},
        {"params": [p for n, p in own.items() if ".lora_" in n], "lr": LORA_RATE},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)


def _step(
    model: SplitModel,
    wire: Recorder,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    mode: Mode,
    number: int,
) -> None:
    if mode == "head+tail":
        z = model.encode(model.head(batch.inputs, batch.mask), batch.mask)
    else:
        with torch.no_grad():
            h = model.head(batch.inputs, batch.mask)
        if mode == "hosted":
            z = model.encode(h.detach().requires_grad_(), batch.mask)
        elif mode == "frozen":
            z = model.encode(h, batch.mask)
        else:
            z = _probe(model, wire, h, batch, number)
    loss = cross_entropy(model.tail(z, batch.mask), batch.labels)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _probe(model: SplitModel, wire: Recorder, h: Tensor, batch: Batch, number: int) -> Tensor:
    outputs = seam.probe(h, batch.mask, wire, number)
    with torch.no_grad():
        losses = [cross_entropy(model.tail(z, batch.mask), batch.labels) for z in outputs]
    seam.settle(torch.stack(losses), wire, number)
    return outputs[0]


def _rows(name: str, parts: list[Array]) -> Array:
    """Steps -> one array. Of the K outputs of a probe the first: the others differ by little."""
    if name == "losses":
        return np.stack(parts)
    if name == "z" and parts[0].ndim == 4:
        parts = [part[0] for part in parts]
    return np.concatenate(parts)


def _accuracy(
    model: SplitModel, scene: Scene, chosen: NDArray[np.int64], transform: CachedTransform
) -> float:
    right = 0
    with torch.no_grad():
        for one in batches(scene.site, chosen, transform, batch_size=64):
            logits = model(one.inputs, one.mask)
            right += int((logits.argmax(1) == one.labels).sum())
    return right / len(chosen)


def log_shares(scene: Scene, known: Seen, seen: Seen) -> Array:
    """What a server that knows the round's first module makes of the outputs it sent: log-probabilities [N, C]."""
    spec = ModuleSpec(classes=scene.site.classes)
    device = device_part(scene.backbone, seen.cut, spec)
    module.load(device, module.initial(scene.backbone, spec, seed=0) | known.module)
    model = SplitModel(device, seen.cut, LocalEncoder(seen.server, seen.cut))
    with torch.no_grad():
        logits = model.tail(torch.from_numpy(seen.tensors["z"]), None)
    return logits.log_softmax(dim=1).numpy()


def features(seen: Seen, size: int = 128) -> Array:
    """The server runs the rest of the public backbone on what it has: pooled features [N, P]."""
    z, part, blocks = seen.tensors["z"], seen.server, seen.server.backbone.blocks
    if z.ndim == 2:
        return z
    with torch.no_grad():
        found = [
            part.ends.pool(
                part.trunk.run(torch.from_numpy(z[i : i + size]), None, seen.cut.b, blocks), None
            ).numpy()
            for i in range(0, len(z), size)
        ]
    return np.concatenate(found)

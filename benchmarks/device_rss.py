"""How much memory does a device at (0, L) need against one that trains the whole model? `python -m benchmarks device-rss`

Every repetition starts a fresh process a role, one after the other: `baseline` only imports what a device imports (torch,
transformers, peft, fedsplit, grpc) and makes one AdamW step on one number; `whole` trains all parameters of ViT-Tiny; each
cut trains its module through a real stream to an encoder in a process of its own, by gradients or, where its role says so,
by forwards alone (zeroth order). All trainers make the same imports and get the same batches. What a role needs is its peak less the baseline's peak of the same repetition.

The peak is the kernel's for this program image (VmHWM). getrusage's ru_maxrss will not do: on Linux a child starts with
the peak of the process that forked it, exec or not, so a large parent hides what a small child needs.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import vit_tiny
from benchmarks.paired import Progress, Round, interleave, median, quiet, spread
from fedsplit.core.config import TrainSection
from fedsplit.core.cut import Cut
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.part import Part
from fedsplit.model.split import SplitModel, device_part
from fedsplit.training.data import Batch
from fedsplit.training.round import TrainSettings, train
from fedsplit.training.zeroth_order import ZerothOrder, train_zeroth_order

BATCH = 16
FORWARDS = " by forwards"
CUTS = ("0,12", "2,10", "0,8", f"0,8{FORWARDS}", "6,6", f"6,6{FORWARDS}")
SETTINGS = TrainSettings(train=TrainSection(learning_rate=1e-3, lora_learning_rate=0.0), epochs=1)
MIB = 1 << 20


@dataclass(frozen=True)
class Job:
    """What a role's process needs to know."""

    role: str
    """`baseline`, `whole`, or a cut, with FORWARDS behind it for zeroth order."""
    path: Path
    served: vit_tiny.Served
    steps: int
    batch: int
    threads: int


def peak_rss_mib() -> float:
    """The most memory that this program has held, in MiB."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:  # not Linux: there ru_maxrss is the process's own, in bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            MIB if sys.platform == "darwin" else 1024
        )
    line = next(x for x in status.splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def work(job: Job, pipe: Connection) -> None:
    """The process of one role: train, then tell the peak."""
    torch.set_num_threads(job.threads)
    _import_what_comes_late()
    if job.role != "baseline":
        backbone = Backbone.find(str(job.path))
        batches = vit_tiny.batches(backbone, steps=job.steps, size=job.batch)
        if job.role == "whole":
            _train_whole(backbone, batches)
        else:
            _train_split(job, backbone, batches)
    pipe.send(peak_rss_mib())


def _import_what_comes_late() -> None:
    import peft  # noqa: F401
    from transformers import ViTForImageClassification  # noqa: F401

    number = nn.Parameter(torch.zeros(1))
    number.sum().backward()  # type: ignore[no-untyped-call]
    torch.optim.AdamW([number]).step()


def _train_whole(backbone: Backbone, batches: list[Batch]) -> None:
    whole = Part(
        backbone,
        classes=len(vit_tiny.SPEC.classes),
        blocks=range(backbone.blocks),
        embeddings=True,
        pool=True,
    )
    held = [p for p in whole.model.parameters() if not p.is_meta]
    for parameter in held:
        parameter.requires_grad_(True)
    model = SplitModel(whole, Cut(backbone.blocks, backbone.blocks), None)
    optimizer = torch.optim.AdamW(held, lr=SETTINGS.train.learning_rate)
    for batch in batches:
        loss = nn.functional.cross_entropy(model(batch.inputs, batch.mask), batch.labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _train_split(job: Job, backbone: Backbone, batches: list[Batch]) -> None:
    cut = Cut.parse(job.role.removesuffix(FORWARDS))
    part = device_part(backbone, cut, vit_tiny.SPEC)
    module.load(part, vit_tiny.start_tensors(backbone))
    if cut.local(backbone.blocks):
        _train(job, SplitModel(part, cut, None), batches)
        return
    with job.served.dial(backbone, cut, batch=job.batch) as stream:
        _train(job, SplitModel(part, cut, stream), batches)


def _train(job: Job, model: SplitModel, batches: list[Batch]) -> None:
    if job.role.endswith(FORWARDS):
        train_zeroth_order(model, lambda _: batches, SETTINGS, ZerothOrder(seed=0))
    else:
        train(model, lambda _: batches, SETTINGS)


def measure(job: Job) -> float:
    """The peak of a fresh process in this role, in MiB."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe(duplex=False)
    process = spawn.Process(target=work, args=(job, there))
    process.start()
    there.close()
    try:
        return float(here.recv())
    finally:
        here.close()
        process.join()


def run(
    *,
    repetitions: int = 5,
    steps: int = 3,
    batch: int = BATCH,
    backbone: Path | None = None,
    cuts: tuple[str, ...] = CUTS,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """`ratio` is the median of (first cut - baseline) / (whole - baseline). `backbone`: instead of ViT-Tiny."""
    threads = torch.get_num_threads()
    with vit_tiny.vit_tiny() as path:
        found = Backbone.find(str(backbone or path))
        tensors = vit_tiny.start_tensors(found)
        with vit_tiny.encoder_process(found.path, tensors, threads=threads) as served:
            jobs = {
                role: partial(measure, Job(role, found.path, served, steps, batch, threads))
                for role in ("baseline", "whole", *cuts)
            }
            rounds = interleave(jobs, rounds=repetitions, warmup=0, progress=progress)
    what = f"{found.path.name}, batch {batch}, fp32, {steps} steps, {threads} threads"
    return _result(rounds, cuts, what)


def _result(rounds: list[Round], cuts: tuple[str, ...], what: str) -> dict[str, Any]:
    needs = [{role: one[role] - one["baseline"] for role in ("whole", *cuts)} for one in rounds]
    pairs = [
        one | {"ratio": need[cuts[0]] / need["whole"]}
        for one, need in zip(rounds, needs, strict=True)
    ]
    return {
        "name": "device-rss",
        "value": median(needs, cuts[0]),
        "unit": f"MiB above the baseline, device at ({cuts[0]})",
        "compared_with": "a device that trains all parameters of the same model with AdamW",
        "ratio": median(pairs, "ratio"),
        "pairs": pairs,
        "what": what,
        "extra": {
            role: {
                "peak_mib": spread(one[role] for one in rounds),
                "above_baseline_mib": spread(one[role] - one["baseline"] for one in rounds),
            }
            for role in rounds[0]
        },
    }

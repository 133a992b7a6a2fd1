"""How much of the unsplit model's step rate does the split over loopback gRPC keep? `python -m benchmarks split-step`

Both sides run the site's own training loop (training/round.py: forward, backward, AdamW) on the same batches from the same
module values, and train the same parameters: LoRA on the blocks that the cut gives the device, and the classifier. LoRA on
the other blocks counts in the forward pass and is frozen on both sides, so both do the same arithmetic; that their losses are
equal to the last bit is checked. Data is ready in memory: what is compared is the step.

Device and encoder take turns: the device waits while the server computes. So all three (device, encoder, unsplit model) get
as many threads as torch takes by itself, one a core, and the cores are not oversubscribed. On a machine that others keep busy
more than one OpenMP thread only waits for the other at barriers: there OMP_NUM_THREADS=1, which counts for all three.

Read `cpu_seconds_a_step` beside the ratio when others use the machine: a scheduler favours processes that sleep, which device
and encoder do in turn and the unsplit model does not, so a busy machine flatters the split. CPU seconds (unsplit / split, the
encoder's counted) do not see waiting, but no such favour either.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import vit_tiny
from benchmarks.paired import Progress, interleave, median, quiet, spread, with_ratio
from fedsplit.core.config import TrainSection
from fedsplit.core.cut import Cut
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleTensors
from fedsplit.model.part import Part
from fedsplit.model.split import SplitModel, device_part
from fedsplit.training.data import Batch
from fedsplit.training.round import TrainSettings, WaitMeter, train
from fedsplit.transport.client import StreamEncoder

CUT = Cut(1, 11)
BATCH = 16
SETTINGS = TrainSettings(train=TrainSection(learning_rate=1e-3, lora_learning_rate=0.0), epochs=1)


@dataclass
class Side:
    """One of the two: trains `batches` from the start and says how many steps a second that were."""

    model: SplitModel
    start: ModuleTensors
    batches: list[Batch]
    served: vit_tiny.Served
    meter: WaitMeter | None = None
    loss: float = 0.0
    cpu_s: list[float] = field(default_factory=list)
    """CPU seconds a step, of device and encoder together, a measurement each."""
    waited: list[float] = field(default_factory=list)
    """The part of each measurement in which the device waited for the encoder."""

    def rate(self) -> float:
        """Steps a second."""
        module.load(self.model.part, self.start)
        waited = self.meter.wait_s if self.meter else 0.0
        cpu, began = self._cpu(), time.perf_counter()
        self.loss = train(self.model, lambda _: self.batches, SETTINGS, meter=self.meter)
        took = time.perf_counter() - began
        self.cpu_s.append((self._cpu() - cpu) / len(self.batches))
        self.waited.append((self.meter.wait_s - waited) / took if self.meter else 0.0)
        return len(self.batches) / took

    def _cpu(self) -> float:
        encoder = psutil.Process(self.served.pid).cpu_times()
        return time.process_time() + encoder.user + encoder.system


def unsplit_part(backbone: Backbone, cut: Cut) -> Part:
    """The whole model in one process, training only what a device at `cut` trains."""
    part = device_part(backbone, Cut(backbone.blocks, backbone.blocks), vit_tiny.SPEC)
    trained = module.trained_names(backbone, vit_tiny.SPEC, cut, head=True)
    for name, parameter in module.parameters(part).items():
        parameter.requires_grad_(name in trained)
    return part


def run(
    *,
    pairs: int = 11,
    steps: int = 2,
    backbone: Path | None = None,
    cut: Cut = CUT,
    batch: int = BATCH,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Interleaved pairs of `steps` steps; `ratio` is the median of split/unsplit. `backbone`: instead of ViT-Tiny."""
    threads = torch.get_num_threads()
    with vit_tiny.vit_tiny() as path:
        whole = Backbone.find(str(backbone or path))
        tensors = vit_tiny.start_tensors(whole)
        with (
            vit_tiny.encoder_process(whole.path, tensors, threads=threads) as served,
            served.dial(whole, cut, batch=batch) as stream,
        ):
            return _compare(whole, cut, tensors, served, stream, pairs, steps, batch, progress) | {
                "threads": {"device": threads, "encoder": threads, "unsplit": threads}
            }


def _compare(
    backbone: Backbone,
    cut: Cut,
    tensors: ModuleTensors,
    served: vit_tiny.Served,
    stream: StreamEncoder,
    pairs: int,
    steps: int,
    batch: int,
    progress: Progress,
) -> dict[str, Any]:
    given = vit_tiny.batches(backbone, steps=steps, size=batch)
    meter = WaitMeter(stream)
    here = Cut(backbone.blocks, backbone.blocks)
    part = device_part(backbone, cut, vit_tiny.SPEC)
    split = Side(SplitModel(part, cut, meter), tensors, given, served, meter)
    unsplit = Side(SplitModel(unsplit_part(backbone, cut), here, None), tensors, given, served)
    rounds = interleave(
        {"split": split.rate, "unsplit": unsplit.rate}, rounds=pairs, progress=progress
    )
    results = with_ratio(rounds, "split", "unsplit")
    return {
        "name": "split-step",
        "value": median(rounds, "split"),
        "unit": "steps/s",
        "compared_with": "the same model in one process, same trained parameters, same cores",
        "ratio": median(results, "ratio"),
        "pairs": results,
        "what": f"{backbone.path.name}, cut {cut}, batch {batch}, fp32, {steps} steps a measurement",
        "losses_equal": split.loss == unsplit.loss,
        "device_waits": spread(split.waited[1:]),
        "bytes_a_step": (stream.bytes_up + stream.bytes_down) / stream.steps,
        "cpu_seconds_a_step": {
            "split": spread(split.cpu_s[1:]),
            "unsplit": spread(unsplit.cpu_s[1:]),
            "ratio": spread(u / s for s, u in zip(split.cpu_s[1:], unsplit.cpu_s[1:], strict=True)),
        },
        "ms_a_step": {
            name: spread(1000 / one[name] for one in rounds) for name in ("split", "unsplit")
        },
    }

"""What split_step and device_rss share: ViT-Tiny, a module for it, and an encoder in a process of its own.

The encoder's process is spawned, never forked (gRPC), and ends with its `with`, or when whoever started it is gone.
"""

from __future__ import annotations

import multiprocessing
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from fedsplit import __version__
from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Grant
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec, ModuleTensors
from fedsplit.training.data import Batch
from fedsplit.transport.client import StreamEncoder
from fedsplit.transport.tokens import sign

SHARED = Path(__file__).resolve().parents[2] / "shared" / "models" / "vit-tiny"
SPEC = ModuleSpec(classes=tuple("0123456789"), rank=8)
VERSION = "bench"
_STOP_S = 20.0


@contextmanager
def vit_tiny() -> Iterator[Path]:
    """The real weights where they are, else the same architecture with random ones."""
    if SHARED.is_dir():
        yield SHARED
        return
    import transformers

    config = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768
    )
    with tempfile.TemporaryDirectory(prefix="fedsplit-vit-tiny-") as folder:
        torch.manual_seed(0)
        transformers.ViTModel(config).save_pretrained(folder)
        yield Path(folder)


def start_tensors(backbone: Backbone) -> ModuleTensors:
    """A module away from its zeros, so that every tensor has a gradient."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: (value + 0.02 * torch.randn(value.shape, generator=generator).numpy()).astype("f4")
        for name, value in module.initial(backbone, SPEC, seed=1).items()
    }


def batches(backbone: Backbone, *, steps: int, size: int) -> list[Batch]:
    """Random images and labels: the same for every call."""
    generator = torch.Generator().manual_seed(7)
    side = int(backbone.config.image_size)
    return [
        Batch(
            inputs={"pixel_values": torch.randn(size, 3, side, side, generator=generator)},
            labels=torch.randint(0, len(SPEC.classes), (size,), generator=generator),
            mask=None,
            keys=np.arange(number * size, (number + 1) * size),
        )
        for number in range(steps)
    ]


@dataclass(frozen=True)
class Served:
    """A running encoder: where it is, what signs its tokens, and its process."""

    address: str
    key: bytes
    pid: int

    def dial(self, backbone: Backbone, cut: Cut, *, batch: int) -> StreamEncoder:
        """A new stream, as a site opens it for a round."""
        grant = Grant(
            run="bench",
            site="site",
            task="task",
            round=1,
            a=cut.a,
            b=cut.b,
            version=VERSION,
            backbone_sha256=backbone.sha256,
            fedsplit_version=__version__,
            max_batch=batch,
            max_tokens=backbone.max_tokens(0, 0),
            max_steps=1_000_000,
        )
        return StreamEncoder(self.address, sign(grant, self.key, 3600), grant)


@contextmanager
def encoder_process(path: Path, tensors: ModuleTensors, *, threads: int) -> Iterator[Served]:
    """An encoder with the module published, in a process of its own."""
    names: Iterable[str] = module.server_names(Backbone.find(str(path)), SPEC)
    packed = module.pack(SPEC, {name: tensors[name] for name in names})
    key = secrets.token_bytes(32)
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(str(path), packed, key, threads, there))
    process.start()
    there.close()  # so that recv raises when the process dies
    try:
        yield Served(here.recv(), key, process.pid or 0)
    finally:
        here.close()
        process.join(_STOP_S)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(path: str, packed: bytes, key: bytes, threads: int, pipe: Connection) -> None:
    from fedsplit.transport.server import EncoderServer
    from fedsplit.trunk.host import BackboneHost

    torch.set_num_threads(threads)
    host = BackboneHost(Backbone.find(path))
    host.publish(VERSION, packed)
    with EncoderServer(host, key=key) as server:
        pipe.send(server.address)
        try:
            pipe.recv()
        except EOFError:  # nobody holds the other end any more: that is the way to stop
            return

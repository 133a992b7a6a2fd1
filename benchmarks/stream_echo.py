"""How fast is the step stream against a bare gRPC echo of the same bytes? `python -m benchmarks.stream_echo`

Both sides are a process of their own on loopback; a tensor of 16 x 197 x 192 float32 goes up and comes down, two in flight.
The pair's two measurements are taken one after the other, the order alternates; only their ratio counts.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import grpc
import numpy as np

import fedsplit
from fedsplit.core.encoder import Array, Capabilities, Encoder, Grant, Mask, Want
from fedsplit.transport.client import ClientTls, StreamEncoder
from fedsplit.transport.server import EncoderServer
from fedsplit.transport.tokens import sign

SHAPE = (16, 197, 192)
KEY = b"benchmark key, 32 bytes or more!"
DIGEST = "0" * 64
IN_FLIGHT = 2
_OPTIONS = [("grpc.max_receive_message_length", 4 << 20), ("grpc.max_send_message_length", 4 << 20)]


class IdentityHost:
    """An EncoderHost, and the encoder of all its sessions, that gives back what it gets and trains nothing."""

    trains = False

    def capabilities(self) -> Capabilities:
        return Capabilities(
            fedsplit_version=fedsplit.__version__,
            backbone="identity",
            backbone_sha256=DIGEST,
            blocks=12,
            width=SHAPE[2],
            pooled_width=SHAPE[2],
            versions=("v0",),
        )

    def open(self, grant: Grant) -> Encoder:  # noqa: ARG002
        return self

    def publish(self, version: str, tensors: bytes) -> None:
        pass

    def collect(self, version: str) -> dict[str, dict[str, Array]]:  # noqa: ARG002
        return {}

    def encode(
        self,
        step: int,  # noqa: ARG002
        h_BTD: Array,
        mask_BT: Mask | None = None,  # noqa: ARG002
        *,
        want: Want = "output",  # noqa: ARG002
    ) -> Array:
        return h_BTD

    def graph_bytes(self, batch: int, tokens: int) -> int:  # noqa: ARG002
        return 0

    def settle(self, step: int, answer: Array, *, quiet: bool = False) -> Array:  # noqa: ARG002
        return answer

    def close(self) -> None:
        pass


def grant() -> Grant:
    """A grant that fits IdentityHost."""
    return Grant(
        run="bench",
        site="site",
        task="task",
        round=0,
        a=2,
        b=10,
        version="v0",
        backbone_sha256=DIGEST,
        fedsplit_version=fedsplit.__version__,
        max_batch=SHAPE[0],
        max_tokens=SHAPE[1],
        max_steps=1_000_000,
    )


class _BareEcho(grpc.GenericRpcHandler):  # type: ignore[misc]
    def service(self, _details: Any) -> Any:
        return grpc.stream_stream_rpc_method_handler(lambda requests, _: (m for m in requests))


def serve(pipe: Connection) -> None:
    """Both servers in one process, until the pipe says stop."""
    bare = grpc.server(ThreadPoolExecutor(4), options=_OPTIONS)
    bare.add_generic_rpc_handlers((_BareEcho(),))
    port = bare.add_insecure_port("127.0.0.1:0")
    bare.start()
    with EncoderServer(IdentityHost(), key=KEY) as server:
        pipe.send((f"127.0.0.1:{port}", server.address))
        pipe.recv()
    bare.stop(0).wait()


def bare_rate(address: str, steps: int) -> float:
    """Echoes a second of the tensor's bytes as one message."""
    payload = np.zeros(SHAPE, np.float32).tobytes()
    free = threading.BoundedSemaphore(IN_FLIGHT)
    started = 0.0

    def requests() -> Iterator[bytes]:
        for _ in range(steps + 1):
            free.acquire()
            yield payload

    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        for number, _ in enumerate(channel.stream_stream("/bare/Echo")(requests())):
            free.release()
            started = started if number else time.perf_counter()
        return steps / (time.perf_counter() - started)


def stream_rate(address: str, steps: int, tls: ClientTls | None = None) -> float:
    """Encodes a second through StreamEncoder, from as many threads as may be in flight."""
    h_BTD = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    token = sign(grant(), KEY, 600)
    with (
        StreamEncoder(address, token, grant(), tls=tls, max_in_flight=IN_FLIGHT) as stream,
        ThreadPoolExecutor(IN_FLIGHT) as pool,
    ):
        stream.encode(0, h_BTD)
        started = time.perf_counter()
        for _ in pool.map(lambda step: stream.encode(step, h_BTD), range(1, steps + 1)):
            pass
        return steps / (time.perf_counter() - started)


def run(pairs: int = 9, steps: int = 60) -> dict[str, Any]:
    """Interleaved pairs; `ratio` is the median of stream/bare."""
    spawn = multiprocessing.get_context("spawn")  # a process that used gRPC must not fork
    here, there = spawn.Pipe()
    process = spawn.Process(target=serve, args=(there,))
    process.start()
    try:
        bare_address, stream_address = here.recv()
        results = []
        for number in range(pairs + 1):
            if number % 2:
                bare, stream = bare_rate(bare_address, steps), stream_rate(stream_address, steps)
            else:
                stream, bare = stream_rate(stream_address, steps), bare_rate(bare_address, steps)
            results.append({"bare": bare, "stream": stream, "ratio": stream / bare})
    finally:
        here.send("stop")
        process.join()
    kept = results[1:]  # the first warms both
    ratios = sorted(r["ratio"] for r in kept)
    return {
        "name": "stream_echo",
        "value": statistics.median(r["stream"] for r in kept),
        "unit": "steps/s of 2.4 MB up and down",
        "compared_with": "bare sync bidirectional gRPC echo of the same bytes, also 2 in flight",
        "ratio": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "pairs": kept,
    }


if __name__ == "__main__":
    print(json.dumps(run(), indent=1))

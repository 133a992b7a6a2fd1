"""What does the wire add to a step's tensors? `python -m benchmarks.wire_overhead`

Counts every byte that gRPC was given (headers, handshake, masks) against the tensors' own; HTTP/2 and TCP framing are not in it.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from benchmarks.stream_echo import KEY, SHAPE, IdentityHost, grant
from fedsplit.transport.client import StreamEncoder
from fedsplit.transport.server import EncoderServer
from fedsplit.transport.tokens import sign


def run(steps: int = 1) -> dict[str, Any]:
    """One step, so that the handshake weighs in fully."""
    h_BTD = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    pairs = []
    with EncoderServer(IdentityHost(), key=KEY) as server:
        for _ in range(5):
            with StreamEncoder(server.address, sign(grant(), KEY, 600), grant()) as stream:
                for step in range(steps):
                    stream.encode(step, h_BTD, want="gradient")
                    stream.settle(step, h_BTD)
                t = stream.traffic()
            up, down = t.bytes_up / t.payload_up, t.bytes_down / t.payload_down
            pairs.append(
                {"bytes_up": t.bytes_up, "payload_up": t.payload_up, "up": up, "down": down}
            )
    ratio = max(max(p["up"], p["down"]) for p in pairs)
    return {
        "name": "wire_overhead",
        "value": ratio,
        "unit": "bytes sent / tensor bytes",
        "compared_with": "the raw float32 bytes of the same step",
        "ratio": ratio,
        "pairs": pairs,
    }


if __name__ == "__main__":
    print(json.dumps(run(), indent=1))

"""An encoder that keeps whatever crosses the seam: what a server sees, and who reads the line where there is no TLS."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from fedsplit.core.encoder import Array, Encoder, Mask, Want
from fedsplit.transport.codec import Codec, find_codec


class Recorder:
    """Passes every call on and keeps copies of the tensors, each as it comes out of the codec.

    `seen` holds, in order of the steps: h and losses (site to encoder), z (back), dz up, dh down.
    """

    def __init__(self, encoder: Encoder, codec: str = "fp32") -> None:
        self._encoder = encoder
        self._codec: Codec = find_codec(codec)
        self.seen: dict[str, list[Array]] = defaultdict(list)

    @property
    def trains(self) -> bool:
        """As the encoder."""
        return self._encoder.trains

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, want: Want = "output"
    ) -> Array:
        """See core.encoder.Encoder."""
        h_BTD = self._cross("h", h_BTD)
        return self._cross("z", self._encoder.encode(step, h_BTD, mask_BT, want=want))

    def settle(self, step: int, answer: Array, *, quiet: bool = False) -> Array | None:
        """See core.encoder.Encoder. Losses, one number a forward, travel as fp32 whatever the codec."""
        if answer.ndim == 1:
            self.seen["losses"].append(answer.copy())
            return self._encoder.settle(step, answer)
        dh = self._encoder.settle(step, self._cross("dz", answer), quiet=quiet)
        return None if dh is None else self._cross("dh", dh)

    def close(self) -> None:
        """See core.encoder.Encoder."""
        self._encoder.close()

    def _cross(self, name: str, array: Array) -> Array:
        encoded = self._codec.encode(array)
        payload = np.frombuffer(bytes(encoded.data), dtype=np.uint8).copy()
        arrived = self._codec.decode(encoded.dims, payload)
        self.seen[name].append(arrived.copy())
        return arrived

"""The Encoder protocol: the one seam between `model` and `transport`, which cannot see each other.

The real model (model/encoder.py), the gRPC stream (transport/client.py) and the fakes in the tests
implement `Encoder` alike; `serving` implements `EncoderHost` for the gRPC server. Shapes:
B batch, T tokens, D the backbone's width, P the width of the pooled features.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from fedsplit.core.cut import Cut

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]


class Encoder(Protocol):
    """One session with blocks[a:b] at a fixed module version. Safe to call from several threads.

    Step ids are the caller's, strictly increasing within a session; evaluation and training share them.
    """

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, keep: bool = False
    ) -> Array:
        """Run the encoder: activations [B, T, D] -> [B, T, D], or [B, P] where the server pools (b = L).

        `mask_BT` is True on real tokens; None means all are. With `keep` the step's graph is held until
        `backprop(step, ...)`.
        """
        ...

    def backprop(self, step: int, dz: Array) -> Array:
        """Gradient of the loss at the encoder's output -> gradient at its input [B, T, D]. Frees the step."""
        ...

    def close(self) -> None:
        """End the session and free whatever it holds. Calling it twice is harmless."""
        ...


class Grant(BaseModel):
    """What one site may do at the encoder for one round: the claims of its signed token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str = Field(min_length=1, max_length=128)
    site: str = Field(min_length=1, max_length=128)
    task: str = Field(min_length=1, max_length=128)
    round: int = Field(ge=0)
    a: int = Field(ge=0)
    b: int = Field(ge=0)
    version: str = Field(min_length=1, max_length=128)
    """The module version that the encoder applies on its blocks."""
    backbone_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    fedsplit_version: str = Field(min_length=1, max_length=64)
    max_batch: int = Field(ge=1)
    max_tokens: int = Field(ge=1)
    max_steps: int = Field(ge=1)

    @property
    def cut(self) -> Cut:
        """The cut that the session runs."""
        return Cut(self.a, self.b)


class Capabilities(BaseModel):
    """What an encoder host offers; anyone with a valid token may ask."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fedsplit_version: str
    backbone: str
    backbone_sha256: str
    blocks: int
    width: int
    pooled_width: int
    versions: tuple[str, ...]


class EncoderHost(Protocol):
    """What the gRPC server needs from the host of the frozen backbone."""

    def capabilities(self) -> Capabilities:
        """What this host offers."""
        ...

    def open(self, grant: Grant) -> Encoder:
        """Start a session. Raises RefusedError when the grant does not fit this host."""
        ...

    def publish(self, version: str, tensors: bytes) -> None:
        """Install a module version (safetensors bytes, names of the whole model). Raises ProtocolError on bad bytes."""
        ...

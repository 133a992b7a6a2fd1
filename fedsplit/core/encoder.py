"""The Encoder protocol: the one seam between `model` and `transport`, which cannot see each other.

Encoders in this process (model/local_encoder.py), the gRPC stream (transport/client.py) and the fakes in the tests
implement `Encoder` alike; `trunk` implements `EncoderHost` for the gRPC server. What the encoder itself trains, if
anything, is the grant's `EncoderTraining`. Shapes: B batch, T tokens, D the backbone's width, P the width of the pooled
features, K perturbed forwards of a step.
"""

from __future__ import annotations

import re
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

import fedsplit
from fedsplit.core.config import TrainSection
from fedsplit.core.cut import Cut

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]


Want = Literal["output", "gradient", "probes"]
"""What the caller will want of a step: its output alone; then also a gradient; or the outputs of K perturbed encoders."""


class Encoder(Protocol):
    """One session with blocks[a:b] at a fixed module version. Safe to call from several threads.

    Step ids are the caller's, strictly increasing within a session; evaluation and training share them. Where the
    session trains, `encode` uses the weights of the moment, and a step's gradient is that of the weights of its own
    forward. Calls that the session's `EncoderTraining` does not allow raise RefusedError.
    """

    @property
    def trains(self) -> bool:
        """Does a gradient that is sent back train tensors at the encoder (hosted, shared)?"""
        ...

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, want: Want = "output"
    ) -> Array:
        """Run the encoder: activations [B, T, D] -> [B, T, D], or [B, P] where the server pools (b = L).

        `mask_BT` is True on real tokens; None means all are. What the step leaves behind depends on `want`:

        output: nothing. gradient: its graph is held until `settle` brings the gradient at its output.
        probes (zeroth order): the answer is that of K perturbed encoders, [K, B, T, D] or [K, B, P], in the order of
        `core.directions.points`; the step waits until `settle` brings their K losses.
        """
        ...

    def settle(self, step: int, answer: Array, *, quiet: bool = False) -> Array | None:
        """Bring what a step waits for, and free it. The encoder steps the optimiser of what it trains.

        `answer` is dz, the loss's gradient at the step's output, and what comes back is dh, the gradient at its input
        [B, T, D]; or the K losses of a probed step, and nothing comes back. With `quiet` no dh is made either: for a
        caller that trains nothing below. Raises ProtocolError for a step that waits for nothing.
        """
        ...

    def close(self) -> None:
        """End the session and free whatever it holds. Calling it twice is harmless."""
        ...


class HostedEncoder(Encoder, Protocol):
    """A session at the host, which also knows what a step costs."""

    def graph_bytes(self, batch: int, tokens: int) -> int:
        """Bytes that the graph of a step of this shape holds between `encode` and its gradient."""
        ...


EncoderMode = Literal["hosted", "shared", "zeroth-order"]
Estimator = Literal["forward", "central", "one-point"]
Directions = Literal["gaussian", "sphere"]


class EncoderTraining(BaseModel):
    """What a session trains at the encoder, and how: the module's tensors on the server's blocks of its cut.

    hosted: a copy of its own, for the site. shared: one copy for all sessions of the module version. zeroth-order: a
    copy of its own that is stepped by estimates from the losses of perturbed forwards.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: EncoderMode
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(gt=0, le=1e6, allow_inf_nan=False)
    """Of this round: a schedule's factor is already in it."""
    weight_decay: float = Field(default=0.0, ge=0, le=1e6, allow_inf_nan=False)
    clip_norm: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Largest norm of a step's gradient over the tensors that train here; 0: no limit."""
    lora: Literal["both", "A", "B"] = "both"
    """Which half of each LoRA pair trains (FFA-LoRA and RoLoRA train one)."""
    weight: float = Field(default=1.0, gt=0, le=1)
    """Shared: the site's part of all samples; its steps are taken with this times the learning rate."""
    leave: int = Field(default=0, ge=0)
    """Blocks of the model after which a forward that is kept leaves for the encoder's pooling; 0: all up to b."""
    estimator: Estimator = "central"
    queries: int = Field(default=1, ge=1, le=1024)
    """Directions of a zeroth-order step."""
    epsilon: float = Field(default=0.01, gt=0, le=1e3, allow_inf_nan=False)
    """How far along a direction the weights are moved."""
    directions: Directions = "gaussian"
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Of the directions; with the probe's number within the session it makes them."""

    @classmethod
    def of(
        cls, train: TrainSection, mode: EncoderMode, round_: int, **of_session: Any
    ) -> EncoderTraining:
        """What a run's settings of training ask for in a round; `of_session`: lora, weight, leave and seed."""
        rate = train.lora_learning_rate or train.learning_rate
        return cls(
            mode=mode,
            optimizer=train.optimizer,
            learning_rate=rate * train.learning_rate_factor(max(round_, 1)),
            weight_decay=train.weight_decay,
            clip_norm=train.clip_norm,
            estimator=train.zo_estimator,
            queries=train.zo_queries,
            epsilon=train.zo_epsilon,
            directions=train.zo_directions,
            **of_session,
        )


PREDICT = "predict"
"""Stands where a run's name does in a grant to predict."""
_PREDICT_BATCH, _PREDICT_TOKENS = 256, 8192


class Inference(BaseModel):
    """What a session that predicts may ask of a registered module version: forwards, and no more than this of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_rows: int = Field(ge=1, le=10**9)
    """Samples in all, over the token's streams."""
    rows_per_minute: int = Field(ge=1, le=10**6)
    """Samples a minute, over all of the site's tokens. Who asks faster waits."""


class Grant(BaseModel):
    """What one site may do at the encoder, for a round or to predict: the claims of its signed token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str = Field(min_length=1, max_length=128)
    site: str = Field(min_length=1, max_length=128)
    task: str = Field(min_length=1, max_length=128)
    round: int = Field(ge=0)
    a: int = Field(ge=0)
    b: int = Field(ge=0)
    version: str = Field(min_length=1, max_length=128)
    """The module version that the encoder applies on its blocks: as a run published it, or its digest in the registry."""
    backbone_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    fedsplit_version: str = Field(min_length=1, max_length=64)
    max_batch: int = Field(ge=1)
    max_tokens: int = Field(ge=1)
    max_steps: int = Field(ge=1)
    training: EncoderTraining | None = None
    """What the session trains at the encoder; None: nothing."""
    inference: Inference | None = None
    """For a session that predicts; None: the session is a run's."""

    @model_validator(mode="after")
    def _trains_or_predicts(self) -> Grant:
        if self.inference is None:
            return self
        if self.training is not None:
            raise ValueError(
                "a grant to predict trains nothing: `training` and `inference` exclude each other"
            )
        if not re.fullmatch(r"[0-9a-f]{64}", self.version):
            raise ValueError(
                "a grant to predict names its module version by the digest, 64 hexadecimal digits"
            )
        return self

    @classmethod
    def to_predict(
        cls,
        cut: Cut,
        inference: Inference,
        *,
        site: str,
        task: str,
        version: str,
        backbone_sha256: str,
    ) -> Grant:
        """A site's grant to predict with a registered version; a step is as large as the encoder lets messages be."""
        return cls(
            run=PREDICT,
            site=site,
            task=task or "-",
            round=0,
            a=cut.a,
            b=cut.b,
            version=version,
            backbone_sha256=backbone_sha256,
            fedsplit_version=fedsplit.__version__,
            max_batch=_PREDICT_BATCH,
            max_tokens=_PREDICT_TOKENS,
            max_steps=inference.max_rows,
            inference=inference,
        )

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

    def open(self, grant: Grant) -> HostedEncoder:
        """Start a session. Raises RefusedError when the grant does not fit this host."""
        ...

    def publish(self, version: str, tensors: bytes) -> None:
        """Install a module version (safetensors bytes, names of the whole model). Raises ProtocolError on bad bytes."""
        ...

    def collect(self, version: str) -> dict[str, dict[str, Array]]:
        """What sessions of a version have trained here: site -> name -> delta; for shared, one under "".

        A second call gives nothing. Raises RefusedError for a version that is not here.
        """
        ...

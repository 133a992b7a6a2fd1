"""A site's end of the wire: `StreamEncoder` is an Encoder that happens to be on another machine.

It turns tensors into messages and keeps the order of steps; duplex.py moves the frames. The small calls are in calls.py and
are offered here too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from fedsplit.core.closing import Closing
from fedsplit.core.encoder import Array, Grant, Mask, Want
from fedsplit.core.errors import (
    ConfigError,
    EncoderError,
    ProtocolError,
    RefusedError,
    UnreachableError,
)
from fedsplit.transport.calls import capabilities, collect, publish
from fedsplit.transport.codec import Dims, Encoded, check_range, encode_mask, find_codec
from fedsplit.transport.duplex import Duplex, Reply
from fedsplit.transport.frames import Flag, FrameKind, frames_of
from fedsplit.transport.messages import Hello
from fedsplit.transport.shapes import (
    ACK,
    LOSSES,
    check_h_dims,
    check_probed_size,
    check_size,
    probed_dims,
    z_dims,
)
from fedsplit.transport.wiring import ClientTls, open_channel

__all__ = ["ClientTls", "StreamEncoder", "Traffic", "capabilities", "collect", "publish"]

_ANSWER = {FrameKind.ENCODE: FrameKind.ENCODED, FrameKind.PROBE: FrameKind.PROBED}


class Traffic(BaseModel):
    """What a stream has moved so far. Bytes include headers, masks and handshake; payload is tensors and masks."""

    model_config = ConfigDict(frozen=True)

    bytes_up: int
    bytes_down: int
    payload_up: int
    payload_down: int
    steps: int
    wait_s: float
    """Time that callers spent waiting, added up over threads."""


class _Going(NamedTuple):
    """Activations on their way: an ENCODE or a PROBE."""

    kind: FrameKind
    step: int
    h: Array
    mask: Mask | None
    keep: bool


class _KeptStep(NamedTuple):
    kind: FrameKind
    wire_step: int
    h_dims: Dims
    z_dims: Dims


class StreamEncoder(Closing):
    """Encoder over one gRPC stream. Connects when made; `close` it, or use it in a `with`.

    Several threads may call it at once; `max_in_flight` of them have a step on the wire. Step ids are the callers' labels:
    the wire numbers the steps in the order in which they leave, so threads need not agree on one. After an error from the
    encoder the stream is over: make a new one. Arrays that it returns are writable and the caller's.
    Raises ConfigError, RefusedError, ProtocolError, OverloadedError and UnreachableError.
    """

    def __init__(
        self,
        address: str,
        token: str,
        grant: Grant,
        *,
        codec: str = "fp32",
        tls: ClientTls | None = None,
        max_in_flight: int = 2,
        step_timeout_s: float = 120.0,
        connect_timeout_s: float = 20.0,
        allow_insecure: bool = False,
    ) -> None:
        """`step_timeout_s` starts anew with every chunk that moves. `allow_insecure`: plaintext beyond loopback."""
        if max_in_flight < 1:
            raise ConfigError(f"max_in_flight is {max_in_flight}: 1 or more is wanted")
        self._codec = find_codec(codec)
        self._step_timeout_s = step_timeout_s
        self._slots = threading.BoundedSemaphore(max_in_flight)
        self._order = threading.Lock()
        self._kept: dict[int, _KeptStep] = {}
        self._next_step = 0
        self._closed = False
        self._payload_up = self._payload_down = self._steps = 0
        self._wait_s = 0.0
        self._channel = open_channel(address, tls, allow_insecure=allow_insecure)
        self._duplex = Duplex(self._channel, address, token, self._codec, tls=tls is not None)
        try:
            self.welcome = self._duplex.greet(Hello.of(grant, codec), connect_timeout_s)
        except EncoderError:
            self.close()
            raise

    @property
    def trains(self) -> bool:
        """Does a gradient that is sent back train tensors at the encoder (hosted, shared)?"""
        return self.welcome.training in ("hosted", "shared")

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, want: Want = "output"
    ) -> Array:
        """See core.encoder.Encoder. Leaves as ENCODE, or as PROBE where probes are wanted."""
        kind = FrameKind.PROBE if want == "probes" else FrameKind.ENCODE
        if kind is FrameKind.PROBE:
            self._check_probe(step, h_BTD.shape)
        with self._in_flight():
            reply = self._post_h(_Going(kind, step, h_BTD, mask_BT, want != "output"))
            return self._received(reply, f"{kind.name} step {step}")

    def settle(self, step: int, answer: Array, *, quiet: bool = False) -> Array | None:
        """See core.encoder.Encoder. Leaves as BACKPROP, for a probed step as SCORE."""
        if quiet and not self.trains:
            raise RefusedError(
                f"step {step}: nothing trains at the encoder (the token's training is {self.welcome.training})"
            )
        if self._held(step).kind is FrameKind.PROBE:
            losses = self._checked_losses(step, answer)
            with self._in_flight():
                self._done(self._post_losses(step, losses), f"SCORE step {step}")
            return None
        with self._in_flight():
            reply = self._post_dz(step, answer, quiet=quiet)
            if not quiet:
                return self._received(reply, f"BACKPROP step {step}")
            self._done(reply, f"BACKPROP step {step}")
        return None

    def close(self) -> None:
        """End the session, its thread and its connection. Twice is harmless."""
        self._closed = True
        self._duplex.close()
        self._channel.close()

    def traffic(self) -> Traffic:
        """A snapshot of the counters."""
        with self._order:
            return Traffic(
                bytes_up=self.bytes_up,
                bytes_down=self.bytes_down,
                payload_up=self._payload_up,
                payload_down=self._payload_down,
                steps=self._steps,
                wait_s=self._wait_s,
            )

    @property
    def bytes_up(self) -> int:
        """Bytes of all messages that left, headers included."""
        return self._duplex.outbox.sent_bytes

    @property
    def bytes_down(self) -> int:
        """Bytes of all messages that came, headers included."""
        return self._duplex.received_bytes

    @property
    def payload_up(self) -> int:
        """Bytes of tensors and masks that were sent."""
        return self._payload_up

    @property
    def payload_down(self) -> int:
        """Bytes of tensors that came."""
        return self._payload_down

    @property
    def steps(self) -> int:
        """Encodes and probes so far."""
        return self._steps

    @property
    def wait_s(self) -> float:
        """Time that callers spent waiting, added up over threads."""
        return self._wait_s

    def _check_probe(self, step: int, h_dims: Dims) -> None:
        if not self.welcome.probes:
            raise RefusedError(
                f"step {step} cannot be probed: the token's training is {self.welcome.training}"
            )
        check_probed_size(h_dims, self.welcome, self._codec)

    def _checked_losses(self, step: int, losses_K: Array) -> Array:
        losses = np.asarray(losses_K, dtype=np.float32)
        if losses.shape != (self.welcome.probes,):
            raise ProtocolError(
                f"step {step} has losses of shape {losses.shape}: ({self.welcome.probes},) is wanted"
            )
        check_range(losses, f"the losses of step {step}")
        return losses

    def _encoded(self, array: Array) -> Encoded:
        body = self._codec.encode(array)
        check_size(len(body.data), self.welcome.max_message_bytes)
        return body

    def _frames(
        self, kind: FrameKind, step: int, body: Encoded, flags: Flag = Flag.NONE
    ) -> Iterator[bytes]:
        session = self.welcome.session
        return frames_of(kind, body, codec=self._codec.id, flags=flags, session=session, step=step)

    def _post_h(self, going: _Going) -> Reply:
        """Number a step and send its activations."""
        kind, step, h_BTD, mask_BT, keep = going
        h_dims = h_BTD.shape
        check_h_dims(h_dims, self.welcome)
        if mask_BT is not None and mask_BT.shape != h_dims[:2]:
            raise ProtocolError(f"the mask has shape {mask_BT.shape}: {h_dims[:2]} is wanted")
        body = self._encoded(h_BTD)
        mask = None if mask_BT is None else encode_mask(mask_BT)
        shape_of = probed_dims if kind is FrameKind.PROBE else z_dims
        out_dims = shape_of(h_dims, self.welcome)
        with self._order:
            if keep:
                self._check_keep(step)
            wire_step = self._next_step
            flags = Flag.KEEP if keep and kind is FrameKind.ENCODE else Flag.NONE
            frames = self._h_frames(kind, wire_step, body, mask, flags)
            reply = self._duplex.post(frames, _ANSWER[kind], wire_step, out_dims)
            self._next_step += 1
            self._steps += 1
            self._payload_up += len(body.data) + (len(mask.data) if mask else 0)
            if keep:
                self._kept[step] = _KeptStep(kind, wire_step, h_dims, out_dims)
        return reply

    def _post_dz(self, step: int, dz: Array, *, quiet: bool) -> Reply:
        """Send a kept step's gradient; an ACK answers where it is `quiet`."""
        body = self._encoded(dz)
        with self._order:
            kept = self._held(step)
            if dz.shape != kept.z_dims:
                raise ProtocolError(
                    f"dz of step {step} has shape {dz.shape}: {kept.z_dims} is wanted"
                )
            flags = Flag.QUIET if quiet else Flag.NONE
            frames = self._frames(FrameKind.BACKPROP, kept.wire_step, body, flags)
            answer, dims = (FrameKind.ACK, ACK.dims) if quiet else (FrameKind.GRAD, kept.h_dims)
            reply = self._duplex.post(frames, answer, kept.wire_step, dims)
            del self._kept[step]
            self._payload_up += len(body.data)
        return reply

    def _post_losses(self, step: int, losses_K: Array) -> Reply:
        """Send a probed step's losses, exact whatever the session's codec."""
        body, session = LOSSES.encode(losses_K), self.welcome.session
        with self._order:
            wire_step = self._held(step).wire_step
            frames = frames_of(
                FrameKind.SCORE, body, codec=LOSSES.id, session=session, step=wire_step
            )
            reply = self._duplex.post(frames, FrameKind.ACK, wire_step, ACK.dims)
            del self._kept[step]
            self._payload_up += len(body.data)
        return reply

    def _h_frames(
        self, kind: FrameKind, step: int, body: Encoded, mask: Encoded | None, flags: Flag
    ) -> Iterable[bytes]:
        if mask is None:
            return self._frames(kind, step, body, flags)
        first = frames_of(FrameKind.MASK, mask, session=self.welcome.session, step=step)
        return chain(first, self._frames(kind, step, body, flags | Flag.MASK))

    def _held(self, step: int) -> _KeptStep:
        """The step that waits for its gradient or losses. Raises ProtocolError when there is none."""
        kept = self._kept.get(step)
        if kept is None:
            raise ProtocolError(
                f"step {step} is not kept: encode it with a gradient or probes wanted, and settle it once"
            )
        return kept

    def _check_keep(self, step: int) -> None:
        if step in self._kept:
            raise ProtocolError(f"step {step} is already kept: step ids must not repeat")
        if len(self._kept) >= self.welcome.max_kept_steps:
            raise RefusedError(
                f"step {step} cannot be kept: {len(self._kept)} steps wait for their gradient or losses, which is all "
                "that the encoder allows; settle them first"
            )

    @contextmanager
    def _in_flight(self) -> Iterator[None]:
        started = time.monotonic()
        with self._slots:
            if self._closed:
                raise UnreachableError("the stream is closed: make a new one")
            try:
                yield
            finally:
                with self._order:
                    self._wait_s += time.monotonic() - started

    def _received(self, reply: Reply, what: str) -> Array:
        message = self._duplex.wait(reply, what, self._step_timeout_s)
        array = self._codec.decode(message.header.dims, message.payload)
        check_range(array, f"the encoder's answer to {what}")
        with self._order:
            self._payload_down += message.header.total
        return array

    def _done(self, reply: Reply, what: str) -> None:
        self._duplex.wait(reply, what, self._step_timeout_s)

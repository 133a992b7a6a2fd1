"""The encoder without a wire, for the runs of a grid: same values, same bytes counted, and work shared between runs.

A session here rounds tensors as the codec would and counts the frames that the stream would have
moved, but calls the host in this process. What frozen blocks answered for a sample is kept
(memo.py), across batches, rounds, seeds and runs: same activation, same blocks, same server
tensors, same answer. Times of such a run say nothing of a deployment; bytes and accuracies do.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from fedsplit.core.closing import Closing
from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Array, Encoder, Grant, Mask, Want
from fedsplit.core.errors import RefusedError, UnreachableError
from fedsplit.core.orders import Stream
from fedsplit.experiment.memo import BehindMemo, Memo, MemoEncoder
from fedsplit.model import module
from fedsplit.model.layers import DOWN, MERGED, UP
from fedsplit.training.site_settings import SiteSettings
from fedsplit.transport.admission import Limits
from fedsplit.transport.codec import Codec, check_range, encode_mask, find_codec
from fedsplit.transport.frames import CHUNK_BYTES, HEADER_BYTES, FrameKind, json_frame
from fedsplit.transport.messages import Hello
from fedsplit.transport.rules import agree
from fedsplit.transport.shapes import (
    ACK,
    LOSSES,
    check_h_dims,
    check_probed_size,
    check_size,
)
from fedsplit.trunk.host import MAX_VERSIONS, BackboneHost

# A real session's id is a random 63-bit number; nearly all of them have as many digits as this one, and the
# handshake's length is then the same in every run.
_SESSION = 1 << 62
# The two halves of a branch beside a frozen layer: what goes in, and what comes out and is added.
_INNER = re.compile(rf"\.(lora_A|{DOWN})\.")
_OUTER = re.compile(rf"\.(lora_B|{MERGED}|{UP})\.")
_LAYER = re.compile(rf"\.(lora_A|lora_B|{MERGED}|{DOWN}|{UP})\..*$")


class NearHost:
    """A backbone host that sites of this process open without a wire. `dial` is a federation `Dial`."""

    def __init__(self, host: BackboneHost, memo: Memo | None = None) -> None:
        self.host = host
        self.memo = memo
        self._effects: OrderedDict[str, Effect] = OrderedDict()

    def publish(self, version: str, packed: bytes) -> None:
        """See core.encoder.EncoderHost; notes what the version does to activations."""
        self.host.publish(version, packed)
        family = self.host.backbone.family
        self._effects[version] = Effect(packed, blocks=f"{family.base}.{family.blocks}")
        self._effects.move_to_end(version)
        while len(self._effects) > MAX_VERSIONS:
            self._effects.popitem(last=False)

    def collect(self, version: str) -> dict[str, dict[str, Array]]:
        """See core.encoder.EncoderHost."""
        return self.host.collect(version)

    def dial(
        self,
        how: Stream,
        config: RunConfig,
        site: SiteSettings,
        *,
        after_step: Callable[[], None] = lambda: None,
    ) -> NearEncoder:
        """Open a round's encoder. Raises RefusedError as the encoder's port would. `after_step`: see NearEncoder."""
        del site  # its TLS settings are for a wire
        return NearEncoder(self, how, find_codec(config.link.codec), after_step)

    def open(self, grant: Grant) -> Encoder:
        """The host's session; what its blocks in front of the module's first one answer is kept, and a frozen one's answers."""
        effect = self._effects.get(grant.version)
        if self.memo is None or effect is None:
            return self.host.open(grant)
        trains = grant.training is not None
        begins = effect.begins(grant.cut, trained=trains)
        if grant.training is not None and grant.training.leave:
            # What leaves early is not to have gone further.
            begins = min(begins, grant.training.leave - 1)
        encoder: Encoder
        if grant.a < begins < grant.b:
            ahead = grant.model_copy(update={"b": begins, "training": None})
            rest = self.host.open(grant.model_copy(update={"a": begins}))
            encoder = BehindMemo(self._kept(self.host.open(ahead), ahead, effect), rest)
        else:
            encoder = self.host.open(grant)
        return encoder if trains else self._kept(encoder, grant, effect)

    def _kept(self, encoder: Encoder, grant: Grant, effect: Effect) -> MemoEncoder:
        assert self.memo is not None
        blocks = grant.a.to_bytes(4) + grant.b.to_bytes(4)
        key = bytes.fromhex(grant.backbone_sha256) + effect.digest(grant.cut) + blocks
        return MemoEncoder(encoder, self.memo, key)


class Effect:
    """What a module version does to activations, as a digest for each cut.

    LoRA whose B is zero and an adapter whose way up is zero do nothing, whatever their other half, and what sits on the
    devices' blocks is not the encoder's: so an encoder that never trains is the same in all rounds, seeds and methods.
    """

    def __init__(self, packed: bytes, *, blocks: str) -> None:
        """`blocks`: what the names of the blocks' tensors begin with, before the block's number."""
        spec, tensors = module.unpack(packed)
        self._spec = repr(spec).encode()
        self._block = re.compile(rf"^{re.escape(blocks)}\.(\d+)\.")
        self._names = tuple(tensors)
        layers: dict[str, list[str]] = {}
        for name in tensors:
            layers.setdefault(_LAYER.sub("", name), []).append(name)
        self._active = {
            name: _digest(
                name.encode(), repr(tensors[name].shape).encode(), tensors[name].tobytes()
            )
            for names in layers.values()
            if not all(_closes(n, tensors[n]) for n in names if not _INNER.search(n))
            for name in names
        }

    def begins(self, cut: Cut, *, trained: bool) -> int:
        """The first block of the cut that the version changes, or that has something to train; b for none."""
        found = (self._block.match(n) for n in (self._names if trained else self._active))
        return min(
            (n for n in (int(m[1]) for m in found if m) if cut.a <= n < cut.b), default=cut.b
        )

    def digest(self, cut: Cut) -> bytes:
        """Alike for two versions that do the same to what goes through blocks[a:b]."""
        within = sorted(n for n in self._active if self._is_within(n, cut))
        return _digest(*([self._spec] if within else []), *(self._active[n] for n in within))

    def _is_within(self, name: str, cut: Cut) -> bool:
        found = self._block.match(name)
        return found is None or cut.a <= int(found[1]) < cut.b


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return digest.digest()


def _closes(name: str, tensor: Array) -> bool:
    """Does the tensor end its layer's branch, and is it zero?"""
    return bool(_OUTER.search(name)) and not np.any(tensor)


class NearEncoder(Closing):
    """One session: a core.encoder.Encoder that counts what the stream would have moved. Use it in a `with`."""

    def __init__(
        self, near: NearHost, how: Stream, codec: Codec, after_step: Callable[[], None]
    ) -> None:
        """`after_step` is called when a gradient has arrived: other sites may have their turn."""
        grant = how.grant
        hello = Hello.of(grant, codec.name)
        self.welcome = agree(hello, grant, near.host.capabilities(), Limits(), _SESSION)
        self._inner = near.open(grant)
        self._codec, self._after_step = codec, after_step
        self._lock = threading.Lock()
        self._closed = False
        self.payload_up = self.payload_down = self.steps = 0
        self.bytes_up = len(json_frame(FrameKind.HELLO, hello.model_dump_json()))
        self.bytes_down = len(json_frame(FrameKind.WELCOME, self.welcome.model_dump_json()))
        self.wait_s = 0.0

    @property
    def trains(self) -> bool:
        """See core.encoder.Encoder."""
        return self._inner.trains

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, want: Want = "output"
    ) -> Array:
        """See core.encoder.Encoder."""
        kind = FrameKind.PROBE if want == "probes" else FrameKind.ENCODE
        if kind is FrameKind.PROBE:
            check_probed_size(h_BTD.shape, self.welcome, self._codec)
        what = f"{kind.name} step {step}"
        with self._timed():
            h = self._arrive(step, h_BTD, mask_BT, what)
            return self._answer(self._inner.encode(step, h, mask_BT, want=want), what)

    def settle(self, step: int, answer: Array, *, quiet: bool = False) -> Array | None:
        """See core.encoder.Encoder."""
        if self.welcome.probes:  # all that a zeroth-order session takes
            self._settle_losses(step, answer)
            return None
        what = f"BACKPROP step {step}"
        with self._timed():
            dh = self._inner.settle(step, self._up(self._codec, answer, what), quiet=quiet)
            if dh is None:
                self._count(down=len(ACK.data))
            else:
                dh = self._answer(dh, what)
        self._after_step()
        return dh

    def _settle_losses(self, step: int, losses_K: Array) -> None:
        losses = np.asarray(losses_K, dtype=np.float32)
        with self._timed():
            self._inner.settle(step, self._up(LOSSES, losses, f"the losses of step {step}"))
            self._count(down=len(ACK.data))

    def close(self) -> None:
        """End the session. Twice is harmless."""
        self._closed = True
        self._inner.close()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        if self._closed:
            raise UnreachableError("the stream is closed: make a new one")
        started = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self.wait_s += time.monotonic() - started

    def _arrive(self, step: int, h_BTD: Array, mask_BT: Mask | None, what: str) -> Array:
        """Activations as the encoder gets them, a step counted."""
        check_h_dims(h_BTD.shape, self.welcome)
        if self.steps >= self.welcome.max_steps:
            raise RefusedError(
                f"step {step}: the token allows {self.welcome.max_steps} steps; the run's grant is too small"
            )
        h = self._up(self._codec, h_BTD, what)
        if mask_BT is not None:
            self._count(up=len(encode_mask(mask_BT).data))
        with self._lock:
            self.steps += 1
        return h

    def _up(self, codec: Codec, array: Array, what: str) -> Array:
        arrived, size = self._through(codec, array, what)
        self._count(up=size)
        return arrived

    def _answer(self, array: Array, what: str) -> Array:
        arrived, size = self._through(self._codec, array, f"the encoder's answer to {what}")
        self._count(down=size)
        return arrived

    def _through(self, codec: Codec, array: Array, what: str) -> tuple[Array, int]:
        """(the array as it arrives, its payload bytes): what encoding and decoding make of it."""
        body = codec.encode(array)
        check_size(len(body.data), self.welcome.max_message_bytes)
        arrived = np.frombuffer(bytearray(body.data), dtype=np.uint8)
        decoded = codec.decode(array.shape, arrived)
        check_range(decoded, what)
        return decoded, len(body.data)

    def _count(self, *, up: int = 0, down: int = 0) -> None:
        with self._lock:
            self.payload_up += up
            self.payload_down += down
            self.bytes_up += _framed(up)
            self.bytes_down += _framed(down)


def _framed(payload: int) -> int:
    """Bytes of a message's frames."""
    return payload + HEADER_BYTES * -(-payload // CHUNK_BYTES)

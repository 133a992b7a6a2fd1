"""The encoder without a wire, for the runs of a grid: same values, same bytes counted, and work shared between runs.

A session here rounds tensors as the codec would and counts the frames that the stream would have moved, but calls the
host in this process. What a frozen encoder answered for a sample is kept (`Memo`), across batches, rounds, seeds and
runs: same activation, same cut, same server tensors, same answer. Called by bench.py, through federation's `Dial`.
Times of such a run say nothing of a deployment; bytes and accuracies do.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import numpy as np

import fedsplit
from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Array, Mask
from fedsplit.core.errors import RefusedError, UnreachableError
from fedsplit.federation.messages import Stream
from fedsplit.model import module
from fedsplit.model.layers import DOWN, MERGED, UP
from fedsplit.serving.host import MAX_VERSIONS, BackboneHost
from fedsplit.training.site_data import SiteSettings
from fedsplit.transport.admission import Limits
from fedsplit.transport.codec import Codec, check_finite, encode_mask, find_codec
from fedsplit.transport.frames import CHUNK_BYTES, HEADER_BYTES, VERSION, Kind, json_frame
from fedsplit.transport.messages import Hello
from fedsplit.transport.rules import agree
from fedsplit.transport.shapes import (
    ACK,
    LOSSES,
    check_h_dims,
    check_probed_size,
    check_size,
    z_dims,
)

MEMO_BYTES = 1 << 30
# A real session's id is a random 63-bit number; nearly all of them have as many digits as this one, and the
# handshake's length is then the same in every run.
_SESSION = 1 << 62
# The two halves of a branch beside a frozen layer: what goes in, and what comes out and is added.
_INNER = re.compile(rf"\.(lora_A|{DOWN})\.")
_OUTER = re.compile(rf"\.(lora_B|{MERGED}|{UP})\.")
_LAYER = re.compile(rf"\.(lora_A|lora_B|{MERGED}|{DOWN}|{UP})\..*$")


class Memo:
    """Answers of frozen encoders, a sample each, up to `max_bytes`; the one unused longest goes first. Thread-safe."""

    def __init__(self, max_bytes: int = MEMO_BYTES) -> None:
        self._room = max_bytes
        self._kept: OrderedDict[bytes, Array] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    def find(self, keys: list[bytes]) -> list[Array | None]:
        """What is known, in the keys' order."""
        with self._lock:
            found = [self._kept.get(key) for key in keys]
            for key, value in zip(keys, found, strict=True):
                if value is not None:
                    self._kept.move_to_end(key)
            self.hits += sum(value is not None for value in found)
            self.misses += sum(value is None for value in found)
        return found

    def keep(self, key: bytes, value: Array) -> None:
        """Remember one sample's answer."""
        with self._lock:
            if key in self._kept or value.nbytes > self._room:
                while key not in self._kept and self._kept and value.nbytes > self._room:
                    self._room += self._kept.popitem(last=False)[1].nbytes
                if key in self._kept or value.nbytes > self._room:
                    return
            self._kept[key] = value
            self._room -= value.nbytes


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

    def dial(self, how: Stream, config: RunConfig, site: SiteSettings) -> NearEncoder:
        """Open a round's encoder. Raises RefusedError as the encoder's port would."""
        del site  # its TLS settings are for a wire
        return NearEncoder(self, how, find_codec(config.codec))

    def memo_for(self, how: Stream) -> tuple[Memo, bytes] | None:
        """(memo, what all keys of the session begin with), where the session only ever runs frozen blocks."""
        effect = self._effects.get(how.grant.version)
        if self.memo is None or effect is None or how.grant.training is not None:
            return None
        backbone = bytes.fromhex(how.grant.backbone_sha256)
        return self.memo, backbone + effect.digest(how.grant.cut) + how.grant.a.to_bytes(
            4
        ) + how.grant.b.to_bytes(4)


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


class NearEncoder:
    """One session: a core.encoder.Encoder that counts what the stream would have moved. Use it in a `with`."""

    def __init__(self, near: NearHost, how: Stream, codec: Codec) -> None:
        grant = how.grant
        hello = Hello(
            protocol=VERSION,
            fedsplit_version=fedsplit.__version__,
            backbone_sha256=grant.backbone_sha256,
            a=grant.a,
            b=grant.b,
            version=grant.version,
            codec=codec.name,
        )
        self.welcome = agree(hello, grant, near.host.capabilities(), Limits(), _SESSION)
        self._inner = near.host.open(grant)
        self._memo = near.memo_for(how)
        self._codec = codec
        self._lock = threading.Lock()
        self._closed = False
        self.payload_up = self.payload_down = self.steps = 0
        self.bytes_up = len(json_frame(Kind.HELLO, hello.model_dump_json()))
        self.bytes_down = len(json_frame(Kind.WELCOME, self.welcome.model_dump_json()))
        self.wait_s = 0.0

    def __enter__(self) -> NearEncoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def trains(self) -> bool:
        """See core.encoder.Encoder."""
        return self._inner.trains

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, keep: bool = False
    ) -> Array:
        """See core.encoder.Encoder."""
        with self._timed():
            h = self._arrive(step, h_BTD, mask_BT, f"ENCODE step {step}")
            if keep or self._memo is None:
                z = self._inner.encode(step, h, mask_BT, keep=keep)
            else:
                z = self._remembered(step, h, mask_BT)
            return self._answer(z, f"ENCODE step {step}")

    def probe(self, step: int, h_BTD: Array, mask_BT: Mask | None = None) -> Array:
        """See core.encoder.Encoder."""
        check_probed_size(h_BTD.shape, self.welcome, self._codec)
        with self._timed():
            h = self._arrive(step, h_BTD, mask_BT, f"PROBE step {step}")
            return self._answer(self._inner.probe(step, h, mask_BT), f"PROBE step {step}")

    def backprop(self, step: int, dz: Array) -> Array:
        """See core.encoder.Encoder."""
        with self._timed():
            dh = self._inner.backprop(step, self._up(self._codec, dz, f"BACKPROP step {step}"))
            return self._answer(dh, f"BACKPROP step {step}")

    def learn(self, step: int, dz: Array) -> None:
        """See core.encoder.Encoder."""
        with self._timed():
            self._inner.learn(step, self._up(self._codec, dz, f"BACKPROP step {step}"))
            self._count(down=len(ACK.data))

    def score(self, step: int, losses_K: Array) -> None:
        """See core.encoder.Encoder."""
        losses = np.asarray(losses_K, dtype=np.float32)
        with self._timed():
            self._inner.score(step, self._up(LOSSES, losses, f"the losses of step {step}"))
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
        check_finite(decoded, what)
        return decoded, len(body.data)

    def _count(self, *, up: int = 0, down: int = 0) -> None:
        with self._lock:
            self.payload_up += up
            self.payload_down += down
            self.bytes_up += _framed(up)
            self.bytes_down += _framed(down)

    def _remembered(self, step: int, h_BTD: Array, mask_BT: Mask | None) -> Array:
        """Run the samples that are new, and take the others from the memo."""
        assert self._memo is not None
        memo, prefix = self._memo
        keys = _keys(prefix, h_BTD, mask_BT)
        found = memo.find(keys)
        new = [i for i, value in enumerate(found) if value is None]
        if new:
            mask = None if mask_BT is None else mask_BT[new]
            z = self._inner.encode(step, h_BTD[new], mask, keep=False)
            for at, row in zip(new, z, strict=True):
                # A copy: a row of the batch would keep the whole batch in memory.
                found[at] = row = row.copy()
                memo.keep(keys[at], row)
        out = np.stack([row for row in found if row is not None])
        assert out.shape == z_dims(h_BTD.shape, self.welcome)
        return out


def _keys(prefix: bytes, h_BTD: Array, mask_BT: Mask | None) -> list[bytes]:
    start = hashlib.blake2b(prefix, digest_size=16)
    start.update(repr(h_BTD.shape[1:]).encode())
    keys = []
    for i, row in enumerate(np.ascontiguousarray(h_BTD)):
        digest = start.copy()
        digest.update(row.data)
        # All-true and no mask are the same to the blocks.
        if mask_BT is not None and not mask_BT[i].all():
            digest.update(np.packbits(mask_BT[i]).tobytes())
        keys.append(digest.digest())
    return keys


def _framed(payload: int) -> int:
    """Bytes of a message's frames."""
    return payload + HEADER_BYTES * -(-payload // CHUNK_BYTES)

"""The module as bytes for the encoder host: a round trip, and everything malformed refused in little memory."""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsplit.core.errors import ProtocolError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec
from fedsplit.trunk.host import BackboneHost
from tests.model.kinds import CLASSES, LORA, SPECS, away_from_zero


def test_pack_round_trip(vit: Backbone) -> None:
    for spec in (*SPECS.values(), ModuleSpec(classes=CLASSES, rank=1, targets=("fc1", "q_proj"))):
        tensors = away_from_zero(vit, spec)
        got, values = module.unpack(module.pack(spec, tensors))
        # Classes are no business of the encoder's.
        assert got == replace(spec, classes=("?",))
        assert values.keys() == tensors.keys()
        assert all(np.array_equal(values[n], tensors[n]) for n in tensors)


GOOD = {
    "kind": "lora",
    "rank": 2,
    "max_rank": 2,
    "alpha": 4,
    "targets": [],
    "merged": False,
    "prompt_tokens": 8,
    "deep_prompt": False,
    "adapter_width": 16,
    "last_blocks": 0,
}


def raw(about: object, tensors: dict[str, tuple[str, list[int], bytes]] | None = None) -> bytes:
    """safetensors bytes by hand."""
    header: dict[str, object] = {
        "__metadata__": {"fedsplit": about if isinstance(about, str) else json.dumps(about)}
    }
    body = b""
    for name, (dtype, shape, data) in (tensors or {}).items():
        ends = [len(body), len(body) + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": ends}
        body += data
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def test_bytes_by_hand_are_read() -> None:
    spec, tensors = module.unpack(raw(GOOD, {"w": ("F32", [2], struct.pack("<2f", 1, 2))}))
    assert (spec.rank, spec.alpha) == (2, 4)
    assert tensors["w"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "about",
    [
        *({k: v for k, v in GOOD.items() if k != lost} for lost in GOOD),
        *(GOOD | {"rank": bad} for bad in (0, -1, 1025, 10**400, 2.0, "2", None, True)),
        *(GOOD | {"alpha": bad} for bad in (0, -1, 10**400, 4.0, "4", None, True)),
        *(GOOD | {"targets": bad} for bad in ("abc", None, [1], {"a": 1})),
        *(GOOD | {"max_rank": bad} for bad in (1, 0, 1025, 2.0, "2", None, True)),
        *(GOOD | {"kind": bad} for bad in ("lora ", "Lora", "", None, 1, ["lora"], {"lora": 1})),
        *(GOOD | {"merged": bad} for bad in (1, 0, None, "true")),
        *(GOOD | {"prompt_tokens": bad} for bad in (0, -1, 1025, 8.0, "8", None, True)),
        *(GOOD | {"deep_prompt": bad} for bad in (0, 1, "true", None)),
        *(GOOD | {"adapter_width": bad} for bad in (0, -1, 65_537, 1.5, "1", None, True)),
        *(GOOD | {"last_blocks": bad} for bad in (-1, 10_001, 0.0, "0", None, False)),
        GOOD | {"lora": True},
        *([], 3, None, "", "{", "[" * 100_000, '{"rank": ' + "9" * 5000 + "}"),
    ],
    ids=lambda about: str(about)[:40],
)
def test_bad_metadata_is_refused(about: object) -> None:
    with pytest.raises(ProtocolError, match="could not be read") as caught:
        module.unpack(raw(about))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64", "I32", "I64", "U8", "BOOL", "F8_E4M3"])
def test_other_dtypes_are_refused(dtype: str) -> None:
    size = {"F16": 2, "BF16": 2, "F64": 8, "I32": 4, "I64": 8}.get(dtype, 1)
    with pytest.raises(ProtocolError):
        module.unpack(raw(GOOD, {"w": (dtype, [2], b"\0" * 2 * size)}))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    with pytest.raises(ProtocolError, match="'w' is not finite float32"):
        module.unpack(raw(GOOD, {"w": ("F32", [2], struct.pack("<2f", 0, value))}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 8,
        b"\xff" * 8 + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        raw(GOOD) + b"trailing",
        raw(GOOD, {"w": ("F32", [2**62], b"")}),
        raw(GOOD, {"w": ("F32", [0, 2**62, 4], b"")}),
        raw(GOOD, {"w": ("F32", [3], b"\0" * 8)}),
        raw(GOOD, {"w": ("F32", [-2], b"\0" * 8)}),
        raw(GOOD, {"w": ("F32", [1] * 99, b"\0" * 4)}),
    ],
    ids=range(12),
)
def test_malformed_bytes_are_refused_in_little_memory(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            module.unpack(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_raise_protocol_errors_alone(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        module.unpack(data)


PACKED = raw(GOOD, {"a.lora_A.weight": ("F32", [2, 2], b"\0" * 16), "b": ("F32", [1], b"\1" * 4)})


@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.integers(0, len(PACKED) - 1), st.integers(0, 255)), max_size=4),
    st.integers(0, len(PACKED)) | st.just(len(PACKED)),
)
def test_damaged_bytes_raise_protocol_errors_alone(
    changes: list[tuple[int, int]], length: int
) -> None:
    data = bytearray(PACKED)
    for at, value in changes:
        data[at] = value
    with contextlib.suppress(ProtocolError):
        spec, tensors = module.unpack(bytes(data[:length]))
        assert spec.kind in module.KINDS
        assert 0 < spec.rank <= spec.max_rank <= 1024
        assert sum(t.nbytes for t in tensors.values()) <= len(PACKED)


def test_a_host_refuses_a_module_of_another_rank(vit: Backbone) -> None:
    host = BackboneHost(vit)
    names = module.server_names(vit, LORA)
    tensors = {n: t for n, t in away_from_zero(vit, LORA).items() if n in names}
    told = ModuleSpec(classes=CLASSES, rank=4, alpha=6)
    with pytest.raises(ProtocolError, match=r"'v'.*is wanted, got"):
        host.publish("v", module.pack(told, tensors))
    odd = ModuleSpec(classes=CLASSES, rank=3, alpha=6, targets=("bogus",))
    with pytest.raises(ProtocolError, match="bogus"):
        host.publish("v", module.pack(odd, tensors))
    assert host.capabilities().versions == ()

"""What travels in Flower messages: read as it was written, refused in words when it is anything else."""

from __future__ import annotations

import contextlib
import io
import json
import tracemalloc
import zipfile
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsplit.core.errors import DataError, FederationError
from fedsplit.core.orders import Answer, Fault, LocalOnly, Order, RollCall, Stream, travelling_bytes
from fedsplit.federation import messages
from tests.core.test_records import GRANT, METRICS

ORDER: dict[str, Any] = {
    "kind": "train", "run": "r", "round": 1, "fedsplit_version": "0.1.0",
    "config": {"rounds": 3, "learning-rate": 0.5, "encoder-insecure": True, "cut": "1,3"},
    "classes": ["a", "b"], "cut": "1,3", "rank": 8, "backbone_sha256": "0" * 64,
    "stream": {"address": "h:1", "token": "t", "grant": GRANT, "tls": True, "ca_file": ""},
}  # fmt: skip
CALL: dict[str, Any] = {
    "site": "press-3", "cut": "", "classes": ["a"], "samples": 8, "test_samples": 2,
    "backbone_sha256": "0" * 64, "fedsplit_version": "0.1.0", "number": -1,
}  # fmt: skip
ALONE = {
    "site": "a", "own": {"sums": {"correct": 1}, "samples": 2},
    "everywhere": {"sums": {"correct": 3}, "samples": 4},
}  # fmt: skip
PARTS = [(Order, ORDER), (RollCall, CALL), (Answer, {"metrics": METRICS}), (LocalOnly, ALONE)]
PARTS += [(Fault, {"kind": "DataError", "message": "why"}), (Stream, ORDER["stream"])]


def carrying(text: object, name: str = "part") -> RecordDict:
    return RecordDict({name: ConfigRecord({"json": text})})  # type: ignore[dict-item]


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower fills a message's sender from the task that this process belongs to."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def message() -> Message:
    return Message(RecordDict(), 7, "train", group_id="1")


# Structured parts.


@pytest.mark.parametrize(("model", "values"), PARTS)
def test_round_trip(model: Any, values: dict[str, Any]) -> None:
    part = model.model_validate(values)
    assert messages.read(messages.write("part", part), "part", model) == part


def test_settings_keep_their_types() -> None:
    order = Order.model_validate(ORDER)
    again = messages.read(messages.write("order", order), "order", Order)
    assert {k: type(v) for k, v in again.config.items()} == {
        "rounds": int, "learning-rate": float, "encoder-insecure": bool, "cut": str,
    }  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"part": ConfigRecord()}),
        RecordDict({"part": ConfigRecord({"json": b"{}"})}),
        RecordDict({"part": ConfigRecord({"json": 3})}),
        RecordDict({"other": ConfigRecord({"json": "{}"})}),
        RecordDict({"part": ArrayRecord([np.zeros(1)])}),
        carrying(" " * (messages.MAX_JSON_CHARS + 1)),
    ],
    ids=range(7),
)
def test_a_part_that_is_not_there(content: RecordDict) -> None:
    with pytest.raises(FederationError, match=r"no readable 'part' part; do both ends run fedsp"):
        messages.read(content, "part", Fault)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '"x"', "{}", "[" * 100000, '{"kind": "x"}', '{"kind": 3, "message": "m"}', '{"kind": "x", "message": "m", "more": 1}', "�"],
)  # fmt: skip
def test_malformed_parts_are_refused(text: str) -> None:
    with pytest.raises(FederationError, match=r"'part' part .*same fedsplit version") as caught:
        messages.read(carrying(text), "part", Fault)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("model_and_values", PARTS, ids=lambda p: p[0].__name__)
def test_every_field_is_needed_and_no_other_is_taken(model_and_values: Any) -> None:
    model, values = model_and_values
    for lost in values:
        text = json.dumps({k: v for k, v in values.items() if k != lost})
        with pytest.raises(FederationError, match=rf"malformed at {lost}: Field required"):
            messages.read(carrying(text), "part", model)
    with pytest.raises(FederationError, match="malformed at more: Extra inputs"):
        messages.read(carrying(json.dumps(values | {"more": 1})), "part", model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("samples", 0),
        ("samples", -1),
        ("samples", 10**30),
        ("test_samples", -1),
        ("site", ""),
        ("site", "x" * 129),
        ("samples", float("nan")),
    ],
)
def test_a_roll_call_of_impossible_numbers(key: str, value: object) -> None:
    with pytest.raises(FederationError, match=f"malformed at {key}"):
        messages.read(carrying(json.dumps(CALL | {key: value})), "part", RollCall)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(PARTS), st.data())
def test_fuzzed_parts_raise_federation_errors_alone(part: Any, data: st.DataObject) -> None:
    model, values = part
    changes = data.draw(
        st.dictionaries(
            st.sampled_from(sorted(values)) | st.text(max_size=5), json_values, max_size=3
        )
    )
    text = json.dumps(values | changes)
    cut = data.draw(st.just(len(text)) | st.integers(0, len(text)))
    with contextlib.suppress(FederationError):
        messages.read(carrying(text[:cut]), "part", model)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.text(max_size=60))
def test_any_text_raises_federation_errors_alone(text: str) -> None:
    with contextlib.suppress(FederationError):
        messages.read(carrying(text), "part", Order)


# Faults.


def test_a_site_says_why_it_could_not() -> None:
    reply = messages.fault_reply(DataError("site 'a': no.csv: does not exist"), message(), site="a")
    fault = messages.fault_of(reply)
    assert fault == Fault(kind="DataError", message="site 'a': no.csv: does not exist", site="a")
    long = messages.fault_of(
        messages.fault_reply(DataError("x" * 10**6), message(), site="s" * 999)
    )
    assert long is not None
    assert (len(long.message), len(long.site)) == (4000, 128)


def test_a_good_reply_is_no_fault() -> None:
    answer = messages.write(messages.ANSWER, Answer.model_validate({"metrics": METRICS}))
    assert messages.fault_of(Message(answer, reply_to=message())) is None


def test_a_crash_gives_its_last_line() -> None:
    reason = "Traceback:\n  File ...\nZeroDivisionError: division by zero\n"
    reply = Message(Error(code=2, reason=reason), reply_to=message())
    fault = messages.fault_of(reply)
    assert fault == Fault(kind="SiteCrashed", message="ZeroDivisionError: division by zero")
    for empty in (None, "", " \n "):
        fault = messages.fault_of(Message(Error(code=2, reason=empty), reply_to=message()))
        assert fault is not None
        assert fault.message == "Flower error 2"


def test_a_fault_that_is_malformed_still_is_one() -> None:
    fault = messages.fault_of(Message(carrying("{", messages.FAULT), reply_to=message()))
    assert fault is not None
    assert fault.kind == "FederationError"
    assert "malformed" in fault.message


# Names and words of others.


@pytest.mark.parametrize("site", ["a\x1b[2J", "a\nb", "\u202egpj.exe", "a\u2028b", "a\x00"])
def test_a_site_whose_name_cannot_be_shown_is_refused(site: str) -> None:
    with pytest.raises(FederationError, match=r"cannot be shown; rename it") as caught:
        messages.read(carrying(json.dumps(CALL | {"site": site})), "part", RollCall)
    assert str(caught.value).isprintable()


def test_names_in_any_script_are_names() -> None:
    call = CALL | {"site": "検査ライン 1", "classes": ["傷", "Ölfleck", "हिन्दी"]}
    assert messages.read(carrying(json.dumps(call)), "part", RollCall).site == "検査ライン 1"


@pytest.mark.parametrize(
    "classes", [["x" * 201], ["a\x1b[1m"], [str(i) for i in range(4097)]], ids=range(3)
)
def test_class_names_are_bounded(classes: list[str]) -> None:
    with pytest.raises(FederationError, match="malformed at classes"):
        messages.read(carrying(json.dumps(CALL | {"classes": classes})), "part", RollCall)


def test_words_of_others_are_short_and_printable() -> None:
    """Escape sequences and texts of 900 KB came through to logs, terminals and every checkpoint."""
    foreign = "\x1b[31m" + "x" * 900_000
    fault = messages.fault_of(
        Message(
            carrying(
                json.dumps({"kind": "DataError", "message": foreign, "site": foreign}),
                messages.FAULT,
            ),
            reply_to=message(),
        )
    )
    crash = messages.fault_of(
        Message(Error(code=2, reason="Traceback\n" + foreign), reply_to=message())
    )
    with pytest.raises(FederationError) as extra:
        messages.read(carrying(json.dumps({foreign: 1})), "part", Fault)
    assert fault is not None
    assert crash is not None
    for text in (fault.message, fault.site, crash.message, str(extra.value)):
        assert text.isprintable()
        assert len(text) <= 4000
    for part in ({"cut": foreign}, {"codec": foreign}, {"site": foreign}):
        with pytest.raises(FederationError, match="malformed at metrics"):
            messages.read(carrying(json.dumps({"metrics": METRICS | part})), "part", Answer)


# Arrays.


def test_arrays_round_trip() -> None:
    tensors = {
        "b": np.arange(6, dtype="f4").reshape(2, 3).T,
        "a": np.zeros((0, 3), dtype="f4"),
        "scalar": np.float32(3).reshape(()),
    }
    record = messages.to_arrays(tensors)
    assert list(record) == sorted(tensors)
    content = RecordDict({"delta": record})
    shapes = {name: np.shape(value) for name, value in tensors.items()}
    got = messages.from_arrays(content, "delta", shapes)
    assert all(np.array_equal(got[n], tensors[n]) for n in tensors)
    assert all(got[n].shape == tensors[n].shape for n in tensors)
    assert messages.from_arrays(content, "module", shapes) == {}
    assert messages.array_bytes(content) == sum(len(a.data) for a in record.values())
    assert messages.array_bytes(RecordDict()) == 0


def test_many_tensors_travel_as_one_array() -> None:
    tensors = {
        "b": np.arange(6, dtype="f4").reshape(2, 3).T,
        "a": np.zeros((0, 3), dtype="f4"),
        "scalar": np.float32(3).reshape(()),
    }
    shapes = {name: np.shape(value) for name, value in tensors.items()}
    for part in ({}, {"b": tensors["b"]}, tensors):
        record = messages.packed(part)
        assert len(record) == min(1, len(part))
        content = RecordDict({"delta": record})
        got = messages.from_arrays(content, "delta", shapes)
        assert got.keys() == part.keys()
        assert all(np.array_equal(got[n], part[n]) for n in part)
        assert all(got[n].shape == shapes[n] for n in part)
        assert messages.array_bytes(content) == travelling_bytes({"delta": part})
    # As numpy would write them joined.
    joined = np.concatenate([tensors[n].reshape(-1) for n in sorted(tensors)])
    assert next(iter(record.values())).data == Array(joined).data


@pytest.mark.parametrize(
    ("key", "size", "reason"),
    [
        ("a\nb", 5, r"has shape \(5,\), \(4,\) is wanted"),
        ("a\na", 4, "name 1 twice"),
        ("a\nc", 4, "1 that nobody asked for, e.g. c"),
        ("a\n", 2, "1 that nobody asked for"),
        ("\n" * 100_000, 0, "1 that nobody asked for"),
    ],
)  # fmt: skip
def test_names_that_do_not_fit_what_was_joined(key: str, size: int, reason: str) -> None:
    content = RecordDict({"delta": ArrayRecord({key: Array(np.zeros(size, "f4"))})})
    with pytest.raises(FederationError, match=reason):
        messages.from_arrays(content, "delta", {"a": (2,), "b": (1, 2)})


@given(st.text("ab\n", max_size=12), st.integers(0, 6))
def test_any_joined_names_give_tensors_or_a_federation_error(key: str, size: int) -> None:
    wanted = {"a": (2,), "b": (1, 2), "ab": (), "": (1,)}
    content = RecordDict({"delta": ArrayRecord({key: Array(np.zeros(size, "f4"))})})
    with contextlib.suppress(FederationError):
        for name, found in messages.from_arrays(content, "delta", wanted).items():
            assert found.shape == wanted[name]


def npy(descr: str, shape: str, body: bytes, version: bytes = b"\x01\x00") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    size = len(header).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + size + header + body


def archive() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, w=np.zeros(1_000_000, dtype="f4"))
    return file.getvalue()


def broken_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as writer:
        writer.writestr("w.npy", b"x")
    return file.getvalue()[:-10]


def read_delta(array: Array, shape: tuple[int, ...] = (2,)) -> Any:
    content = RecordDict({"delta": ArrayRecord({"w": array})})
    return messages.from_arrays(content, "delta", {"w": shape})


BAD_ARRAYS = {
    "nothing": b"",
    "no magic": b"x" * 100,
    "pickle": b"\x80\x04N.",
    "objects": npy("'|O'", "(1,)", b"\x80\x04N."),
    "short": npy("'<f4'", "(3,)", b"\0" * 8),
    "long": npy("'<f4'", "(1,)", b"\0" * 8),
    "huge": npy("'<f4'", "(10000000000,)", b"\0" * 8),
    "overflowing": npy("'<f4'", "(4611686018427387904, 4)", b""),
    "empty and overflowing": npy("'<f4'", "(0, 999999999999, 999999999999)", b""),
    "many dimensions": npy("'<f4'", "(" + "1, " * 99 + ")", b"\0" * 4),
    "no such size": npy("'<f1'", "(4,)", b"\0" * 4),
    "negative": npy("'<f4'", "(-1, -2)", b"\0" * 8),
    "version 2 huge": npy("'<f4'", "(10000000000,)", b"\0" * 8, b"\x02\x00"),
    "version 3": npy("'<f4'", "(2,)", b"\0" * 8, b"\x03\x00"),
    "open bracket": npy("'<f4'", "((2,)", b"\0" * 8),
    "not a literal": npy("__import__('os')", "(2,)", b"\0" * 8),
    "not a type": npy("'<q9'", "(2,)", b"\0" * 8),
    "no header": b"\x93NUMPY\x01\x00\xff\xff{",
    "zip": archive(),
    "broken zip": broken_zip(),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_damaged_arrays_are_refused_in_little_memory(name: str) -> None:
    array = Array("float32", (2,), "numpy.ndarray", BAD_ARRAYS[name])
    content = RecordDict({"delta": ArrayRecord({"w": array})})
    tracemalloc.start()
    try:
        with pytest.raises(FederationError, match=r"'delta' arrays .* cannot be read") as caught:
            messages.from_arrays(content, "delta", {"w": (2,)})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000
    assert len(str(caught.value)) < 500


def test_arrays_of_another_kind() -> None:
    array = Array("float32", (2,), "torch.tensor", b"\0" * 8)
    with pytest.raises(FederationError, match="cannot be read"):
        read_delta(array)


GOOD = np.arange(4, dtype="f4")


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(st.integers(0, 143), st.integers(0, 255)), max_size=3), st.integers(0, 144)
)
def test_fuzzed_arrays_raise_federation_errors_alone(changes: Any, length: int) -> None:
    data = bytearray(Array(GOOD).data)
    assert len(data) == 144
    for at, value in changes:
        data[at] = value
    array = Array("float32", (4,), "numpy.ndarray", bytes(data[: length or 144]))
    with contextlib.suppress(FederationError):
        read_delta(array, (4,))


# Parsers of foreign bytes take time in proportion to what they look at: long runs of one class of character are what
# patterns with two ways to match a text go wrong at. A bound on the work, not on the clock: twice the run may cost some
# more, never a thousand times.
RUNS = st.tuples(
    st.sampled_from(["0", "12", " ", ",", "1, ", "(", ")", "'", "{", "\n", "<f4", "\x1b[", "é"]),
    st.integers(1, 60_000),
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(RUNS, min_size=1, max_size=4), st.sampled_from(["shape", "descr", "all"]))
def test_headers_of_long_runs_are_refused_after_few_bytes(runs: Any, where: str) -> None:
    text = "".join(piece * (times // len(piece) + 1) for piece, times in runs)[:65_000]
    shape = f"({text}" if where == "shape" else "(2,)"
    descr = f"'<f4{text}" if where == "descr" else "'<f4'"
    header = (
        text if where == "all" else f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}"
    )
    data = header.encode()[:65_000]
    array = Array(
        "float32",
        (2,),
        "numpy.ndarray",
        b"\x93NUMPY\x01\x00" + len(data).to_bytes(2, "little") + data,
    )
    with pytest.raises(FederationError, match="cannot be read"):
        read_delta(array)


@pytest.mark.parametrize("digits", [12, 64, 96, 200])
def test_a_header_of_many_digits_is_refused_at_once(digits: int) -> None:
    """It once took a minute at 64: a pattern that could part the digits in every way did."""
    array = Array("float32", (2,), "numpy.ndarray", npy("'<f4'", "(" + "1" * digits + "x)", b""))
    with pytest.raises(FederationError, match="not the bytes of a plain array"):
        read_delta(array)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"w": np.zeros(2, "f4"), "x\x1b[2J": np.zeros(2, "f4")}, r"1 that nobody asked for, e\.g\. x\\x1b\[2J;"),
        ({"w": np.zeros(3, "f4")}, r"w: it has shape \(3,\), \(2,\) is wanted"),
        ({"w": np.zeros((2, 1), "f4")}, r"w: it has shape \(2, 1\), \(2,\) is wanted"),
        ({"w": np.zeros(2)}, "w: it is float64, float32 is wanted"),
        ({"w": np.zeros(2, ">f4")}, "w: it is >f4, float32 is wanted"),
    ],
)  # fmt: skip
def test_what_nobody_asked_for_is_refused_before_a_copy(arrays: Any, reason: str) -> None:
    # Beside what is odd there is much that would be copied first.
    big = np.zeros(1_000_000, "f4")
    record = ArrayRecord({n: Array(a) for n, a in {"a": big, **arrays}.items()})
    tracemalloc.start()
    try:
        with pytest.raises(FederationError, match=reason):
            messages.from_arrays(
                RecordDict({"delta": record}), "delta", {"a": big.shape, "w": (2,)}
            )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 500_000

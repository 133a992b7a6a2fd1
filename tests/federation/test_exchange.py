"""Replies of a node that Flower cannot put together: they cost that node its answer, and no run its end."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.federation.server.exchange import Post


@pytest.fixture(autouse=True, scope="module")
def _in_a_run() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_run_id", "_task_id", "_node_id"):
            patch.setattr(TaskIdentity, name, 1)
        yield


class PushedBytes:
    """A grid whose one reply is made of the bytes of a node, as Flower's own makes it."""

    def __init__(self, contents: dict[str, bytes], top: str) -> None:
        self._contents, self._top = contents, top

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return ["an id" for _ in messages]

    def pull_messages(self, ids: Iterable[str]) -> list[Any]:
        return [inflate_object_from_contents(self._top, dict(self._contents))]


def reply() -> Message:
    """With a structured part and an array, as a round's answer has them."""
    order = Message(RecordDict(), 7, "train")
    order.metadata.__dict__["_message_id"] = "an id"
    record = ArrayRecord({"w": Array(np.ones(3, np.float32))})
    return Message(
        RecordDict({"answer": ConfigRecord({"json": "{}"}), "delta": record}), reply_to=order
    )


def outcome(contents: dict[str, bytes], top: str) -> list[Any]:
    post = Post[str](PushedBytes(contents, top))  # type: ignore[arg-type]
    assert post.send("line-a", Message(RecordDict(), 7, "train"))
    return [sent.whose for sent, _ in post.replies()]


@functools.cache
def parts() -> tuple[dict[str, bytes], str, dict[str, str]]:
    """The bytes of a reply's objects by id, the id of the whole, and the kinds of the objects."""
    message = reply()
    found = get_all_nested_objects(message)
    kinds = {type(part).__name__: name for name, part in found.items()}
    return {name: part.deflate() for name, part in found.items()}, message.object_id, kinds


def test_a_reply_of_good_bytes_arrives() -> None:
    contents, top, _ = parts()
    assert outcome(contents, top) == ["line-a"]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("RecordDict", b"[]"),
        ("RecordDict", b"[" * 100_000),
        ("RecordDict", b'{"answer": "x"}'),
        ("Array", b"{}"),
        ("Array", b'{"arraychunk_ids": [9], "dtype": 1, "shape": 2, "stype": 3}'),
        ("ConfigRecord", b"\xff\xff\xff"),
        ("Message", b"\xff"),
        ("Message", b""),
    ],
)
def test_a_body_that_is_not_what_its_head_says(
    kind: str, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    whole, top, kinds = parts()
    contents = dict(whole)
    head, _, _ = contents[kinds[kind]].partition(b"\0")
    name, children, _ = head.split(b" ")
    contents[kinds[kind]] = b"%s %s %d\0%s" % (name, children, len(body), body)
    assert outcome(contents, top) == []


@given(st.data())
def test_any_bytes_of_a_node(data: st.DataObject) -> None:
    whole, top, kinds = parts()
    contents = dict(whole)
    which = kinds[data.draw(st.sampled_from(sorted(kinds)))]
    old = contents[which]
    at = data.draw(st.integers(0, len(old)))
    new = data.draw(st.binary(max_size=40) | st.sampled_from([b"0" * 50, b" ", b"{" * 50]))
    contents[which] = old[:at] + new + old[at + data.draw(st.integers(0, 40)) :]
    assert outcome(contents, top) in ([], ["line-a"])

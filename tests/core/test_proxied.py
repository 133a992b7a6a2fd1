"""What a proxy says is believed beside its secret alone, whatever else stands in the headers."""

from __future__ import annotations

from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.core.proxied import (
    PROXY_HEADER,
    SERIAL_HEADER,
    SITE_HEADER,
    bare_serial,
    proxied,
    reason_text,
)

SECRET = b"a-secret-that-proxy-and-services-share"
NAMES = st.sampled_from([PROXY_HEADER, SITE_HEADER, SERIAL_HEADER, SITE_HEADER.upper(), "x-other"])
HEADERS = st.lists(st.tuples(NAMES, st.text(max_size=40) | st.just(SECRET.decode())), max_size=6)


@given(HEADERS)
def test_without_the_secret_nothing_is_believed(headers: list[tuple[str, str]]) -> None:
    ours = [name.lower() for name, _ in headers if name.lower() != "x-other"]
    shows = dict(headers).get(PROXY_HEADER) == SECRET.decode()
    try:
        found = proxied(headers, SECRET)
    except ValueError:
        assert not shows or len(set(ours)) < len(ours)
    else:
        assert (found is None) == (not ours)
        assert found is None or (shows and len(set(ours)) == len(ours))


def test_what_is_believed() -> None:
    headers = {PROXY_HEADER: SECRET.decode(), SITE_HEADER: "line-1", SERIAL_HEADER: "00ab:cd"}
    assert proxied(headers.items(), SECRET) == ("line-1", "ABCD")
    assert proxied({PROXY_HEADER: SECRET.decode()}.items(), SECRET) == ("", "")
    assert proxied({"authorization": "Bearer x"}.items(), SECRET) is None
    assert bare_serial("0F") == bare_serial("f") == "F"
    with pytest.raises(ValueError, match="twice"):
        proxied([*headers.items(), (SITE_HEADER.title(), "line-2")], SECRET)


@given(st.text(max_size=400))
def test_a_reason_is_plain_ascii_and_can_be_read_again(text: str) -> None:
    text = text.encode(errors="ignore").decode()
    told = reason_text(text)
    assert told.isascii()
    assert not set(told) & set('"\\\r\n')
    assert unquote(told) == text[:300]

"""One line that lets a site in: it survives mail and slips of the pen are told from cut and foreign text."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.core.errors import ConfigError
from fedsplit.plant.join_code import KIND, VERSION, JoinCode

hexes = st.binary(min_size=32, max_size=32).map(bytes.hex)
ports = st.integers(1, 65535)
hosts = st.from_regex(r"\A[a-z0-9]([a-z0-9.-]{0,60}[a-z0-9])?\Z") | st.ip_addresses(v=6).map(
    lambda a: f"[{a}]"
)
codes = st.builds(
    JoinCode,
    st.tuples(hosts, ports).map(lambda at: f"{at[0]}:{at[1]}"),
    hexes,
    st.binary(min_size=4, max_size=4).map(bytes.hex),
    st.binary(min_size=16, max_size=16).map(bytes.hex),
)
ONE = JoinCode("fl.example.com:443", "ab" * 32, "01020304", "cd" * 16)


@given(codes)
def test_a_code_reads_back(code: JoinCode) -> None:
    text = code.text()
    assert JoinCode.parse(text) == code
    assert re.fullmatch(r"[0-9A-Z]+", text)


def test_it_is_one_line_of_about_128_characters() -> None:
    assert len(ONE.text()) == 124
    assert len(JoinCode.new("192.0.2.7:8443", "ab" * 32).text()) < 124


def folded(text: str) -> str:
    return "> " + "\r\n> ".join(text[i : i + 60] for i in range(0, len(text), 60)) + "\n"


@pytest.mark.parametrize(
    "changed",
    [
        str.lower,
        folded,
        lambda t: f'  "{t}"\n',
        lambda t: "=\n".join(t[i : i + 76] for i in range(0, len(t), 76)),
        lambda t: "-".join(t[i : i + 8] for i in range(0, len(t), 8)),
        lambda t: t.replace("0", "O").replace("1", "l"),
        lambda t: "\u200b".join(t),
        # A Japanese keyboard's full width letters.
        lambda t: "".join(chr(ord(c) + 0xFEE0) for c in t),
    ],
)
def test_it_survives_mail_and_hand(changed: object) -> None:
    assert JoinCode.parse(changed(ONE.text())) == ONE  # type: ignore[operator]


@given(codes, st.data())
def test_one_wrong_character_is_mistyped(code: JoinCode, data: st.DataObject) -> None:
    text = code.text()
    # The last character may hold fewer than five bits.
    at = data.draw(st.integers(4, len(text) - 2))
    other = data.draw(st.sampled_from(sorted(set("0123456789ABCDEFGHJKMNPQRSTVWXYZ") - {text[at]})))
    # The first characters give the length: with another one the code seems cut or grown.
    told = "mistyped" if at > 5 else "mistyped|too short|too long"
    with pytest.raises(ConfigError, match=told):
        JoinCode.parse(text[:at] + other + text[at + 1 :])


@given(codes, st.data())
def test_a_cut_code_is_too_short(code: JoinCode, data: st.DataObject) -> None:
    text = code.text()
    with pytest.raises(ConfigError, match="too short"):
        JoinCode.parse(text[: data.draw(st.integers(4, len(text) - 2))])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("https://example.com/join", "not a join code"),
        ("ssh-ed25519 AAAA", "not a join code"),
        (ONE.text() + "ABC", "too long"),
        (ONE.text() * 2, "too long"),
        (ONE.text().replace(KIND + VERSION, f"{KIND}2"), "version '2'"),
        (ONE.text()[:-9] + "U" + ONE.text()[-8:], "mistyped"),
        ("FSJ1検査", "mistyped"),
        ("FSJ1", "too short"),
    ],
)
def test_what_is_wrong_is_said_and_the_code_is_not(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        JoinCode.parse(text)
    assert ONE.text()[40:60] not in str(caught.value)


@given(st.text(max_size=300) | st.text("0123456789ABCDEFGHJKMNPQRSTVWXYZ").map("FSJ1".__add__))
def test_any_text_is_a_code_or_a_clear_error(text: str) -> None:
    with pytest.raises(ConfigError, match="join code"):
        JoinCode.parse(text)


@pytest.mark.parametrize(
    "address", ["host", "host:0", "host:70000", "a b:1", ":1", "h:1\n", "検:1"]
)
def test_an_address_that_none_dials_makes_no_code(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        JoinCode.new(address, "ab" * 32)


def test_a_log_never_shows_the_secret() -> None:
    assert ONE.secret not in repr(ONE)

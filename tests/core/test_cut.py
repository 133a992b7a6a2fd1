"""The cut: what reads as one, what fits a backbone, and that its three parts are the whole model."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.core.cut import Cut, parse_cuts
from fedsplit.core.errors import ConfigError

cuts = st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda ab: Cut(*sorted(ab)))


def test_parse() -> None:
    assert Cut.parse("2,10") == Cut(2, 10)
    assert Cut.parse(" 0 , 12 ") == Cut(0, 12)
    assert str(Cut(2, 10)) == "2,10"


@given(cuts)
def test_text_round_trip(cut: Cut) -> None:
    assert Cut.parse(str(cut)) == cut


@pytest.mark.parametrize(
    "text", ["", "2", "2,", ",2", "2,10,3", "a,b", "-1,2", "1.0,2", "²,3", "1,٣", "9" * 5000 + ",1"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a cut: two block numbers are wanted") as caught:
        Cut.parse(text)
    assert len(str(caught.value)) < 300


@given(st.text(max_size=40) | st.from_regex(r"[0-9,; ]{0,20}", fullmatch=True))
def test_only_config_errors(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert all(isinstance(cut, Cut) for cut in parse_cuts(text))


@pytest.mark.parametrize(("a", "b"), [(3, 2), (-1, 2), (-2, -1)])
def test_ends_in_order(a: int, b: int) -> None:
    with pytest.raises(ConfigError, match=rf"cut {a},{b} .*0 <= a <= b"):
        Cut(a, b)


def test_several_cuts() -> None:
    assert parse_cuts("0,12;2,10; 12,12 ;") == (Cut(0, 12), Cut(2, 10), Cut(12, 12))
    for nothing in ("", ";", " ; "):
        with pytest.raises(ConfigError, match="is not a cut"):
            parse_cuts(nothing)


def test_a_cut_that_does_not_fit_says_how_many_blocks_there_are() -> None:
    Cut(2, 6).check(6)
    with pytest.raises(ConfigError, match=r"cut 2,7 does not fit .* 6 blocks.* b <= 6"):
        Cut(2, 7).check(6)
    with pytest.raises(ConfigError, match="does not fit"):
        Cut(7, 7).local(6)


@given(cuts, st.integers(0, 10))
def test_device_and_server_share_out_all_blocks(cut: Cut, more: int) -> None:
    blocks = cut.b + more
    device, server = cut.device_blocks(blocks), cut.server_blocks()
    assert sorted(device + server) == list(range(blocks))
    assert not set(device) & set(server)
    assert list(device) == sorted(device)
    assert cut.local(blocks) == (server == ())
    # The server pools where it runs the last block, and only there.
    assert cut.pooled(blocks) == (blocks - 1 in server)


def test_the_dials_ends() -> None:
    thin, local, top = Cut(0, 6), Cut(3, 3), Cut(6, 6)
    assert thin.device_blocks(6) == ()
    assert thin.pooled(6)
    assert not thin.local(6)
    assert local.local(6)
    assert top.local(6)
    assert not top.pooled(6)

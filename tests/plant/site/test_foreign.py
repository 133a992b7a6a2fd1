"""Foreign bytes and odd settings: an answer of anybody is an error in words, a site.toml says what it was given."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from fedsplit.core.errors import NotMemberError, PlantError, ServerAwayError, ServerRefusalError
from fedsplit.plant.site.calls import _read
from fedsplit.plant.site.folder import SiteFile
from fedsplit.plant.site.line_faults import refuse
from fedsplit.plant.site.settings_text import changed, written
from fedsplit.plant.wire import Hello, JoinAnswer, ReportAnswer

NAMES = st.text(st.characters(blacklist_categories=("C", "Z")), min_size=1, max_size=40)  # fmt: skip
TEXTS = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=60)


@given(st.sampled_from([Hello, JoinAnswer, ReportAnswer]), st.binary(max_size=2000))
def test_any_answer_is_read_or_told(model: type[BaseModel], body: bytes) -> None:
    # No body of bytes at random is an answer.
    with pytest.raises(ServerAwayError, match=r"plant\.example:8443") as told:
        _read(body, model, "plant.example:8443")
    assert str(told.value).isprintable()


@given(st.integers(300, 599), st.binary(max_size=2000))
def test_any_refusal_is_told(status: int, body: bytes) -> None:
    with pytest.raises(PlantError) as told:
        refuse(status, body, "plant.example:8443")
    assert str(told.value).isprintable()


@pytest.mark.parametrize(
    ("status", "kind", "error"),
    [
        (403, "revoked", NotMemberError),
        (403, "rotated", NotMemberError),
        (403, "not-member", NotMemberError),
        (403, "certificate-expired", NotMemberError),
        (403, "certificate-foreign", ServerRefusalError),
        (409, "code-used", ServerRefusalError),
        (429, "too-many", ServerAwayError),
        (503, "superlink", ServerAwayError),
    ],
)
def test_kinds_of_refusals(status: int, kind: str, error: type[PlantError]) -> None:
    body = f'{{"error": {{"kind": "{kind}", "message": "because\\u001b[31m"}}}}'.encode()
    with pytest.raises(PlantError, match="because") as told:
        refuse(status, body, "plant.example:8443")
    assert type(told.value) is error
    assert "\x1b" not in str(told.value)


def settings(name: str, data: str) -> SiteFile:
    site = {"name": name, "address": "plant.example:8443", "task": "inspection", "data": data}
    return SiteFile.model_validate({"site": site})


def read(text: str) -> dict[str, Any]:
    found = tomllib.loads(text)
    assert found.pop("format") == 1
    return found


@given(NAMES, TEXTS, NAMES)
def test_site_toml_says_what_it_was_given(name: str, data: str, other: str) -> None:
    wanted = settings(name, data)
    text = written(wanted)
    assert SiteFile.model_validate(read(text)) == wanted
    text += "# a line of the site's own people\n"
    again = changed(text, {"name": other, "backbone-sha256": "ab" * 32})
    expected = wanted.model_dump(by_alias=True)
    expected["site"] |= {"name": other, "backbone-sha256": "ab" * 32}
    assert SiteFile.model_validate(read(again)) == SiteFile.model_validate(expected)
    assert again.endswith("# a line of the site's own people\n")

"""Grants to predict: what the settings allow, and requests of every other kind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsplit import __version__
from fedsplit.core.errors import ConfigError, EnrolmentError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec
from fedsplit.plant import paths
from fedsplit.plant.server import audit
from fedsplit.plant.server.control import create_app
from fedsplit.plant.server.enrolment import BackboneFacts
from fedsplit.plant.server.folder import SETTINGS, FederationFolder
from fedsplit.plant.server.inference import InferenceGrants
from fedsplit.plant.server.registry import Registry, Shown
from fedsplit.plant.wire import GrantAnswer, GrantRequest
from fedsplit.registry.registry import ModuleRegistry
from fedsplit.registry.version import Facts
from fedsplit.transport.tokens import verify_site
from tests.plant.server.conftest import serving
from tests.plant.server.test_control import Flower, NewSite, error_of, join, proxy

MEMBER = Shown("line-a", "line-a", "member")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "module"
    spec = ModuleSpec(classes=("a", "b"), kind="classifier")
    backbone = Backbone.find("vit-glyphs")
    module.export(folder, backbone, spec, module.initial(backbone, spec, seed=0))
    return folder


@pytest.fixture
def wanted(folder: FederationFolder, made: Path) -> GrantRequest:
    """A request for what is registered."""
    version = ModuleRegistry.open(folder.modules, create=True).add(made, Facts(task="inspection"))
    return GrantRequest(
        version=version.digest,
        backbone_sha256=Backbone.find("vit-glyphs").sha256,
        cut="1,5",
        fedsplit_version=__version__,
    )


def with_settings(folder: FederationFolder, more: str) -> FederationFolder:
    file = folder.path / SETTINGS
    file.write_text(file.read_text() + more)
    return FederationFolder.at(folder.path)


def test_a_grant_says_what_the_settings_say(folder: FederationFolder, wanted: GrantRequest) -> None:
    limits = "[inference]\nminutes = 5\nrows = 200\nrows-per-minute = 60\n"
    folder = with_settings(folder, limits)
    answer = InferenceGrants(folder).grant(MEMBER, wanted)
    token = verify_site(answer.token, folder.encoder_secret.read_bytes())
    assert token.grant == answer.grant
    assert answer.seconds == 300
    grant = token.grant
    assert (grant.site, grant.version, str(grant.cut)) == ("line-a", wanted.version, "1,5")
    assert grant.training is None
    assert grant.inference is not None
    assert (grant.inference.max_rows, grant.inference.rows_per_minute) == (200, 60)
    (line,) = audit.read(folder)
    assert (line["what"], line["who"], line["module"]) == ("granted", "line-a", wanted.version)


def test_what_is_not_granted(folder: FederationFolder, wanted: GrantRequest) -> None:
    def refusal(folder: FederationFolder, **changes: str) -> EnrolmentError:
        with pytest.raises(EnrolmentError) as caught:
            InferenceGrants(folder).grant(MEMBER, wanted.model_copy(update=changes))
        return caught.value

    assert refusal(folder, fedsplit_version="0.0.1").kind == "other-version"
    assert refusal(folder, version="cd" * 32).kind == "unknown-module"
    assert refusal(folder, backbone_sha256="cd" * 32).kind == "other-backbone"
    for odd in ("3,3", "5,3", "1,x", "", "1;2"):
        with pytest.raises(ConfigError, match="cut"):
            InferenceGrants(folder).grant(MEMBER, wanted.model_copy(update={"cut": odd}))
    private = with_settings(folder, '[backbone]\nprivate-blocks = "2,4"\n')
    assert "a cut that holds all of them" in str(refusal(private, cut="3,5"))
    assert refusal(private, cut="2,3").kind == "private-blocks"
    assert InferenceGrants(private).grant(MEMBER, wanted).grant.b == 5
    off = with_settings(folder, "[inference]\nenabled = false\n")
    assert refusal(off).kind == "inference-off"
    assert [line["what"] for line in audit.read(folder)] == ["granted"]
    folder.encoder_secret.unlink()
    with pytest.raises(ConfigError, match="secret file"):
        InferenceGrants(folder)


def test_a_site_gets_so_many_grants_an_hour(folder: FederationFolder, wanted: GrantRequest) -> None:
    grants = InferenceGrants(with_settings(folder, "[inference]\ngrants-per-hour = 2\n"))
    for _ in range(2):
        grants.grant(MEMBER, wanted)
    with pytest.raises(EnrolmentError, match="its 2 grants to predict of this hour") as caught:
        grants.grant(MEMBER, wanted)
    assert caught.value.kind == "too-many"
    grants.grant(Shown("line-b", "line-b", "member"), wanted)


@pytest.fixture
def client(folder: FederationFolder) -> Iterator[httpx.Client]:
    backbone = BackboneFacts("vit-glyphs", "ab" * 32)
    with serving(create_app(folder, connect=Flower(), backbone=lambda: backbone)) as found:
        yield found


def test_the_path_takes_members_and_whole_requests(
    folder: FederationFolder, client: httpx.Client, wanted: GrantRequest
) -> None:
    body = wanted.model_dump()
    assert error_of(client.post(paths.GRANT, json=body)) == (403, "not-the-proxy")
    with Registry(folder) as registry:
        code = registry.add_site("line-a", 1)
        headers = proxy(join(client, code, NewSite()).certificate, "line-a")
        answer = client.post(paths.GRANT, json=body, headers=headers)
        assert GrantAnswer.model_validate_json(answer.content).grant.site == "line-a"

        @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.recursive(st.text(max_size=9) | st.integers() | st.none(), lambda inner: st.lists(
            inner, max_size=3) | st.dictionaries(st.sampled_from([*body, "x"]), inner)))  # fmt: skip
        def odd(value: Any) -> None:
            told = client.post(paths.GRANT, json=value, headers=headers)
            assert error_of(told) == (400, "bad-request")

        odd()
        huge = client.post(paths.GRANT, content=b"{" * (1 << 20), headers=headers)
        assert huge.status_code == 413
        (folder.modules / "modules.db").unlink(missing_ok=True)
        shutil.rmtree(folder.modules)
        gone = client.post(paths.GRANT, json=body, headers=headers)
        assert error_of(gone) == (403, "no-registry")
        registry.revoke("line-a")
        assert error_of(client.post(paths.GRANT, json=body, headers=headers)) == (403, "revoked")

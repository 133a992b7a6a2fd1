"""The control service by its paths: joins, renewals, reports, who may in; bad input of every kind."""

from __future__ import annotations

import contextlib
import datetime
import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography import x509
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsplit import __version__
from fedsplit.core.errors import BackboneError, EnrolmentError, FederationError
from fedsplit.core.proxied import PROXY_HEADER, SERIAL_HEADER, SITE_HEADER
from fedsplit.plant import paths, pki
from fedsplit.plant.join_code import JoinCode
from fedsplit.plant.server import audit, control
from fedsplit.plant.server.control import create_app
from fedsplit.plant.server.enrolment import FEW, Allowance, BackboneFacts
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.node_keys import NodeKeys
from fedsplit.plant.server.registry import Registry
from fedsplit.plant.wire import MAX_BODY_BYTES, JoinAnswer, Report
from tests.plant.server.conftest import CA, PROXY_SECRET, serving
from tests.small_disk import small_disk

BACKBONE = BackboneFacts("vit-glyphs", "ab" * 32)


@dataclass
class Node:
    public_key: str
    registered: float = field(default_factory=time.time)
    gone: bool = False


class Flower:
    """A SuperLink's memory of keys: what is gone never comes back."""

    def __init__(self) -> None:
        self.known: dict[str, Node] = {}
        self.down = False

    def __call__(self) -> Any:
        if self.down:
            raise FederationError("the SuperLink does not answer")
        return self

    def __enter__(self) -> Flower:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def register(self, key: str, name: str = "") -> None:
        if self.known.setdefault(key, Node(key)).gone:
            raise EnrolmentError("make new keys", kind="key-used")

    def unregister(self, key: str) -> bool:
        self.known.setdefault(key, Node(key)).gone = True
        return True

    def nodes(self) -> list[Node]:
        return list(self.known.values())

    @property
    def alive(self) -> set[str]:
        return {n.public_key for n in self.known.values() if not n.gone}


@pytest.fixture
def flower() -> Flower:
    return Flower()


@pytest.fixture
def registry(folder: FederationFolder) -> Iterator[Registry]:
    with Registry(folder) as found:
        yield found


@pytest.fixture
def client(folder: FederationFolder, flower: Flower, registry: Registry) -> Iterator[httpx.Client]:
    app = create_app(folder, connect=flower, backbone=lambda: BACKBONE)
    with serving(app) as found:
        yield found


class NewSite:
    """What a site makes for itself."""

    def __init__(self) -> None:
        self.key = pki.new_key()
        self.node_key = pki.new_node_key()[1]

    def request(self, code: JoinCode, **changes: Any) -> dict[str, Any]:
        made = {
            "code_id": code.id,
            "secret": code.secret,
            "csr": pki.csr(self.key, "admin").decode(),
            "node_key": f"{self.node_key} me@machine",
            "fedsplit_version": __version__,
        }
        return made | changes


def proxy(pem: str, name: str, **changes: str) -> dict[str, str]:
    """The headers that nginx sets for a caller with this certificate."""
    made = {
        PROXY_HEADER: PROXY_SECRET,
        SITE_HEADER: name,
        SERIAL_HEADER: pki.serial(pki.read_certificate(pem.encode())),
    }
    return made | changes


def join(client: httpx.Client, code: JoinCode, site: NewSite) -> JoinAnswer:
    answer = client.post(paths.JOIN, json=site.request(code))
    assert answer.status_code == 200, answer.text
    return JoinAnswer.model_validate_json(answer.content)


def error_of(answer: Any) -> tuple[int, str]:
    told = answer.json()["error"]
    assert set(told) == {"kind", "message"}
    assert "Traceback" not in told["message"]
    return answer.status_code, told["kind"]


def test_hello_says_version_and_time(client: httpx.Client) -> None:
    said = client.get(paths.HELLO).json()
    assert said["fedsplit_version"] == __version__
    assert abs(said["server_time"] - time.time()) < 5


def test_a_join_gives_a_certificate_that_lets_in(
    client: httpx.Client, registry: Registry, flower: Flower
) -> None:
    site = NewSite()
    made = join(client, registry.add_site("検査 1", 24), site)
    assert (made.site, made.backbone_sha256) == ("検査 1", BACKBONE.sha256)
    assert made.ca == CA.pem.decode()
    certificate = pki.read_certificate(made.certificate.encode())
    assert certificate.public_key() == site.key.public_key()
    days = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert 29 < days.total_seconds() / 86400 <= 30
    name = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value
    assert isinstance(name, str)
    assert name.startswith("site-")
    assert flower.alive == {site.node_key}
    headers = proxy(made.certificate, name)
    assert client.get(paths.AUTHORISE, headers=headers).status_code == 204
    told = client.post(paths.REPORT, headers=headers, json={"state": "idle"}).json()
    assert told["standing"] == "member"
    assert registry.sites()[0].report == Report(state="idle")
    wanted = {"csr": pki.csr(pki.new_key(), "x").decode()}
    renewed = client.post(paths.RENEW, headers=headers, json=wanted).json()["certificate"]
    assert client.get(paths.AUTHORISE, headers=proxy(renewed, name)).status_code == 204


def test_a_join_that_is_asked_again_gets_the_same(client: httpx.Client, registry: Registry) -> None:
    code, site = registry.add_site("line-1", 24), NewSite()
    assert join(client, code, site) == join(client, code, site)
    assert error_of(client.post(paths.JOIN, json=NewSite().request(code))) == (409, "code-used")


def test_without_the_superlink_nothing_is_half_made(
    client: httpx.Client, registry: Registry, flower: Flower
) -> None:
    code, site = registry.add_site("line-1", 24), NewSite()
    flower.down = True
    answer = client.post(paths.JOIN, json=site.request(code))
    assert error_of(answer) == (503, "superlink")
    assert "still good" in answer.json()["error"]["message"]
    assert registry.sites()[0].state == "invited"
    flower.down = False
    join(client, code, site)


def test_a_revoked_site_is_out_and_comes_back_with_new_keys(
    client: httpx.Client, registry: Registry, flower: Flower, folder: FederationFolder
) -> None:
    site = NewSite()
    old = proxy(join(client, registry.add_site("line-1", 24), site).certificate, "line-1")
    NodeKeys(folder, registry, flower).forget(registry.revoke("line-1"))
    assert flower.alive == set()
    answer = client.get(paths.AUTHORISE, headers=old)
    assert error_of(answer) == (403, "revoked")
    assert answer.headers[paths.REASON_HEADER].startswith("site 'line-1' was revoked;")
    csr = {"csr": pki.csr(pki.new_key(), "x").decode()}
    assert error_of(client.post(paths.RENEW, headers=old, json=csr)) == (403, "revoked")
    told = client.post(paths.REPORT, headers=old, json={"state": "idle"}).json()
    assert (told["standing"], "add-site" in told["message"]) == ("revoked", True)
    code = registry.add_site("line-1", 24)
    assert error_of(client.post(paths.JOIN, json=site.request(code))) == (409, "key-used")
    again = NewSite()
    again.key = site.key
    assert error_of(client.post(paths.JOIN, json=again.request(code))) == (409, "key-used")
    new = NewSite()
    headers = proxy(join(client, code, new).certificate, "line-1")
    assert client.get(paths.AUTHORISE, headers=headers).status_code == 204
    assert flower.alive == {new.node_key}


def test_a_rotated_site_is_told_so(
    client: httpx.Client, registry: Registry, flower: Flower
) -> None:
    first, second = NewSite(), NewSite()
    old = proxy(join(client, registry.add_site("line-1", 24), first).certificate, "line-1")
    code = registry.rotate("line-1", 24)
    assert client.get(paths.AUTHORISE, headers=old).status_code == 204
    join(client, code, second)
    assert error_of(client.get(paths.AUTHORISE, headers=old)) == (403, "rotated")
    assert flower.alive == {second.node_key}


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({PROXY_HEADER: "a guess"}, "not-the-proxy"),
        ({PROXY_HEADER: ""}, "not-the-proxy"),
        ({SITE_HEADER: "line-2"}, "not-member"),
        ({SERIAL_HEADER: ""}, "not-member"),
        ({SERIAL_HEADER: "ABCD"}, "not-member"),
    ],
)
def test_headers_that_are_not_the_proxys_let_nobody_in(
    changes: dict[str, str], kind: str, client: httpx.Client, registry: Registry
) -> None:
    made = join(client, registry.add_site("line-1", 24), NewSite())
    headers = proxy(made.certificate, "line-1", **changes)
    csr = {"csr": pki.csr(pki.new_key(), "x").decode()}
    for answer in (
        client.get(paths.AUTHORISE, headers=headers),
        client.post(paths.RENEW, headers=headers, json=csr),
        client.post(paths.REPORT, headers=headers, json={"state": "idle"}),
        client.get(paths.MANIFEST, headers=headers),
        client.get(f"{paths.FILES}/config.json", headers=headers),
        client.get(f"{paths.TENSORS}/{'0' * 64}", headers=headers),
    ):
        assert error_of(answer) == (403, kind)
    assert error_of(client.get(paths.AUTHORISE)) == (403, "not-the-proxy")


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"csr": "x"}, 400),
        ({"csr": "x" * 20_000}, 400),
        ({"node_key": "ssh-rsa AAAA"}, 400),
        ({"surprise": 1}, 400),
        ({"secret": 5}, 400),
        ({"code_id": "x" * 65}, 400),
        ({"code_id": "ffffffff"}, 403),
        ({"secret": "0" * 32}, 403),
    ],
)
def test_bad_joins_are_refused_and_the_code_is_still_good(
    changes: dict[str, Any], status: int, client: httpx.Client, registry: Registry
) -> None:
    code, site = registry.add_site("line-1", 24), NewSite()
    assert error_of(client.post(paths.JOIN, json=site.request(code, **changes)))[0] == status
    join(client, code, site)


def test_bodies_are_bounded_before_they_are_read(client: httpx.Client) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 2**13
            yield b" " * 2**13

    assert error_of(client.post(paths.JOIN, content=endless())) == (413, "bad-request")
    big = client.post(paths.JOIN, content=b" " * (MAX_BODY_BYTES + 1))
    assert error_of(big) == (413, "bad-request")


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/fedsplit/v1/join/", "/fedsplit"])
def test_nothing_else_is_there(path: str, client: httpx.Client) -> None:
    assert error_of(client.get(path))[0] == 404


def test_a_wrong_method_is_said(client: httpx.Client) -> None:
    assert error_of(client.get(paths.JOIN))[0] == 405


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.sampled_from([paths.JOIN, paths.RENEW, paths.REPORT]),
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=20),
        lambda v: (
            st.lists(v, max_size=3)
            | st.dictionaries(st.sampled_from(["code_id", "secret", "csr", "node_key", "x"]), v)
        ),
        max_leaves=10,
    ).map(lambda v: json.dumps(v).encode()),
)
def test_any_body_is_answered_in_words(client: httpx.Client, path: str, body: bytes) -> None:
    status, _ = error_of(client.post(path, content=body))
    assert status in (400, 403, 429)


def test_deep_json_is_a_bad_request(client: httpx.Client) -> None:
    for body in (b"[" * 60_000, b'{"a":' * 10_000):
        assert error_of(client.post(paths.JOIN, content=body)) == (400, "bad-request")


def test_strangers_are_slowed_down_and_a_good_code_is_not(
    client: httpx.Client, registry: Registry, folder: FederationFolder
) -> None:
    code, site = registry.add_site("line-1", 24), NewSite()
    foreign = site.request(JoinCode.new("other.example:1", "ab" * 32))
    kinds = [error_of(client.post(paths.JOIN, json=foreign)) for _ in range(FEW + 5)]
    assert kinds[0] == (403, "code-unknown")
    assert kinds[-1] == (429, "too-many")
    join(client, code, site)
    lines = [line for line in audit.read(folder) if line["what"] == "join-refused"]
    assert 0 < len(lines) <= 20


def test_an_allowance_fills_up_again() -> None:
    now = 0.0
    some = Allowance(2, every_s=10.0, now=lambda: now)
    for _ in range(2):
        assert some.any_left()
        some.take()
    assert not some.any_left()
    now = 10.0
    assert some.any_left()
    some.take()
    assert not some.any_left()


def test_a_full_disk_is_said_and_keeps_the_code(
    client: httpx.Client, registry: Registry, folder: FederationFolder
) -> None:
    code, site = registry.add_site("line-1", 24), NewSite()
    folder.audit.unlink()
    folder.audit.mkdir()
    assert error_of(client.post(paths.JOIN, json=site.request(code))) == (503, "server-disk")
    folder.audit.rmdir()
    join(client, code, site)


def test_a_disk_without_room_keeps_the_code(folder: FederationFolder, flower: Flower) -> None:
    with small_disk(folder.path / "full", "size=400k") as disk:
        for name in ("federation.toml", "ca", "secrets"):
            copied(folder.path / name, disk)
        small = FederationFolder.at(disk)
        with Registry(small) as registry:
            code, site = registry.add_site("line-1", 24), NewSite()
            app = create_app(small, connect=flower, backbone=lambda: BACKBONE)
            with serving(app) as client:
                filler = disk / "filler"
                fill(filler)
                answer = client.post(paths.JOIN, json=site.request(code))
                assert error_of(answer) == (503, "server-disk")
                assert registry.sites()[0].state == "invited"
                filler.unlink()
                join(client, code, site)


def copied(path: Path, to: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, to / path.name)
    else:
        shutil.copy(path, to)


def fill(path: Path) -> None:
    """Take all the room that is left on its disk."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 512)


def test_a_backbone_that_cannot_be_read_is_said_and_keeps_the_code(
    folder: FederationFolder, registry: Registry, flower: Flower
) -> None:
    def gone() -> BackboneFacts:
        raise BackboneError("there is no folder big-model")

    code, site = registry.add_site("line-1", 24), NewSite()
    with serving(create_app(folder, connect=flower, backbone=gone)) as client:
        answer = client.post(paths.JOIN, json=site.request(code))
        assert error_of(answer) == (503, "backbone")
        assert "big-model" in answer.json()["error"]["message"]
    with serving(create_app(folder, connect=flower, backbone=lambda: BACKBONE)) as client:
        join(client, code, site)


def test_a_backbone_that_is_still_being_read_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_BACKBONE_S", 0.1)
    go_on = threading.Event()

    class Served:
        def parts(self) -> Any:
            assert go_on.wait(20)
            return SimpleNamespace(manifest=SimpleNamespace(sha256="ab" * 32))

    facts = control._Facts("big", Served())  # type: ignore[arg-type]
    facts.start()
    with pytest.raises(BackboneError, match=r"still being read.*again in a minute"):
        facts()
    go_on.set()
    monkeypatch.setattr(control, "_BACKBONE_S", 20)
    assert facts() == BackboneFacts("big", "ab" * 32)


def test_flowers_keys_become_those_of_the_registry(
    folder: FederationFolder, registry: Registry, flower: Flower, client: httpx.Client
) -> None:
    one, two = NewSite(), NewSite()
    join(client, registry.add_site("line-1", 24), one)
    join(client, registry.add_site("line-2", 24), two)
    # Revoked while the SuperLink was down.
    registry.revoke("line-2")
    by_hand, young = Node("by hand", registered=time.time() - 3600), Node("young")
    flower.known |= {n.public_key: n for n in (by_hand, young)}
    del flower.known[one.node_key]
    NodeKeys(folder, registry, flower).reconcile()
    assert flower.alive == {one.node_key, "young"}
    told = [(e["what"], e["who"]) for e in audit.read(folder)][-3:]
    assert sorted(told) == [
        ("node-key-added", "line-1"),
        ("node-key-removed", "server"),
        ("node-key-removed", "server"),
    ]
    NodeKeys(folder, registry, flower).reconcile()
    assert flower.alive == {one.node_key, "young"}


def test_your_own_certificates_ca_is_what_a_code_names(
    folder: FederationFolder, tmp_path: Path
) -> None:
    own = pki.make_ca("the company's", days=100)
    leaf = pki.issue(
        own, pki.new_key().public_key(), common_name="fl.example", days=9, client=False
    )
    (folder.path / "own.pem").write_bytes(leaf + own.pem)
    text = (folder.path / "federation.toml").read_text()
    (folder.path / "federation.toml").write_text(
        text + '[tls]\ncertificate = "own.pem"\nkey = "own-key.pem"\n'
    )
    changed = FederationFolder.at(folder.path)
    app = create_app(changed, connect=Flower(), backbone=lambda: BACKBONE)
    with serving(app) as client, Registry(changed) as registry:
        code = registry.add_site("line-1", 24)
        made = join(client, code, NewSite())
    assert code.ca_fingerprint == pki.fingerprint(own.certificate)
    assert made.ca == own.pem.decode()
    # Sites' own certificates are the federation's all the same.
    pki.read_certificate(made.certificate.encode()).verify_directly_issued_by(CA.certificate)

"""Who belongs to a federation: codes for one use, keys that never come back, and two processes at once."""

from __future__ import annotations

import json
import multiprocessing
import sqlite3
import stat
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from fedsplit.core.errors import ConfigError, EnrolmentError, FederationError, FolderError
from fedsplit.plant import pki
from fedsplit.plant.join_code import JoinCode
from fedsplit.plant.server import audit
from fedsplit.plant.server.admission import MAX_TRIES, Admission, Admitted, Keys
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.registry import Registry
from fedsplit.plant.wire import Report
from tests.plant.server.conftest import CA


class Clock:
    def __init__(self) -> None:
        self.now = 1_900_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(folder: FederationFolder, clock: Clock) -> Iterator[Registry]:
    with Registry(folder, now=clock) as found:
        yield found


def keys(number: int) -> Keys:
    return Keys(f"{number:064x}", f"ecdsa-sha2-nistp384 {number}")


def signed(_name: str, common_name: str) -> bytes:
    return pki.issue(
        CA, pki.new_key().public_key(), common_name=common_name, days=3000, client=True
    )


def join(registry: Registry, code: JoinCode, number: int) -> Admitted:
    return Admission(registry).redeem(code.id, code.secret, keys(number), signed)


def serial_of(joined: Admitted) -> str:
    return pki.serial(pki.read_certificate(joined.certificate))


def refused(registry: Registry, code: JoinCode, number: int) -> str:
    with pytest.raises(EnrolmentError) as caught:
        join(registry, code, number)
    return caught.value.kind


def audited(folder: FederationFolder) -> list[str]:
    return [line["what"] for line in audit.read(folder)]


def test_a_code_makes_its_site_a_member_once(registry: Registry, folder: FederationFolder) -> None:
    code = registry.add_site("検査 1", 24)
    assert (code.address, code.ca_fingerprint) == (
        "fl.example:8443",
        pki.fingerprint(CA.certificate),
    )
    assert [(s.name, s.state, s.joined) for s in registry.sites()] == [("検査 1", "invited", 0)]
    joined = join(registry, code, 1)
    assert joined.name == "検査 1"
    assert registry.shown(serial_of(joined)).standing == "member"
    assert refused(registry, code, 2) == "code-used"
    (row,) = registry.sites()
    assert (row.state, row.serial, row.node_key) == ("member", serial_of(joined), keys(1).node)
    assert row.common_name.startswith("site-")
    assert audited(folder) == ["invited", "joined"]


def test_a_lost_answer_can_be_asked_again_with_the_same_keys(
    registry: Registry, clock: Clock
) -> None:
    code = registry.add_site("line-1", 24)
    first = join(registry, code, 1)
    assert join(registry, code, 1).certificate == first.certificate
    clock.now += 25 * 3600
    assert refused(registry, code, 1) == "code-used"


def test_what_admits_fails_and_the_code_is_still_good(
    registry: Registry, folder: FederationFolder
) -> None:
    code = registry.add_site("line-1", 24)

    def down(_name: str, _common: str) -> bytes:
        raise FederationError("the SuperLink is down")

    with pytest.raises(FederationError):
        Admission(registry).redeem(code.id, code.secret, keys(1), down)
    assert registry.sites()[0].state == "invited"
    assert registry.node_keys() == {}
    assert audited(folder) == ["invited"]
    join(registry, code, 1)


def test_codes_expire_and_are_replaced(registry: Registry, clock: Clock) -> None:
    first = registry.add_site("line-1", 1)
    with pytest.raises(ConfigError, match=r"invited already.*rotate line-1"):
        registry.add_site("line-1", 1)
    second = registry.rotate("line-1", 1)
    assert refused(registry, first, 1) == "code-ended"
    clock.now += 3601
    assert refused(registry, second, 1) == "code-expired"
    assert not Admission(registry).is_open(second.id)
    # Nobody holds a code for it: the name is free to be invited again.
    join(registry, registry.add_site("line-1", 1), 1)


def test_a_wrong_secret_a_few_times_ends_the_code(
    registry: Registry, folder: FederationFolder
) -> None:
    code = registry.add_site("line-1", 24)
    wrong = JoinCode(code.address, code.ca_fingerprint, code.id, "0" * 32)
    for _ in range(MAX_TRIES - 1):
        assert refused(registry, wrong, 1) == "code-unknown"
    assert Admission(registry).is_open(code.id)
    assert refused(registry, wrong, 1) == "code-unknown"
    assert refused(registry, code, 1) == "code-ended"
    assert audited(folder) == ["invited", "code-dead"]


def test_another_federations_code_is_unknown(registry: Registry) -> None:
    foreign = JoinCode.new("other.example:1", "ab" * 32)
    assert refused(registry, foreign, 1) == "code-unknown"


@pytest.mark.parametrize(
    ("taken", "asked", "told"),
    [
        ("line-1", "line-1", "is a member already"),
        ("line-1", "LINE-1", "too like 'line-1'"),
        ("line-1", "ｌｉｎｅ－1", "too like"),
        ("ガ", "ｶﾞ", "too like"),
        ("検査", "site-" + "0" * 64, ""),
        ("line-1", "", "0 characters"),
        ("line-1", " line-2", "blanks"),
        ("line-1", "a\nb", "cannot be shown"),
        ("line-1", "x" * 129, "129 characters"),
    ],
)
def test_a_name_that_is_taken_or_of_no_use_is_refused(
    taken: str, asked: str, told: str, registry: Registry
) -> None:
    join(registry, registry.add_site(taken, 24), 1)
    if not told:
        registry.add_site(asked, 24)
        return
    with pytest.raises(ConfigError, match=told):
        registry.add_site(asked, 24)
    assert len(registry.sites()) == 1


def test_a_name_that_is_anothers_in_certificates_is_refused(registry: Registry) -> None:
    from fedsplit.core.names import certificate_name

    registry.add_site("検査", 24)
    with pytest.raises(ConfigError, match="too like '検査'"):
        registry.add_site(certificate_name("検査").upper(), 24)


def test_a_revoked_site_joins_again_with_new_keys_alone(
    registry: Registry, folder: FederationFolder
) -> None:
    old = join(registry, registry.add_site("line-1", 24), 1)
    spare = registry.rotate("line-1", 24)
    assert registry.revoke("line-1") == (keys(1).node,)
    assert registry.shown(serial_of(old)).standing == "revoked"
    assert json.loads(folder.revoked.read_text()) == {
        "serials": [serial_of(old)],
        "names": ["line-1"],
    }
    assert refused(registry, spare, 2) == "code-ended"
    with pytest.raises(ConfigError, match="is revoked"):
        registry.rotate("line-1", 24)
    code = registry.add_site("line-1", 24)
    # The keys may be in other hands.
    assert refused(registry, code, 1) == "key-used"
    assert refused(registry, code_of(code), 1) == "key-used"
    new = join(registry, code, 2)
    assert registry.shown(serial_of(new)).standing == "member"
    assert registry.shown(serial_of(old)).standing == "revoked"
    assert json.loads(folder.revoked.read_text()) == {
        "serials": [serial_of(old)],
        "names": [],
    }
    assert registry.node_keys() == {keys(2).node: "line-1"}
    assert registry.ceased_node_keys() == {keys(1).node}


def code_of(code: JoinCode) -> JoinCode:
    return JoinCode.parse(code.text())


def test_rotated_keys_cease_when_the_new_ones_are_in(registry: Registry) -> None:
    old = join(registry, registry.add_site("line-1", 24), 1)
    code = registry.rotate("line-1", 24)
    assert registry.shown(serial_of(old)).standing == "member"
    new = join(registry, code, 2)
    assert new.ceased == (keys(1).node,)
    assert registry.shown(serial_of(old)).standing == "rotated"
    assert registry.shown(serial_of(new)).standing == "member"


def test_revoking_twice_says_the_same_and_is_one_line_in_the_audit(
    registry: Registry, folder: FederationFolder
) -> None:
    join(registry, registry.add_site("line-1", 24), 1)
    assert registry.revoke("line-1") == registry.revoke("line-1") == (keys(1).node,)
    assert audited(folder).count("revoked") == 1
    with pytest.raises(ConfigError, match="no site 'line-2'"):
        registry.revoke("line-2")


def test_a_certificate_is_renewed_while_it_is_in_force(registry: Registry) -> None:
    joined = join(registry, registry.add_site("line-1", 24), 1)
    serial = serial_of(joined)

    def issue(common_name: str) -> bytes:
        return signed("", common_name)

    new = Admission(registry).renew(serial, keys(9).tls, issue)
    assert Admission(registry).renew(serial, keys(9).tls, issue) == new
    both = {registry.shown(s).standing for s in (serial, serial_of(Admitted("", new)))}
    assert both == {"member"}
    for number in range(100, 119):
        Admission(registry).renew(serial, keys(number).tls, issue)
    with pytest.raises(EnrolmentError, match="renew later"):
        Admission(registry).renew(serial, keys(119).tls, issue)
    registry.revoke("line-1")
    for shown in (serial, "AB12"):
        with pytest.raises(EnrolmentError, match="not in force"):
            Admission(registry).renew(shown, keys(10).tls, issue)


def test_a_serial_is_known_however_a_proxy_writes_it(registry: Registry) -> None:
    serial = serial_of(join(registry, registry.add_site("line-1", 24), 1))
    even = serial.zfill(40)
    pairs = ":".join(even[i : i + 2] for i in range(0, 40, 2))
    for written in (serial.lower(), "00" + serial, pairs):
        assert registry.shown(written).standing == "member"


def test_a_report_is_kept(registry: Registry, clock: Clock) -> None:
    join(registry, registry.add_site("line-1", 24), 1)
    registry.seen("line-1", Report(state="idle", rss_bytes=5))
    (row,) = registry.sites()
    assert row.last_seen == clock.now
    assert row.report is not None
    assert row.report.rss_bytes == 5


def try_one(path: Path, text: str, number: int) -> str:
    with Registry(FederationFolder.at(path)) as registry:
        try:
            return join(registry, JoinCode.parse(text), number).name
        except EnrolmentError as err:
            return err.kind


def test_of_several_processes_and_threads_one_redeems_a_code(folder: FederationFolder) -> None:
    with Registry(folder) as registry:
        code = registry.add_site("line-1", 24).text()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as two, ThreadPoolExecutor(4) as four:
        tries = [pool.submit(try_one, folder.path, code, n) for n in range(4) for pool in (two,)]
        tries += [four.submit(try_one, folder.path, code, 10 + n) for n in range(4)]
        ends = sorted(t.result(timeout=60) for t in tries)
    assert ends == ["code-used"] * 7 + ["line-1"]


def test_the_registry_is_its_owners_and_holds_no_secret(
    registry: Registry, folder: FederationFolder
) -> None:
    code = registry.add_site("line-1", 24)
    for path in folder.path.glob("registry.db*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert code.secret.encode() not in path.read_bytes()
        assert bytes.fromhex(code.secret) not in path.read_bytes()
    assert code.secret not in folder.audit.read_text()
    assert stat.S_IMODE(folder.audit.stat().st_mode) == 0o600


@pytest.mark.parametrize(("version", "told"), [(2, "a newer fedsplit"), (-1, "an older fedsplit")])
def test_another_versions_registry_is_said(
    version: int, told: str, folder: FederationFolder
) -> None:
    with sqlite3.connect(folder.registry) as file:
        file.execute(f"PRAGMA user_version = {version}")
    file.close()
    with pytest.raises(ConfigError, match=told):
        Registry(folder)


def test_a_damaged_or_closed_registry_is_said(folder: FederationFolder) -> None:
    folder.registry.write_bytes(b"no database at all, but a text that is long enough" * 10)
    with pytest.raises(FolderError, match=r"registry\.db cannot be used"):
        Registry(folder)
    folder.registry.unlink()
    folder.registry.mkdir()
    with pytest.raises(FolderError, match="check who owns it"):
        Registry(folder)


def test_an_audit_that_cannot_be_written_stops_the_change(
    registry: Registry, folder: FederationFolder
) -> None:
    code = registry.add_site("line-1", 24)
    folder.audit.unlink()
    folder.audit.mkdir()
    with pytest.raises(FolderError, match=r"audit\.jsonl cannot be written"):
        join(registry, code, 1)
    assert registry.sites()[0].state == "invited"
    folder.audit.rmdir()
    join(registry, code, 1)

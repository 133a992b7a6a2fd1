"""A federation folder is made whole, with every setting in its file, or nothing of it is left."""

from __future__ import annotations

import stat
import tomllib
from pathlib import Path

import pytest
from cryptography import x509

from fedsplit.core.errors import ConfigError, ServiceError
from fedsplit.plant import pki
from fedsplit.plant.server import init
from fedsplit.plant.server.certificate import hosts_of
from fedsplit.plant.server.folder import FederationFolder, FederationSettings
from fedsplit.plant.server.init import Wanted, checked_host, make_folder
from fedsplit.transport.keys import read_key, read_proxy_secret
from tests.small_disk import small_disk


def test_all_that_a_server_needs_is_made(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "new" / "plant", Wanted(host="server.factory.example"))
    read_key(folder.encoder_secret)
    read_proxy_secret(folder.proxy_secret)
    secrets = [folder.encoder_secret, folder.superexec_secret, folder.proxy_secret]
    assert len({path.read_bytes() for path in [*secrets, folder.page_password]}) == 4
    for path in [*secrets, folder.page_password, folder.ca_key, folder.loopback_certificate_key]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    ca = pki.Pair.read(folder.ca, folder.ca_key)
    chain = x509.load_pem_x509_certificates(folder.certificate.read_bytes())
    chain[0].verify_directly_issued_by(ca.certificate)
    assert chain[1] == ca.certificate
    assert {"server.factory.example", "localhost", "127.0.0.1"} <= set(hosts_of(chain[0]))
    assert not list(folder.path.glob(".*"))
    assert FederationFolder.at(folder.path) == folder


def test_every_setting_stands_in_the_file_with_its_default(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "plant", Wanted(host="h"))
    assert folder.settings == FederationSettings.model_validate({"server": {"host": "h"}})
    written = tomllib.loads((folder.path / "federation.toml").read_text("utf-8"))
    del written["format"]
    for name, field in FederationSettings.model_fields.items():
        if name != "run":
            known = {f.alias for f in field.annotation.model_fields.values()}  # type: ignore[union-attr]
            assert set(written.pop(name)) == known
    assert written == {"run": {}}


def test_what_is_asked_for_stands_there(tmp_path: Path) -> None:
    wanted = Wanted(host="::1", port=443, bind="::1", site_days=7, code_hours=0.5, proxy="own", backbone='/m/"x')  # fmt: skip
    settings = make_folder(tmp_path / "plant", wanted).settings
    assert (settings.server.host, settings.server.port, settings.server.bind) == ("::1", 443, "::1")
    assert (settings.certificates.site_days, settings.certificates.code_hours) == (7, 0.5)
    assert (settings.proxy.mode, settings.backbone.path) == ("own", '/m/"x')


def test_an_empty_folder_will_do_and_what_a_killed_one_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / init._PART).mkdir()
    (tmp_path / init._PART / "half").touch()
    folder = make_folder(tmp_path, Wanted(host="h"))
    assert folder.path == tmp_path
    assert not (tmp_path / init._PART).exists()


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("", "is no host name"),
        ("a b", "is no host name"),
        ("https://server.example", "only the name in it"),
        ("server.example:8443", "behind --port"),
        ("300.1.1.1", "is no host name"),
        ("-x", "is no host name"),
        ("工場.example", "xn--"),
        ("0.0.0.0", "no site can dial"),
        ("::", "no site can dial"),
        ("x" * 64, "is no host name"),
        ("a\nb", "is no host name"),
    ],
)
def test_a_host_that_is_no_name(tmp_path: Path, host: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_folder(tmp_path / "plant", Wanted(host=host))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("host", ["h", "server_1.factory.example", "10.0.0.1", "fe80::1", "a.b."])
def test_a_host_that_is_one(host: str) -> None:
    assert checked_host(host) == host


def test_a_folder_that_holds_something_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ConfigError, match=r"is not empty: it holds 'mine'; give a folder"):
        make_folder(tmp_path, Wanted(host="h"))
    with pytest.raises(ConfigError, match="is a file"):
        make_folder(tmp_path / "mine", Wanted(host="h"))
    made = make_folder(tmp_path / "plant", Wanted(host="h"))
    before = made.ca.read_bytes()
    with pytest.raises(ConfigError, match="is a federation folder already"):
        make_folder(made.path, Wanted(host="h"))
    assert made.ca.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "plant"]


@pytest.mark.parametrize(
    ("options", "said"), [("size=16k", "No space left"), ("ro", "Read-only file system")]
)
def test_a_disk_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, options: str, said: str
) -> None:
    with small_disk(tmp_path / "disk", options) as disk:
        with pytest.raises(ServiceError, match=rf"no federation folder was made .*{said}"):
            make_folder(disk / "deep" / "plant", Wanted(host="h"))
        assert list(disk.iterdir()) == []
        if options != "ro":
            with pytest.raises(ServiceError, match=said):
                make_folder(disk, Wanted(host="h"))
            assert list(disk.iterdir()) == []


def test_an_interrupt_between_the_moves_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def until_settings(self: Path, target: Path) -> Path:
        if self.name == "federation.toml":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", until_settings)
    with pytest.raises(KeyboardInterrupt):
        make_folder(tmp_path / "plant", Wanted(host="h"))
    assert list(tmp_path.iterdir()) == []


def test_a_ca_of_ones_own(tmp_path: Path) -> None:
    ca = pki.make_ca("the company's", days=900)
    (tmp_path / "ca.pem").write_bytes(ca.pem)
    (tmp_path / "ca.key").write_bytes(ca.key_pem)
    folder = make_folder(
        tmp_path / "plant", Wanted(host="h", ca=tmp_path / "ca.pem", ca_key=tmp_path / "ca.key")
    )
    assert folder.ca.read_bytes() == ca.pem
    leaf = pki.issue(ca, ca.key.public_key(), common_name="h", days=3, client=False)
    (tmp_path / "leaf.pem").write_bytes(leaf)
    for certificate, said in [("leaf.pem", "is not the certificate of a CA"), ("none", "No such")]:
        wanted = Wanted(host="h", ca=tmp_path / certificate, ca_key=tmp_path / "ca.key")
        with pytest.raises(ConfigError, match=said):
            make_folder(tmp_path / "other", wanted)
    assert not (tmp_path / "other").exists()

"""What is looked at before a server starts: secrets, the public port, certificates."""

from __future__ import annotations

import os
import socket
import stat
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Self

import pytest

from fedsplit.core.errors import ConfigError
from fedsplit.plant import pki
from fedsplit.plant.server import certificate
from fedsplit.plant.server.certificate import check_own_certificate, hosts_of, renew_certificate
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.init import Wanted, make_folder, server_certificate
from fedsplit.plant.server.preflight import check_owner, check_public_port, check_secrets


@pytest.fixture
def plant(tmp_path: Path) -> FederationFolder:
    return make_folder(tmp_path / "plant", Wanted(host="server.example"))


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX")
def test_secrets_that_others_may_read_are_mended_and_told(plant: FederationFolder) -> None:
    told: list[str] = []
    plant.encoder_secret.chmod(0o644)
    check_secrets(plant, told.append)
    assert stat.S_IMODE(plant.encoder_secret.stat().st_mode) == 0o600
    assert len(told) == 1
    assert "secrets/encoder.secret could be read by others on this machine (mode 644)" in told[0]
    check_secrets(plant, told.append)
    assert len(told) == 1


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root can own nothing")
def test_root_is_told_of_a_folder_of_another_user(plant: FederationFolder) -> None:
    told: list[str] = []
    check_owner(plant, told.append)
    assert told == []
    os.chown(plant.path, 65534, 65534)
    check_owner(plant, told.append)
    assert "this is root" in told[0]


def test_secrets_that_are_lost_are_named_at_once(plant: FederationFolder) -> None:
    plant.proxy_secret.unlink()
    plant.ca_key.unlink()
    with pytest.raises(ConfigError, match=r"lacks ca/ca-key.pem, secrets/proxy.secret; restore"):
        check_secrets(plant, print)


def test_a_port_in_use_is_told_with_who_has_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"port {port} .*is in use by .*process {os.getpid()}"
        ):
            check_public_port("127.0.0.1", port)
    check_public_port("127.0.0.1", port)


def test_an_address_of_another_machine() -> None:
    with pytest.raises(ConfigError, match=r"port 9 of 192.0.2.1 cannot be listened on"):
        check_public_port("192.0.2.1", 9)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="rights are POSIX")
def test_a_privileged_port_as_an_ordinary_user() -> None:
    start = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    if start.exists() and int(start.read_text()) <= 443:
        pytest.skip("every user may listen on port 443 here")
    reads, writes = os.pipe()
    if (child := os.fork()) == 0:
        if os.geteuid() == 0:
            os.setuid(65534)
        try:
            check_public_port("127.0.0.1", 443)
        except ConfigError as err:
            os.write(writes, str(err).encode())
        os._exit(0)
    os.waitpid(child, 0)
    said = os.read(reads, 2000).decode()
    assert "port 443 of 127.0.0.1 is below 1024" in said
    assert "ip_unprivileged_port_start" in said


@pytest.mark.parametrize(("days", "renewed"), [(0, False), (260, False), (270, True), (500, True)])
def test_the_certificate_is_renewed_when_a_third_is_left(
    plant: FederationFolder, monkeypatch: pytest.MonkeyPatch, days: int, renewed: bool
) -> None:
    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) + timedelta(days=days)

    before = plant.loopback_certificate.read_bytes()
    monkeypatch.setattr(certificate, "datetime", Later)
    told: list[str] = []
    assert renew_certificate(plant, told.append) == renewed
    assert (plant.loopback_certificate.read_bytes() != before) == renewed
    if renewed:
        assert f"it ends in {396 - days} days" in told[0]


def test_a_certificate_for_another_host_is_made_anew(plant: FederationFolder) -> None:
    ca = pki.Pair.read(plant.ca, plant.ca_key)
    other, key = server_certificate(ca, "old.example", days=300)
    plant.loopback_certificate.write_bytes(other)
    plant.loopback_certificate_key.write_bytes(key)
    told: list[str] = []
    assert renew_certificate(plant, told.append)
    assert told == ["the server has a new certificate: it is not for server.example"]
    made = pki.Pair.read(plant.loopback_certificate, plant.loopback_certificate_key)
    assert "server.example" in hosts_of(made.certificate)
    assert stat.S_IMODE(plant.loopback_certificate_key.stat().st_mode) == 0o600


def own(plant: FederationFolder, *, host: str, days: float) -> FederationFolder:
    ca = pki.make_ca("the company's", days=900)
    key = pki.new_key()
    leaf = pki.issue(ca, key.public_key(), common_name=host, days=days, client=False)
    (plant.path / "own.pem").write_bytes(leaf + ca.pem)
    (plant.path / "own.key").write_bytes(pki.key_pem(key))
    file = plant.path / "federation.toml"
    text = file.read_text("utf-8").replace('certificate = ""', 'certificate = "own.pem"')
    file.write_text(text.replace('key = ""', 'key = "own.key"'), "utf-8")
    return FederationFolder.at(plant.path)


@pytest.mark.parametrize("host", ["server.example", "*.example"])
def test_a_certificate_of_ones_own_that_fits(plant: FederationFolder, host: str) -> None:
    told: list[str] = []
    check_own_certificate(own(plant, host=host, days=90), told.append)
    check_own_certificate(own(plant, host=host, days=3), told.append)
    assert len(told) == 1
    assert "ends in 2 days" in told[0]


def test_a_certificate_of_ones_own_that_does_not(plant: FederationFolder) -> None:
    mine = own(plant, host="other.example", days=90)
    with pytest.raises(ConfigError, match=r"is for other.example; sites dial server.example"):
        check_own_certificate(mine, print)
    with pytest.raises(ConfigError, match="has expired"):
        check_own_certificate(own(plant, host="server.example", days=-0.001), print)
    (plant.path / "own.key").write_bytes(pki.key_pem(pki.new_key()))
    with pytest.raises(ConfigError, match=r"own.key is not the key of .*own.pem"):
        check_own_certificate(mine, print)
    (plant.path / "own.key").unlink()
    with pytest.raises(ConfigError, match=r"own.key cannot be read: No such file"):
        check_own_certificate(mine, print)

"""The federation's keys and certificates, with a real TLS handshake and with Flower's own reader of node keys."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.core.errors import ConfigError
from fedsplit.core.proxied import bare_serial
from fedsplit.plant import pki


@pytest.fixture(scope="module")
def ca() -> pki.Pair:
    return pki.make_ca("fedsplit test", days=10)


def issued(ca: pki.Pair, **changes: object) -> x509.Certificate:
    wanted = {"common_name": "line-1", "days": 5, "client": True} | changes
    pem = pki.issue(ca, pki.csr(pki.new_key(), "whatever"), **wanted)  # type: ignore[arg-type]
    return x509.load_pem_x509_certificate(pem)


def written(folder: Path, name: str, pem: bytes, key: pki.Key) -> tuple[str, str]:
    (folder / f"{name}.pem").write_bytes(pem)
    (folder / f"{name}-key.pem").write_bytes(pki.key_pem(key))
    return str(folder / f"{name}.pem"), str(folder / f"{name}-key.pem")


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> dict[str, object]:
    """What the server sees of the client's certificate."""
    ours, theirs = socket.socketpair()
    seen: dict[str, object] = {}

    def serve() -> None:
        with ours, server.wrap_socket(ours, server_side=True) as tls:
            seen.update(tls.getpeercert() or {})
            tls.send(b"x")

    thread = threading.Thread(target=serve)
    thread.start()
    with theirs, client.wrap_socket(theirs, server_hostname=host) as tls:
        tls.recv(1)
    thread.join()
    return seen


def test_both_sides_of_tls_accept_what_the_ca_signed(ca: pki.Pair, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(ca.pem)
    keys = pki.new_key(), pki.new_key()
    hosts = ("fl.example", "127.0.0.1")
    mine = pki.issue(
        ca, keys[0].public_key(), common_name="fl.example", hosts=hosts, days=5, client=False
    )
    yours = pki.issue(ca, pki.csr(keys[1], "x"), common_name="line-1", days=5, client=True)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tmp_path / "ca.pem")
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_cert_chain(*written(tmp_path, "server", mine, keys[0]))
    client = ssl.create_default_context(cafile=tmp_path / "ca.pem")
    # What Python asks from 3.13 on.
    for context in (server, client):
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    client.load_cert_chain(*written(tmp_path, "line-1", yours, keys[1]))
    for host in hosts:
        assert handshake(server, client, host)["subject"] == ((("commonName", "line-1"),),)


def test_of_a_request_only_the_key_counts(ca: pki.Pair) -> None:
    key = pki.new_key()
    pem = pki.issue(ca, pki.csr(key, "someone else"), common_name="line-1", days=5, client=True)
    made = x509.load_pem_x509_certificate(pem)
    assert made.subject.rfc4514_string() == "CN=line-1"
    assert made.public_key() == key.public_key()


def test_none_outlives_who_signed_it_and_all_start_early(ca: pki.Pair) -> None:
    made = issued(ca, days=500)
    assert made.not_valid_after_utc == ca.certificate.not_valid_after_utc
    now = datetime.datetime.now(datetime.UTC)
    assert made.not_valid_before_utc < now - datetime.timedelta(minutes=59)


def test_the_number_is_written_in_one_form(ca: pki.Pair) -> None:
    made = issued(ca)
    text = pki.serial(made)
    assert int(text, 16) == made.serial_number
    # nginx writes whole bytes.
    assert bare_serial(made.serial_number.to_bytes(20, "big").hex()) == text


def test_a_pair_reads_back_and_half_of_another_is_refused(ca: pki.Pair, tmp_path: Path) -> None:
    cert, key = (Path(p) for p in written(tmp_path, "ca", ca.pem, ca.key))
    assert pki.fingerprint(pki.Pair.read(cert, key).certificate) == pki.fingerprint(ca.certificate)
    key.write_bytes(pki.key_pem(pki.new_key()))
    with pytest.raises(ConfigError, match="is not the key of"):
        pki.Pair.read(cert, key)
    key.write_bytes(b"garbage")
    with pytest.raises(ConfigError, match="not a private key"):
        pki.Pair.read(cert, key)


def signed_by(key: object) -> bytes:
    name = x509.Name([])
    from cryptography.hazmat.primitives import hashes

    made = x509.CertificateSigningRequestBuilder().subject_name(name)
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_pem", "told"),
    [
        (b"", "not one in PEM"),
        (b"x" * 20_000, "20000 bytes"),
        (signed_by(ec.generate_private_key(ec.SECP384R1())), "another kind"),
        (signed_by(rsa.generate_private_key(65537, 2048)), "another kind"),
    ],
)
def test_a_request_of_another_kind_is_refused(request_pem: bytes, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        pki.read_csr(request_pem)


def test_a_request_whose_sender_lacks_the_key_is_refused() -> None:
    der = bytearray(
        x509.load_pem_x509_csr(pki.csr(pki.new_key(), "a")).public_bytes(serialization.Encoding.DER)
    )
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(ConfigError, match="signed by its own key"):
        pki.read_csr(forged)


@given(st.binary(max_size=300), st.integers(0, 400))
def test_damaged_requests_are_config_errors(junk: bytes, at: int) -> None:
    pem = pki.csr(pki.new_key(), "a")
    with pytest.raises(ConfigError):
        pki.read_csr(pem[:at] + b"\x00" + junk + pem[at + 1 :] if at < len(pem) - 30 else junk)


def test_a_node_key_is_what_flower_reads() -> None:
    private, line = pki.new_node_key()
    loaded = serialization.load_ssh_private_key(private, None)
    assert isinstance(loaded, ec.EllipticCurvePrivateKey)
    assert isinstance(loaded.curve, ec.SECP384R1)
    assert pki.read_node_key(f" {line} somebody@somewhere\n") == line
    assert pki.node_key_pem(line).startswith(b"-----BEGIN PUBLIC KEY")


@given(st.text(max_size=200))
def test_other_text_is_no_node_key(text: str) -> None:
    with pytest.raises(ConfigError, match="node's key"):
        pki.read_node_key(text)


def test_a_name_that_no_certificate_holds_is_refused(ca: pki.Pair) -> None:
    for changes in ({"hosts": ["検査.example"]}, {"common_name": "x" * 65}, {"common_name": ""}):
        with pytest.raises(ConfigError, match="no certificate can be made"):
            issued(ca, **changes)

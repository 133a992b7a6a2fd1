"""Make the certificates of a pilot: a CA, one for the encoder's port, one for each site that shows its own.

    python deploy/certificates.py --out pki --host encoder.example --site line-1 --site line-2

Writes `ca.pem`, `encoder.pem` and `encoder-key.pem`, and for each site `NAME.pem` and `NAME-key.pem`. Give the
encoder `encoder*.pem` and each site `ca.pem` and its own two files; `ca-key.pem` belongs on neither.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key = ec.EllipticCurvePrivateKey
CLOCK_SLACK = datetime.timedelta(hours=1)


def make_all(out: Path, *, hosts: list[str], sites: list[str], days: int = 825) -> None:
    """Write a fresh CA and the certificates it signs into `out`. Raises FileExistsError rather than overwrite."""
    out.mkdir(parents=True, exist_ok=True)
    if any(out.glob("*.pem")):
        raise FileExistsError(f"{out} already holds PEM files; choose another --out")
    life = datetime.timedelta(days=days)
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca = _certificate("fedsplit pilot CA", ca_key, life=life)
    _write(out / "ca.pem", ca.public_bytes(serialization.Encoding.PEM), secret=False)
    _write(out / "ca-key.pem", _pem(ca_key), secret=True)
    for name, alternatives in [("encoder", hosts), *((site, [site]) for site in sites)]:
        key = ec.generate_private_key(ec.SECP256R1())
        signed = _certificate(
            alternatives[0], key, life=life, issuer=(ca, ca_key), alternatives=alternatives
        )
        _write(out / f"{name}.pem", signed.public_bytes(serialization.Encoding.PEM), secret=False)
        _write(out / f"{name}-key.pem", _pem(key), secret=True)


def _certificate(
    name: str,
    key: Key,
    *,
    life: datetime.timedelta,
    issuer: tuple[x509.Certificate, Key] | None = None,
    alternatives: list[str] | None = None,
) -> x509.Certificate:
    """A certificate signed by `issuer`, or by itself when it is the CA."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SLACK)
        .not_valid_after(now + life)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if issuer and alternatives:
        usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        names = x509.SubjectAlternativeName([_general_name(a) for a in alternatives])
        builder = builder.add_extension(names, critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usage), critical=False)
    return builder.sign(issuer[1] if issuer else key, hashes.SHA256())


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _pem(key: Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write(path: Path, data: bytes, *, secret: bool) -> None:
    # The mode is a no-op on Windows, where the folder's own rights count.
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
    with os.fdopen(number, "wb") as file:
        file.write(data)


def main() -> None:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--host", action="append", required=True, help="name or IP that sites dial")
    parser.add_argument(
        "--site", action="append", default=[], help="a site's name, as in its node config"
    )
    parser.add_argument("--days", type=int, default=825, help="how long they are valid")
    args = parser.parse_args()
    try:
        make_all(args.out, hosts=args.host, sites=args.site, days=args.days)
    except (OSError, ValueError) as err:
        parser.exit(1, f"{err}\n")


if __name__ == "__main__":
    main()

"""Make the certificates of a pilot: a CA, one for the encoder's port, one for each site that shows its own.

    python deploy/certificates.py --out pki --host encoder.example --site line-1 --site line-2
    python deploy/certificates.py --out pki --site line-3        later: by the CA that is there

Writes `ca.pem`, `encoder.pem` and `encoder-key.pem`, and for each site `NAME.pem` and `NAME-key.pem`. Give the
encoder `encoder*.pem` and each site `ca.pem` and its own two files; `ca-key.pem` belongs on neither. A name that is not
plain ASCII stands in its certificate and its files as a digest; what is printed says which.
"""

from __future__ import annotations

import argparse
import datetime
import io
import ipaddress
import os
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsplit.core.foreign import printable
from fedsplit.core.names import certificate_name

Key = ec.EllipticCurvePrivateKey
CLOCK_SLACK = datetime.timedelta(hours=1)


def make_all(out: Path, *, hosts: list[str], sites: list[str], days: int = 825) -> dict[str, Path]:
    """Write what is wanted into `out`, all or nothing: name -> certificate.

    A CA that is there signs; else one is made, and then `hosts` are wanted. Raises FileExistsError rather than
    overwrite, ValueError for names and files that cannot be used.
    """
    if not hosts and not sites:
        raise ValueError("nothing to make; give --host for the encoder, --site for each site")
    issuer, files = _issuer(out, days)
    if files and not hosts:
        raise ValueError(f"{out} has no CA yet; give --host, the name or IP that sites dial")
    wanted = {"encoder": hosts} if hosts else {}
    named = {site: certificate_name(site) for site in sites}
    names = [*wanted, *named.values()]
    # Some disks know no capitals, and NAME-key.pem is a name's key.
    taken = {f"{n}{end}".lower() for n in ("ca", "encoder") for end in ("", "-key")}
    for name in named.values():
        mine = {name.lower(), f"{name}-key".lower()}
        if taken & mine:
            raise ValueError(f"site {name!r} would have the files of another one; rename it")
        taken |= mine
    for name in names:
        key = ec.generate_private_key(ec.SECP256R1())
        signed = _certificate(
            wanted.get(name, [name])[0],
            key,
            days=days,
            issuer=issuer,
            alternatives=wanted.get(name, [name]),
        )
        files |= _pair(out / name, signed, key)
    _write_all(out, files)
    return {
        who: out / f"{name}.pem" for who, name in (dict.fromkeys(wanted, "encoder") | named).items()
    }


def _issuer(out: Path, days: int) -> tuple[tuple[x509.Certificate, Key], dict[Path, bytes]]:
    """The CA in `out`, or a new one with its files. Raises ValueError for half a CA."""
    paths = (out / "ca.pem", out / "ca-key.pem")
    if not any(path.exists() for path in paths):
        key = ec.generate_private_key(ec.SECP256R1())
        made = _certificate("fedsplit pilot CA", key, days=days)
        return (made, key), _pair(out / "ca", made, key)
    if not all(path.exists() for path in paths):
        raise ValueError(f"{out} holds one of ca.pem and ca-key.pem; both are wanted to sign more")
    ca = x509.load_pem_x509_certificate(paths[0].read_bytes())
    loaded = serialization.load_pem_private_key(paths[1].read_bytes(), password=None)
    if not isinstance(loaded, Key) or loaded.public_key() != ca.public_key():
        raise ValueError(f"{paths[1]} is not the key of {paths[0]}; restore both")
    if ca.not_valid_after_utc <= datetime.datetime.now(datetime.UTC):
        raise ValueError(
            f"{paths[0]} ended on {ca.not_valid_after_utc:%Y-%m-%d}; make a new CA elsewhere"
        )
    return (ca, loaded), {}


def _pair(path: Path, certificate: x509.Certificate, key: Key) -> dict[Path, bytes]:
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    return {
        path.with_name(f"{path.name}.pem"): pem,
        path.with_name(f"{path.name}-key.pem"): _pem(key),
    }


def _certificate(
    name: str,
    key: Key,
    *,
    days: int,
    issuer: tuple[x509.Certificate, Key] | None = None,
    alternatives: list[str] | None = None,
) -> x509.Certificate:
    """A certificate signed by `issuer`, or by itself when it is the CA."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    if issuer:
        # None outlives who signed it.
        end = min(end, issuer[0].not_valid_after_utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SLACK)
        .not_valid_after(end)
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


def _write_all(out: Path, files: dict[Path, bytes]) -> None:
    """Write new files, or none of them."""
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    if there := sorted(path.name for path in files if path.exists()):
        raise FileExistsError(f"{out} already holds {', '.join(there)}; nothing was written")
    written: list[Path] = []
    try:
        for path, data in files.items():
            # The mode is a no-op on Windows, where the folder's own rights count.
            mode = 0o600 if path.stem.endswith("-key") else 0o644
            number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            written.append(path)
            with os.fdopen(number, "wb") as file:
                file.write(data)
    except OSError:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def main() -> None:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument(
        "--host",
        action="append",
        default=[],
        help="a name or IP that sites dial; wanted the first time, for the encoder's certificate",
    )
    parser.add_argument(
        "--site", action="append", default=[], help="a site's name, as in its node config"
    )
    parser.add_argument("--days", type=int, default=825, help="how long they are valid")
    args = parser.parse_args()
    try:
        made = make_all(args.out, hosts=args.host, sites=args.site, days=args.days)
    except (OSError, ValueError) as err:
        parser.exit(1, f"{err}\n")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    for name, path in made.items():
        print(f"{printable(name)}: {path}")


if __name__ == "__main__":
    main()

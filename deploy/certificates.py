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
import os
import sys
from pathlib import Path

from fedsplit.core.errors import ConfigError
from fedsplit.core.foreign import printable
from fedsplit.core.names import certificate_name
from fedsplit.plant import pki


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
        key = pki.new_key()
        made = pki.issue(
            issuer,
            key.public_key(),
            common_name=wanted.get(name, [name])[0],
            hosts=wanted.get(name, ()),
            days=days,
            client=name not in wanted,
        )
        files |= _files(out / name, made, key)
    _write_all(out, files)
    return {
        who: out / f"{name}.pem" for who, name in (dict.fromkeys(wanted, "encoder") | named).items()
    }


def _issuer(out: Path, days: int) -> tuple[pki.Pair, dict[Path, bytes]]:
    """The CA in `out`, or a new one with its files. Raises ValueError for half a CA, ConfigError for two halves."""
    paths = (out / "ca.pem", out / "ca-key.pem")
    if not any(path.exists() for path in paths):
        made = pki.make_ca("fedsplit pilot CA", days=days)
        return made, _files(out / "ca", made.pem, made.key)
    if not all(path.exists() for path in paths):
        raise ValueError(f"{out} holds one of ca.pem and ca-key.pem; both are wanted to sign more")
    ca = pki.Pair.read(*paths)
    if ca.certificate.not_valid_after_utc <= datetime.datetime.now(datetime.UTC):
        raise ValueError(
            f"{paths[0]} ended on {ca.certificate.not_valid_after_utc:%Y-%m-%d}; make a new CA elsewhere"
        )
    return ca, {}


def _files(path: Path, certificate: bytes, key: pki.Key) -> dict[Path, bytes]:
    return {
        path.with_name(f"{path.name}.pem"): certificate,
        path.with_name(f"{path.name}-key.pem"): pki.key_pem(key),
    }


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
    except (OSError, ValueError, ConfigError) as err:
        parser.exit(1, f"{err}\n")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    for name, path in made.items():
        print(f"{printable(name)}: {path}")


if __name__ == "__main__":
    main()

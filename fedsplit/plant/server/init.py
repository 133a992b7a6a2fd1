"""Makes a federation folder: CA, the server's certificate, secrets, one commented federation.toml. All of it, or nothing.

It is made in a folder within, and moved into its place when it is whole, federation.toml last: what holds that file is
a federation folder. So an empty folder that is a mounted volume will do as well.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedsplit.core.errors import ConfigError, ServiceError
from fedsplit.core.foreign import printable
from fedsplit.plant import pki
from fedsplit.plant.server.folder import SETTINGS, FederationFolder

CA_DAYS = 7300
"""Twenty years: with the CA every site's certificate ends, and no machine of a plant should see that."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PART = ".init.part"
# What a new disk or a volume has of its own.
_NOT_OURS = {"lost+found", _PART}
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?")
_BUNDLED = "vit-glyphs"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the new folder is for. Paths are absolute."""

    host: str
    port: int = 8443
    bind: str = ""
    backbone: str = _BUNDLED
    site_days: int = 30
    server_days: int = 397
    code_hours: float = 24.0
    proxy: str = "nginx"
    certificate: str = ""
    certificate_key: str = ""
    ca: Path | None = None
    ca_key: Path | None = None


def make_folder(path: Path, wanted: Wanted) -> FederationFolder:
    """Make the folder. Raises ConfigError for what was asked, ServiceError for a disk that is full or read-only."""
    path = path.expanduser().resolve()
    checked_host(wanted.host)
    ca = _ca(wanted)
    _check_free(path)
    try:
        with _made_folder(path), _part_of(path) as part:
            _fill(FederationFolder(part), wanted, ca)
            # What was written can be read, before anybody relies on it.
            _ = FederationFolder(part).settings
    except OSError as err:
        raise ServiceError(
            f"no federation folder was made at {printable(path)}: {err.strerror or err}; give a place that you may "
            "write, on a disk with room"
        ) from err
    return FederationFolder.at(path)


def server_certificate(ca: pki.Pair, host: str, *, days: int) -> tuple[bytes, bytes]:
    """A certificate for the public host and this machine's loopback, the CA behind it; and its key. PEM both."""
    key = pki.new_key()
    hosts = list(dict.fromkeys([host, *LOOPBACK]))
    leaf = pki.issue(ca, key.public_key(), common_name=host, hosts=hosts, days=days, client=False)
    return leaf + ca.pem, pki.key_pem(key)


def checked_host(host: str) -> str:
    """`host` itself, where it is a name or an address that sites can dial. Raises ConfigError."""
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_unspecified:
            raise ConfigError(
                f"no site can dial {host}; give --host the name or the address under which sites find this machine, and "
                "--bind the address to listen on"
            )
        return host
    labels = host.rstrip(".").split(".")
    digits = labels[-1].isdigit()
    if len(host) <= 253 and not digits and all(_LABEL.fullmatch(label) for label in labels):
        return host
    hint = "a name such as server.factory.example, or an address such as 192.168.1.10"
    if "://" in host or "/" in host:
        hint = f"only the name in it: {hint}"
    elif ":" in host:
        hint = f"{hint}; the port goes behind --port"
    elif not host.isascii():
        with contextlib.suppress(UnicodeError):
            hint = f"in ASCII, as DNS knows it: {host.encode('idna').decode('ascii')}"
    raise ConfigError(f"{printable(host, limit=80)!r} is no host name; --host wants {hint}")


def write_secret(path: Path, text: str | bytes) -> None:
    """Write a file that only its owner may read."""
    data = text.encode("ascii") if isinstance(text, str) else text
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(number, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _fill(folder: FederationFolder, wanted: Wanted, ca: pki.Pair) -> None:
    for place in (
        folder.ca.parent,
        folder.loopback_certificate.parent,
        folder.encoder_secret.parent,
        folder.flower_home,
        folder.runs,
        folder.logs,
        folder.present,
    ):
        place.mkdir(mode=0o700)
    folder.ca.write_bytes(ca.pem)
    write_secret(folder.ca_key, ca.key_pem)
    certificate, key = server_certificate(ca, wanted.host, days=wanted.server_days)
    folder.loopback_certificate.write_bytes(certificate)
    write_secret(folder.loopback_certificate_key, key)
    for secret in (folder.encoder_secret, folder.superexec_secret, folder.proxy_secret):
        # Flower takes every byte of its file as the secret: no line end.
        write_secret(secret, secrets.token_hex(32))
    write_secret(folder.page_password, secrets.token_urlsafe(15))
    (folder.path / SETTINGS).write_text(settings_text(wanted), encoding="utf-8")


def _ca(wanted: Wanted) -> pki.Pair:
    if wanted.ca is None or wanted.ca_key is None:
        return pki.make_ca(f"fedsplit {wanted.host}"[:64], days=CA_DAYS)
    try:
        pair = pki.Pair.read(wanted.ca, wanted.ca_key)
    except OSError as err:
        raise ConfigError(
            f"the CA cannot be read: {printable(err.filename)}: {err.strerror}"
        ) from err
    if not pki.may_sign(pair.certificate):
        raise ConfigError(
            f"{printable(wanted.ca)} is not the certificate of a CA; sites' certificates are signed with it"
        )
    return pair


def _check_free(path: Path) -> None:
    if (path / SETTINGS).exists():
        raise ConfigError(
            f"{printable(path)} is a federation folder already; start it with `fedsplit server up {printable(path)}`, or "
            "give another folder"
        )
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{printable(path)} is a file; give a folder that is new or empty")
    try:
        found = sorted({p.name for p in path.iterdir()} - _NOT_OURS) if path.exists() else []
    except OSError as err:
        raise ConfigError(f"{printable(path)} cannot be looked into: {err.strerror}") from err
    if found:
        raise ConfigError(
            f"{printable(path)} is not empty: it holds {printable(found[0])!r}"
            + (f" and {len(found) - 1} more" if found[1:] else "")
            + "; give a folder that is new or empty"
        )


@contextlib.contextmanager
def _made_folder(path: Path) -> Iterator[None]:
    """The folder and those above it, which are gone again after an error where they were not there before."""
    new = [p for p in (path, *path.parents) if not p.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        yield
    except BaseException:
        for one in new:
            with contextlib.suppress(OSError):
                one.rmdir()
        raise


@contextlib.contextmanager
def _part_of(path: Path) -> Iterator[Path]:
    """A folder within, whose contents become those of `path` at the end, or are gone after an error."""
    part = path / _PART
    shutil.rmtree(part, ignore_errors=True)
    moved: list[Path] = []
    try:
        part.mkdir(mode=0o700)
        yield part
        for made in sorted(part.iterdir(), key=lambda p: p.name == SETTINGS):
            moved.append(path / made.name)
            made.rename(moved[-1])
        part.rmdir()
    except BaseException:
        for one in (*moved, part):
            shutil.rmtree(one, ignore_errors=True)
            if one.is_file():
                one.unlink()
        raise


def settings_text(wanted: Wanted) -> str:
    """federation.toml: every key, what it is for, and its value."""
    values = {
        key: json.dumps(value, ensure_ascii=False)
        for key, value in vars(wanted).items()
        if not isinstance(value, Path)
    }
    return _TEMPLATE.format_map(values)


_TEMPLATE = """\
# The settings of this federation. `fedsplit server up` reads them when it starts: change them, then start it again.
# docs/reference/federation-folder.md describes every key.
format = 1

[server]
# The name or address under which sites find this machine. It stands in the server's certificate and in join codes.
host = {host}
# The one port that sites dial. Below 1024 an ordinary user needs a permission of the system.
port = {port}
# The address to listen on. "" is every address of this machine.
bind = {bind}

[backbone]
# The frozen backbone: a folder in Hugging Face format, or "vit-glyphs", the small one that comes with fedsplit.
path = {backbone}
# Blocks "a,b" whose weights no site may fetch, e.g. "2,10". "" is none.
private-blocks = ""

[certificates]
# Days that a site's certificate is valid. It renews itself when a third of them is left.
site-days = {site_days}
# Hours that a join code is valid.
code-hours = {code_hours}
# Days that the server's own certificate is valid. The server renews it.
server-days = {server_days}

[proxy]
# "nginx": `fedsplit server up` runs nginx at the public port. "own": you run a proxy; `fedsplit server nginx-conf` prints a sample.
mode = {proxy}
# The nginx program. "" is the one on PATH or in /usr/sbin.
nginx = ""

[tls]
# A certificate of your own PKI for the public port, with the certificates of its CAs behind it. "" is the federation's.
certificate = {certificate}
# Its key.
key = {certificate_key}

[page]
# The status page also at https://HOST:PORT/status/, with the login in secrets/page.password. false: this machine alone.
public = false

[inference]
# May sites that hold only a part of the backbone predict with the encoder here?
enabled = true
# Minutes that a site's grant to predict is valid. The site asks for the next one by itself.
minutes = 60
# Inputs of one grant.
rows = 100000
# Inputs of a site a minute. Who asks faster waits.
rows-per-minute = 6000
# Grants of a site in an hour.
grants-per-hour = 30

[promotion]
# Before `fedsplit module promote` puts a version into production it is measured on each site's own test samples. false: it is not.
require = true
# Points of accuracy that a site may lose against the version in production. For numbers: hundredths of R2.
max-loss-points = 1.0
# Test samples that each site has to have.
min-samples = 5
# Where a site has fewer, or where one does not answer: "refuse" or "accept".
when-few = "refuse"
when-away = "refuse"

[retention]
# Run folders that are kept. The oldest go first.
runs = 50
# Megabytes of logs of each service.
log-mb = 20
# Megabytes of the audit log.
audit-mb = 100

[run]
# Settings of every run here, unless it is started with others. docs/reference/config.md lists them.
# task = "inspection"
# rounds = 10
# min-sites = 2
"""

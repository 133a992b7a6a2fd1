"""The nginx program: found, its version known, its configuration written and checked, its command line.

nginx_conf.py says what stands in the configuration. Everything that nginx writes lies in run/ of the federation folder, so
that it works for root and for an ordinary user, beside an nginx of the system.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import secrets
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from fedsplit.core.errors import ConfigError
from fedsplit.core.foreign import printable
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.nginx_conf import Ports, render
from fedsplit.transport.keys import read_proxy_secret

OLDEST = (1, 18, 0)
PAGE_USER = "fedsplit"
"""The login of the status page, where it is public."""
_MODULES = ("http_ssl_module", "http_v2_module", "http_auth_request_module")
# In every nginx that was not built without them, as Debian 11's nginx-light was.
_USUAL = tuple(
    f"http_{name}_module"
    for name in ("map", "proxy", "grpc", "limit_req", "limit_conn", "rewrite", "auth_basic")
)
_PLACES = "/usr/sbin:/usr/local/sbin:/usr/local/nginx/sbin:/opt/homebrew/bin"
_INSTALL = 'install it (Debian, Ubuntu, Raspberry Pi OS: `apt install nginx`), name it in federation.toml ([proxy] nginx), or run a proxy of your own ([proxy] mode = "own")'
_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Nginx:
    """An nginx that is new enough and has what is needed."""

    program: str
    version: tuple[int, int, int]
    without: frozenset[str]
    """Modules that it was built without."""

    def command(self, conf: Path) -> list[str]:
        """Run it in the foreground with this configuration; SIGTERM ends it, SIGHUP reads the configuration again."""
        home = home_of(conf)
        early = ["-e", "stderr"] if self.version >= (1, 19, 5) else []
        return [self.program, "-p", f"{home}/", *early, "-c", str(conf)]

    def check(self, conf: Path) -> None:
        """Let nginx read the configuration. Raises ConfigError with nginx's own words."""
        done = _run([*self.command(conf), "-t"])
        if done.returncode:
            said = printable(_told(done.stderr), limit=2000)
            raise ConfigError(
                f"nginx refuses the configuration {conf}: {said}. Change federation.toml, from which it is made"
            )


def find(program: str = "") -> Nginx:
    """The nginx at `program`, or the one on PATH or in the usual places. Raises ConfigError: none, too old, lacking."""
    path = os.pathsep.join((os.environ.get("PATH", ""), _PLACES))
    found = shutil.which(program or "nginx", path=path)
    if found is None:
        where = f"at {program}" if program else "on PATH nor in /usr/sbin"
        raise ConfigError(f"there is no nginx {where}: {_INSTALL}")
    done = _run([found, "-V"])
    said = done.stderr + done.stdout
    number = version(said)
    if number < OLDEST:
        raise ConfigError(
            f"{found} is nginx {_dotted(number)}, which is too old: {_dotted(OLDEST)} or newer is wanted; {_INSTALL}"
        )
    without = frozenset(re.findall(r"--without-(\w+)", said))
    missing = [m for m in _MODULES if f"--with-{m}" not in said]
    if missing := missing + [m for m in _USUAL if m in without]:
        raise ConfigError(
            f"{found} was built without {', '.join(missing)}; another package of nginx has them: {_INSTALL}"
        )
    return Nginx(found, number, without)


def version(text: str) -> tuple[int, int, int]:
    """The version in what `nginx -v` or `-V` prints. Raises ConfigError where there is none."""
    match = re.search(r"nginx version: [\w.-]+/(\d{1,4})\.(\d{1,4})\.(\d{1,4})", text)
    if match is None:
        raise ConfigError(
            f"`nginx -v` printed {printable(text, limit=200)!r}, no version of nginx; {_INSTALL}"
        )
    return int(match[1]), int(match[2]), int(match[3])


def prepare(folder: FederationFolder, ports: Ports) -> list[str]:
    """Write the configuration and what it names, check it, and return the command that runs it. Raises ConfigError."""
    nginx = find(folder.settings.proxy.nginx)
    conf = folder.nginx_conf
    home = home_of(conf)
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    _to_owner(home, folder.path)
    secret = read_proxy_secret(folder.proxy_secret).decode()
    text = render(folder, ports, secret=secret, version=nginx.version, without=nginx.without)
    # The secret stands in it.
    _write_private(conf, text)
    if folder.settings.page.public:
        _write_login(home / "page.login", folder.page_password)
    nginx.check(conf)
    return nginx.command(conf)


def home_of(conf: Path) -> Path:
    """Where nginx writes: temporary files, the process number."""
    return conf.parent / "nginx"


def _write_login(path: Path, password_file: Path) -> None:
    try:
        password = password_file.read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            f"the status page's password {password_file} cannot be read ({error.strerror}); write one into it, or set "
            "[page] public = false in federation.toml"
        ) from error
    salt = secrets.token_bytes(8)
    digest = base64.b64encode(hashlib.sha1(password + salt, usedforsecurity=False).digest() + salt)
    _write_private(path, f"{PAGE_USER}:{{SSHA}}{digest.decode()}\n")


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, whole or not at all. As root it belongs to the folder's owner."""
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    number = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(number, "w", encoding="utf-8") as file:
        file.write(text)
    _to_owner(fresh, path.parent)
    fresh.replace(path)


def _to_owner(path: Path, of: Path) -> None:
    """As root: what root makes belongs to the folder's owner, as whom nginx's workers run."""
    if os.geteuid() == 0:
        owner = of.stat()
        os.chown(path, owner.st_uid, owner.st_gid)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"`{' '.join(command)}` cannot be run: {error}; {_INSTALL}") from error


def _told(stderr: str) -> str:
    """nginx's complaints without its prefixes; the first is the cause."""
    lines = re.findall(r"\[(?:emerg|alert|crit|error)\] (?:\d+#\d+: )?(.*)", stderr)
    return "; ".join(lines) or stderr.strip()


def _dotted(number: tuple[int, int, int]) -> str:
    return ".".join(map(str, number))

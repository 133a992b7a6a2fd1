"""Makes a folder's supervisor a service of systemd: account, unit, start at boot. The text of the units is units.py's.

As root for the whole machine, under an account of its own; else for the person alone (`systemctl --user`). All that can
be known before is checked before, and a unit that does not start is taken away again.
"""

from __future__ import annotations

import getpass
import os
import pwd
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fedsplit.core.errors import ConfigError, ServiceError
from fedsplit.core.foreign import printable
from fedsplit.plant.units import Kind, Place, server_unit, site_unit

ACCOUNT = "fedsplit"
"""The account of services that root installs, made where it is not there."""
_MACHINE_UNITS = Path("/etc/systemd/system")
_BOOTED = Path("/run/systemd/system")
_TIMEOUT_S = 630.0
"""systemd itself gives up after TimeoutStartSec."""
Say = Callable[[str], None]


def install(kind: Kind, folder: Path, *, reads: Sequence[Path] = (), port: int = 0, name: str = "", say: Say) -> str:  # fmt: skip
    """Write, enable and start the service of `folder`; returns the unit's name.

    `reads` are folders elsewhere that it must read, `port` a server's public one, `name` another unit name than
    fedsplit-server or fedsplit-site. Raises ConfigError before anything is changed, ServiceError when it does not start.
    """
    everywhere = os.geteuid() == 0
    unit = f"{name or f'fedsplit-{kind}'}.service"
    target = _folder_of_units(everywhere=everywhere) / unit
    _check_systemd(f"fedsplit {kind} {'up' if kind == 'server' else 'run'} {folder}")
    _check_name(target, folder)
    place = Place(folder=folder, reads=tuple(reads))
    if everywhere:
        place = replace(place, user=_account(folder, say))
        _check_access(place)
        _hand_over(place, say)
    text = server_unit(place, port=port) if kind == "server" else site_unit(place)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    try:
        _systemctl(everywhere, "daemon-reload")
        _systemctl(everywhere, "enable", unit)
        # Not `--now`: one that runs already would go on as it was before an upgrade.
        _systemctl(everywhere, "restart", unit)
    except ServiceError:
        remove(unit, everywhere=everywhere)
        raise
    if not everywhere:
        _linger(say)
    say(f"{unit} runs and starts with the machine; its unit is {target}")
    return unit


def remove(unit: str, *, everywhere: bool) -> bool:
    """Stop a service and take its unit away; whether there was one."""
    target = _folder_of_units(everywhere=everywhere) / unit
    if not target.exists():
        return False
    _systemctl(everywhere, "disable", "--now", unit, check=False)
    target.unlink(missing_ok=True)
    _systemctl(everywhere, "daemon-reload", check=False)
    return True


def has_systemd() -> bool:
    """Does systemd run this machine?"""
    return shutil.which("systemctl") is not None and _BOOTED.is_dir()


def _folder_of_units(*, everywhere: bool) -> Path:
    if everywhere:
        return _MACHINE_UNITS
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "systemd" / "user"


def _check_systemd(by_hand: str) -> None:
    if not has_systemd():
        raise ConfigError(
            "systemd does not run on this machine, so no service can be installed; have the service manager of this "
            f"machine run this command, and start it again when it ends: {by_hand}"
        )


def _check_name(target: Path, folder: Path) -> None:
    """A unit of that name may be there, if it is this folder's: then it is written anew."""
    if not target.exists():
        return
    # The last word of ExecStart and the working directory are the folder.
    lines = target.read_text(encoding="utf-8", errors="replace").splitlines()
    if f"WorkingDirectory={str(folder).replace('%', '%%')}" not in lines:
        raise ConfigError(
            f"{target} is the service of another folder; give this one another name with --name"
        )


def _account(folder: Path, say: Say) -> str:
    """The account that the service runs as: the folder's owner, but never root."""
    owner = folder.stat().st_uid
    if owner != 0:
        return pwd.getpwuid(owner).pw_name
    try:
        pwd.getpwnam(ACCOUNT)
    except KeyError:
        _do(["useradd", "--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin", ACCOUNT])  # fmt: skip
        say(f"made the account {ACCOUNT}, for fedsplit's services")
    return ACCOUNT


def _hand_over(place: Place, say: Say) -> None:
    """Give root's folder to the account that will write it."""
    if place.folder.stat().st_uid != 0:
        return
    account = pwd.getpwnam(place.user)
    for path in [place.folder, *place.folder.rglob("*")]:
        os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)
    say(f"{place.folder} belongs to the account {place.user} now")


def _check_access(place: Place) -> None:
    """See as that account that the program runs and what it reads can be read. Raises ConfigError."""
    account = pwd.getpwnam(place.user)
    groups = os.getgrouplist(place.user, account.pw_gid)
    wanted = [("run", "-x", place.program), ("enter", "-x", place.folder.parent)]
    wanted += [("read", "-r", path) for path in place.reads]
    for can, flag, path in wanted:
        done = subprocess.run(
            ["test", flag, str(path)],
            check=False,
            cwd="/",
            user=account.pw_uid,
            group=account.pw_gid,
            extra_groups=groups,
        )
        if done.returncode:
            raise ConfigError(
                f"the service's account {place.user!r} cannot {can} {printable(path)}; give it the right, and that to "
                f"enter every folder above, or give {printable(place.folder)} to an account that has them: chown -R ACCOUNT"
            )


def _linger(say: Say) -> None:
    """Have a person's services run while nobody is logged in."""
    user = getpass.getuser()
    done = subprocess.run(["loginctl", "enable-linger", user], check=False, capture_output=True)
    if done.returncode:
        say(f"it runs while {user} is logged in; to have it always, root runs: loginctl enable-linger {user}")  # fmt: skip


def _systemctl(everywhere: bool, *words: str, check: bool = True) -> None:
    _do(["systemctl", *([] if everywhere else ["--user"]), *words], check=check)


def _do(command: Sequence[str], *, check: bool = True) -> None:
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise ServiceError(f"{' '.join(command)} cannot be run: {printable(err)}") from err
    if check and done.returncode:
        said = printable(done.stderr or done.stdout, limit=600)
        raise ServiceError(
            f"{' '.join(command)} ended with exit code {done.returncode}: {said or 'it said nothing'}"
        )

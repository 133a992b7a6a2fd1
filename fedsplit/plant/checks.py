"""What `fedsplit doctor` finds: named checks with a level, and what to do about each that is not green.

The looks that servers and sites share are here; what is a server's or a site's alone stands in its own doctor.py.
A look reads and asks, and changes nothing.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import psutil

from fedsplit.core.errors import ConfigError, FedsplitError
from fedsplit.core.foreign import printable, read_json
from fedsplit.core.memory import available_bytes
from fedsplit.core.proxies import proxy_variable
from fedsplit.plant import pki
from fedsplit.plant.lock import up_pid

Level = Literal["green", "yellow", "red"]
MB = 1 << 20
LITTLE_DISK, NO_DISK = 1024 * MB, 100 * MB
LITTLE_MEMORY, NO_MEMORY = 700 * MB, 300 * MB
"""What a site's two processes take, and what is too little for their start."""
_ASK_S = 5.0
_RENEWS_AT = 1 / 3
"""A certificate renews itself when this share of its life is left; below half of that something keeps it from it."""
_LEVELS: tuple[Level, ...] = ("green", "yellow", "red")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    level: Level
    found: str
    do: str = ""
    """What to do; empty where nothing is to be done."""


Look = Callable[[], Check | Iterable[Check]]


def look_at(looks: Mapping[str, Look]) -> Iterator[Check]:
    """All checks, one after the other. A look that fails is a red check of its own, and the others go on."""
    for name, look in looks.items():
        try:
            found = look()
            yield from [found] if isinstance(found, Check) else found
        except FedsplitError as err:
            yield Check(name, "red", printable(err, limit=1000), "see what it says")
        except Exception as err:  # noqa: BLE001 - the outermost handler: what nobody foresaw must not hide the other checks
            yield Check(
                name,
                "red",
                f"it could not be looked at: {type(err).__name__}: {printable(err)}",
                "report this",
            )


def worst(checks: Iterable[Check]) -> Level:
    """The worst level of all."""
    return max((c.level for c in checks), key=_LEVELS.index, default="green")


def as_json(checks: Iterable[Check]) -> dict[str, Any]:
    """What `doctor --json` prints."""
    found = list(checks)
    return {"level": worst(found), "checks": [asdict(c) for c in found]}


def disk(folder: Path) -> Check:
    """Is there room below the folder, and may it be written?"""
    free = shutil.disk_usage(folder).free
    found = f"{free / MB:,.0f} MB free"
    if not os.access(folder, os.W_OK | os.X_OK):
        return Check(
            "disk",
            "red",
            f"{folder} cannot be written",
            "mount it writable, or run as the folder's owner",
        )
    if free < NO_DISK:
        return Check(
            "disk", "red", found, f"free at least {LITTLE_DISK // MB} MB on the disk of {folder}"
        )
    if free < LITTLE_DISK:
        return Check(
            "disk", "yellow", found, f"free at least {LITTLE_DISK // MB} MB on the disk of {folder}"
        )
    return Check("disk", "green", found)


def memory() -> Check:
    """Is there room for what runs here?"""
    free = available_bytes()
    found = f"{free / MB:,.0f} MB free of {psutil.virtual_memory().total / MB:,.0f} MB"
    if free >= LITTLE_MEMORY:
        return Check("memory", "green", found)
    level: Level = "red" if free < NO_MEMORY else "yellow"
    return Check(
        "memory",
        level,
        found,
        "end what else runs here, or use a cut that needs less (docs/explanation/placement.md)",
    )


def processor(flags: Callable[[], set[str]] | None = None) -> Check:
    """Can the CPU do what makes torch fast?"""
    machine = platform.machine().lower()
    found = f"{machine}, {psutil.cpu_count(logical=False) or '?'} cores"
    known = (flags or _flags)()
    if machine in ("x86_64", "amd64") and known and "avx2" not in known:
        return Check(
            "processor",
            "yellow",
            f"{found}, no AVX2",
            "it works, several times slower than a newer CPU",
        )
    if machine in ("armv6l", "armv7l", "i386", "i686"):
        return Check(
            "processor", "red", found, "install a 64-bit system: torch has no build for 32 bits"
        )
    return Check("processor", "green", found)


def clock(program: str | None = None) -> Check:
    """Does something keep this machine's clock right? As systemd knows it; others are not asked."""
    program = program or shutil.which("timedatectl")
    said = ""
    if program is not None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            asked = [program, "show", "--property=NTPSynchronized", "--value"]
            done = subprocess.run(
                asked, capture_output=True, text=True, timeout=_ASK_S, check=False
            )
            said = done.stdout.strip() if done.returncode == 0 else ""
    found = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    if said == "no":
        return Check(
            "clock", "yellow", f"{found}, and no NTP keeps it",
            "timedatectl set-ntp true, or the plant's own NTP server: sites that are 5 s ahead of this machine are refused",
        )  # fmt: skip
    return Check(
        "clock",
        "green",
        f"{found}, kept by NTP" if said == "yes" else f"{found}; who keeps it is not known here",
    )


def proxies(address: str, env: Mapping[str, str] = os.environ) -> Check:
    """Would a proxy variable catch what goes to HOST:PORT?"""
    variable = proxy_variable(address, env)
    if not variable:
        return Check("proxy", "green", "no proxy variable stands in the way")
    host = address.rpartition(":")[0]
    return Check(
        "proxy", "yellow", f"{variable} is set and catches {address}",
        f"if the server is not reached, put {host} into no_proxy where the service runs",
    )  # fmt: skip


def certificate(name: str, path: Path, key: Path, ca: Path | None, *, cure: str) -> Check:
    """Do certificate, key and CA belong together, and how long are they good? `cure` makes new ones."""
    try:
        pair = pki.Pair.read(path, key)
        issuer = pki.read_certificate(ca.read_bytes(), what=str(ca)) if ca else None
    except OSError as err:
        return Check(name, "red", f"{err.filename} cannot be read: {err.strerror}", cure)
    except ConfigError as err:
        return Check(name, "red", str(err), cure)
    made = pair.certificate
    if issuer is not None:
        try:
            made.verify_directly_issued_by(issuer)
        except (ValueError, TypeError):
            return Check(name, "red", f"{path} was not signed by {ca}", cure)
    left = share_left(made.not_valid_before_utc, made.not_valid_after_utc)
    found = f"good until {made.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    if left <= 0:
        return Check(name, "red", f"over since {made.not_valid_after_utc:%Y-%m-%d %H:%M} UTC", cure)
    if left > 1:
        return Check(
            name,
            "red",
            f"not good before {made.not_valid_before_utc:%Y-%m-%d %H:%M} UTC",
            "set the clock right",
        )
    if left < _RENEWS_AT / 2:
        return Check(name, "yellow", f"{found}, and it has not renewed itself", cure)
    return Check(name, "green", found)


def share_left(begins: datetime, ends: datetime) -> float:
    """The share of its life that is left: 1 at its beginning, 0 at its end."""
    return (ends - datetime.now(UTC)) / (ends - begins)


def private(paths: Iterable[Path]) -> Check:
    """May only their owner read these files?"""
    if os.name == "nt":
        return Check("secrets", "green", "Windows: the folder's own rights count")
    missing, open_ = [], []
    for path in paths:
        try:
            mode = path.stat().st_mode
        except OSError:
            missing.append(path)
        else:
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                open_.append(path)
    if missing:
        return Check(
            "secrets", "red", f"missing: {_listed(missing)}", "restore them from the backup"
        )
    if open_:
        return Check(
            "secrets", "red", f"others may read {_listed(open_)}", f"chmod 600 {_listed(open_)}"
        )
    return Check("secrets", "green", "only their owner may read them")


def services(state_file: Path, names: Iterable[str], *, start: str, logs: Path) -> Iterator[Check]:
    """How the supervised programs are; `start` is the command that starts them."""
    try:
        pid = up_pid(state_file)
        found = dict(read_json(state_file, limit=MB)["services"]) if pid else {}
    except (OSError, ValueError, KeyError, TypeError) as err:
        yield Check(
            "services",
            "red",
            f"{state_file} cannot be read: {printable(err)}",
            f"stop them, then {start}",
        )
        return
    if pid is None:
        yield Check("services", "yellow", "not running", start)
        return
    yield Check("services", "green", f"process {pid} keeps them up")
    for name in names:
        yield _service(name, found.get(name), logs)


def _service(name: str, one: Any, logs: Path) -> Check:
    if not isinstance(one, dict):
        return Check(name, "red", "it is not among the services", "stop and start them again")
    restarts = one.get("restarts", 0)
    last = one.get("last_exit") if isinstance(one.get("last_exit"), dict) else {}
    why = (
        f"; last: it {printable(last.get('why', '?'))} at {printable(last.get('at', '?'))}"
        if last
        else ""
    )
    found = f"{printable(one.get('state'))}, started again {restarts} times{why}"
    log = f"look into {logs / f'{name}.jsonl'}"
    if one.get("state") != "up":
        return Check(name, "red", found, log)
    return Check(
        name,
        "yellow" if restarts else "green",
        found if restarts else "up",
        log if restarts else "",
    )


def _listed(paths: list[Path]) -> str:
    return ", ".join(map(str, paths))


def _flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    line = next((li for li in text.splitlines() if li.startswith("flags")), "")
    return set(line.partition(":")[2].split())

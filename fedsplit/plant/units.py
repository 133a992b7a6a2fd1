"""Text of the systemd units of a server, a site and a nightly run. install.py writes them; deploy/systemd/ has examples.

A unit of the whole machine runs as a user of its own, who can write the folder and nothing else. A unit of one person
(`systemctl --user`) has what systemd can do without root. MemoryMax is left to the person: it depends on the machine.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from fedsplit.core.errors import ConfigError
from fedsplit.core.foreign import printable

Kind = Literal["server", "site"]
WATCHDOG_S = 120
"""The supervisor speaks a few times within it; a slow card may hold it up for long."""
NIGHTLY = "*-*-* 01:30:00"
_HOMES = ("/home", "/root", "/run/user")
_TEMPORARY = ("/tmp", "/var/tmp")
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}
# Works for everybody: seccomp filters, once there are no new privileges.
_FOR_ALL = (
    "UMask=0077",
    "NoNewPrivileges=yes",
    "LockPersonality=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "RestrictNamespaces=yes",
    # AF_NETLINK: the C library and psutil ask the kernel for addresses by it.
    "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK",
    "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service",
    "SystemCallFilter=~@privileged",
    "SystemCallErrorNumber=EPERM",
)
# Needs root, so for units of the whole machine. No MemoryDenyWriteExecute: torch writes machine code while it runs.
_FOR_MACHINES = (
    "ProtectSystem=strict",
    "PrivateDevices=yes",
    "ProtectKernelTunables=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelLogs=yes",
    "ProtectControlGroups=yes",
    "ProtectClock=yes",
    "ProtectHostname=yes",
    "ProtectProc=invisible",
    "KeyringMode=private",
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a unit is for: the folder, and the fedsplit that runs it."""

    folder: Path
    program: Path = Path(sysconfig.get_path("scripts")) / "fedsplit"
    prefix: Path = Path(sys.prefix)
    """Where that fedsplit is installed."""
    reads: tuple[Path, ...] = ()
    """Folders elsewhere that it must see, e.g. a site's data."""
    user: str = ""
    """The account of a machine's unit; empty: a unit of the person who installs it."""

    def below(self, places: Iterable[str]) -> bool:
        """Whether anything that is needed lies below one of `places`."""
        needed = (self.folder, self.program, self.prefix, *self.reads)
        return any(PurePosixPath(path).is_relative_to(p) for path in needed for p in places)


def server_unit(place: Place, *, port: int) -> str:
    """`fedsplit server up` as a service. `port` is the public one: below 1024 it needs a capability."""
    privileged = "CAP_NET_BIND_SERVICE" if 0 < port < 1024 else ""
    more = [f"Environment={_quoted(f'MPLCONFIGDIR={place.folder}/run/matplotlib')}"]
    return _unit(
        "fedsplit server", place, ["server", "up"], restart_s=5, capability=privileged, more=more
    )


def site_unit(place: Place) -> str:
    """`fedsplit site run` as a service."""
    # A site that is no member any more (exit code 4) stays down: a person has to decide.
    more = ["RestartPreventExitStatus=4"]
    return _unit("fedsplit site", place, ["site", "run"], restart_s=30, more=more)


def nightly_unit(place: Place, settings: Sequence[str] = ()) -> str:
    """One run from the last good module; `settings` are KEY=VALUE. A line of JSON a night is added to logs/nightly.jsonl."""
    given = [word for setting in settings for word in ("--set", setting)]
    words = ["run", "--federation", str(place.folder), "--from-last", "--json", *given]
    return _joined(
        [
            "[Unit]",
            f"Description=fedsplit run ({_plain(place.folder)})",
            "After=network-online.target",
            "",
            "[Service]",
            "Type=oneshot",
            *_runs(place, words),
            f"StandardOutput=append:{_plain(place.folder)}/logs/nightly.jsonl",
            f"Environment={_quoted(f'MPLCONFIGDIR={place.folder}/run/matplotlib')}",
            *_hardening(place),
        ]
    )


def timer(when: str = NIGHTLY) -> str:
    """Starts the unit of the same name at a systemd calendar time; a night that the machine was off is made up for."""
    return _joined(
        [
            "[Unit]",
            "Description=a nightly run of fedsplit",
            "",
            "[Timer]",
            f"OnCalendar={when}",
            "Persistent=true",
            "",
            "[Install]",
            "WantedBy=timers.target",
        ]
    )


def _unit(
    what: str,
    place: Place,
    words: list[str],
    *,
    restart_s: int,
    capability: str = "",
    more: Sequence[str] = (),
) -> str:
    return _joined(
        [
            "[Unit]",
            f"Description={what} ({_plain(place.folder)})",
            # The network may come late, and a machine that waits for it for ever helps nobody.
            "Wants=network-online.target",
            "After=network-online.target",
            # For years: it is tried again for as long as the machine is on.
            "StartLimitIntervalSec=0",
            "",
            "[Service]",
            "Type=notify",
            "NotifyAccess=main",
            *_runs(place, [*words, str(place.folder)]),
            f"WatchdogSec={WATCHDOG_S}",
            "TimeoutStartSec=600",
            "TimeoutStopSec=20",
            "KillMode=mixed",
            "Restart=always",
            f"RestartSec={restart_s}",
            "# MemoryMax=2G",
            *more,
            *_hardening(place, capability),
            "",
            "[Install]",
            f"WantedBy={'multi-user.target' if place.user else 'default.target'}",
        ]
    )


def _runs(place: Place, words: Sequence[str]) -> list[str]:
    command = " ".join(_quoted(word, command=True) for word in [str(place.program), *words])
    return [
        f"ExecStart={command}",
        f"WorkingDirectory={_plain(place.folder)}",
        *([f"User={place.user}"] if place.user else []),
        *(f"Environment={key}={value}" for key, value in _QUIET.items()),
    ]


def _hardening(place: Place, capability: str = "") -> list[str]:
    lines = list(_FOR_ALL)
    if not place.user:
        return lines
    return [
        *lines,
        *_FOR_MACHINES,
        f"ReadWritePaths={_quoted(str(place.folder))}",
        # What lies below them must be seen; it cannot be written all the same.
        f"ProtectHome={'read-only' if place.below(_HOMES) else 'yes'}",
        f"PrivateTmp={'no' if place.below(_TEMPORARY) else 'yes'}",
        f"CapabilityBoundingSet={capability}",
        f"AmbientCapabilities={capability}",
    ]


def _quoted(word: str, *, command: bool = False) -> str:
    """One word of a unit's line, as systemd.syntax(7) wants it; in a command `$` is a variable's."""
    text = _checked(word).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    if command:
        text = text.replace("$", "$$")
    return f'"{text}"' if any(c in text for c in " \t'\"\\;") else text


def _plain(path: Path) -> str:
    """A path that is a line's whole value: it is not unquoted there."""
    return _checked(str(path)).replace("%", "%%")


def _checked(word: str) -> str:
    if not word.isprintable():
        raise ConfigError(
            f"{printable(word)!r} has characters that a systemd unit cannot hold; rename it"
        )
    return word


def _joined(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"

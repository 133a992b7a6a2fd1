"""How many CPUs this process may really use: those of the machine, of its affinity, and of its container's quota.

`os.cpu_count()` knows the machine alone, so a container of two CPUs on a machine of 64 starts 64 of everything.
"""

from __future__ import annotations

import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def usable_cpus(*, cgroups: Path = _CGROUPS, own: Path = _OWN) -> int:
    """CPUs that may be busy at once, at least 1; part of a CPU in a quota counts as one."""
    here = getattr(os, "sched_getaffinity", None)
    count = len(here(0)) if here else (os.cpu_count() or 1)
    return max(1, min([count, *_quotas(cgroups, own)]))


def _quotas(cgroups: Path, own: Path) -> list[int]:
    """The limits of this process's control groups, from its own up to the root; none where nothing limits."""
    found = []
    for folder in _folders(cgroups, own):
        quota = _version_2(folder) or _version_1(folder)
        if quota is not None:
            found.append(quota)
    return found


def _folders(cgroups: Path, own: Path) -> list[Path]:
    """Where limits may stand: a container sees its own group as the root, a service lies deeper."""
    folders = [cgroups, cgroups / "cpu"]
    for line in _text(own).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        root = cgroups if not controllers else cgroups / "cpu"
        if controllers and "cpu" not in controllers.split(","):
            continue
        place = root / path.lstrip("/")
        folders += [p for p in (place, *place.parents) if p.is_relative_to(root)]
    return list(dict.fromkeys(folders))


def _version_2(folder: Path) -> int | None:
    quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
    return _ratio(quota, period)


def _version_1(folder: Path) -> int | None:
    quota, period = (_text(folder / f"cpu.cfs_{n}_us").strip() for n in ("quota", "period"))
    return _ratio(quota, period)


def _ratio(quota: str, period: str) -> int | None:
    """CPUs of a quota in microseconds a period, rounded up; None for "max", -1 and nonsense."""
    if not all(t.isascii() and t.isdigit() and len(t) < 16 for t in (quota, period)):
        return None
    if int(period) == 0:
        return None
    return max(1, -(-int(quota) // int(period)))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def wait_asleep() -> None:
    """Have OpenMP's threads sleep while they wait for each other. Before torch is loaded; who set it otherwise is obeyed.

    By default they spin. Where something else wants the CPUs, such as the threads that decode images, or a training next to
    it, a spinning thread keeps them from those it waits for: 42 images a second in place of 280 (docs/log.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

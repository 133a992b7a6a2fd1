"""CPUs by affinity and by the quotas that containers and services set, in both versions of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedsplit.core.cpus import usable_cpus


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def counted(tmp_path: Path, own: str = "0::/\n", **files: str) -> int:
    for name, text in files.items():
        path = tmp_path / "cgroup" / name.replace("__", "/").replace("-", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "own").write_text(own)
    return usable_cpus(cgroups=tmp_path / "cgroup", own=tmp_path / "own")


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(
    ("files", "own", "cpus"),
    [
        ({}, "", 8),
        ({"cpu-max": "max 100000\n"}, "0::/\n", 8),
        ({"cpu-max": "200000 100000\n"}, "0::/\n", 2),
        ({"cpu-max": "150000 100000\n"}, "0::/\n", 2),
        ({"cpu-max": "1000 100000\n"}, "0::/\n", 1),
        ({"cpu-max": "nonsense"}, "0::/\n", 8),
        ({"cpu-max": "100000 0"}, "0::/\n", 8),
        # A service's quota stands in its own group, a pod's above it.
        ({"a__b__cpu-max": "max 100000", "a__cpu-max": "300000 100000"}, "0::/a/b\n", 3),
        # Version 1.
        ({"cpu__cpu-cfs_quota_us": "400000", "cpu__cpu-cfs_period_us": "100000"}, "", 4),
        (
            {"cpu__cpu-cfs_quota_us": "-1", "cpu__cpu-cfs_period_us": "100000"},
            "4:cpu,cpuacct:/\n",
            8,
        ),
    ],
)
def test_the_smallest_limit_counts(
    tmp_path: Path, files: dict[str, str], own: str, cpus: int
) -> None:
    assert counted(tmp_path, own, **files) == cpus


def test_affinity_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert counted(tmp_path) == 1

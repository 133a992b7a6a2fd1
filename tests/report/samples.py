"""Made-up runs that look like real ones, as the records that a run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedsplit.core.records import LeftOut, RoundMetrics, SiteSummary, Summary

CUTS = ("0,6", "1,5", "2,4", "6,6")


def metrics(
    *, sites: int = 4, rounds: int = 3, missed: tuple[tuple[int, int], ...] = ()
) -> list[RoundMetrics]:
    """Lines of all sites and rounds but the (site, round) pairs in `missed`."""
    return [
        _line(site, number, rounds)
        for number in range(1, rounds + 2)
        for site in range(sites)
        if (site, number) not in missed
    ]


def _line(site: int, number: int, rounds: int) -> RoundMetrics:
    trains, activations = number <= rounds, 0 if site % 4 == 3 else 20_000 * (300 + 100 * site)
    return RoundMetrics(
        round=number, site=f"site-{site}", cut=CUTS[site % 4], codec="fp32", samples=300 if trains else 0,
        test_samples=50, correct_global=min(50, 8 + 9 * number + site), correct_personal=45 if trains else None,
        loss=1 / number if trains else None, bytes_activation_up=activations,
        bytes_activation_down=activations // 2, bytes_module_up=400_000 if trains else 0, bytes_module_down=400_000,
        steps=10, seconds_device=3.0, seconds_wait=1.0, peak_rss_bytes=500_000_000,
    )  # fmt: skip


def summary(lines: list[RoundMetrics], **changes: Any) -> Summary:
    """The summary of such lines; `changes` overrides its fields."""
    names = list(dict.fromkeys(m.site for m in lines))
    rounds = max((m.round for m in lines), default=1) - 1
    values: dict[str, Any] = {
        "run": "digits-20260101-120000", "task": "digits", "method": "fedv", "backbone": "vit-glyphs",
        "backbone_sha256": "ab" * 32, "fedsplit_version": "0.1.0", "rounds": rounds, "rounds_done": rounds,
        "sites": tuple(_site(n, [m for m in lines if m.site == n]) for n in names),
        "accuracy_global": 0.9, "accuracy_global_start": 0.3,
        "accuracy_by_round": tuple(0.3 + 0.6 * i / max(1, rounds) for i in range(rounds + 1)),
        "accuracy_local_only": 0.62,
        "bytes_activation": sum(m.bytes_activation_up + m.bytes_activation_down for m in lines),
        "bytes_module": sum(m.bytes_module_up + m.bytes_module_down for m in lines),
        "bytes_full_model": 840_000_000, "wall_s": 93.0, "outcome": "complete", "left_out": (), "reason": "",
        "module": "module",
    }  # fmt: skip
    return Summary(**(values | changes))


def _site(name: str, lines: list[RoundMetrics]) -> SiteSummary:
    return SiteSummary(
        name=name, cut=lines[0].cut, samples=300, test_samples=50, accuracy_before=0.3, accuracy=0.9,
        accuracy_personal=0.92, accuracy_local_only=0.62, accuracy_local_only_personal=0.88,
        bytes_up=33_300_000, bytes_down=21_200_000, seconds_device=19.0, seconds_wait=6.6,
        peak_rss_bytes=540_000_000, rounds_missed=0,
    )  # fmt: skip


LOST = (LeftOut(site="site-2", rounds=(2,), reason="no reply within deadline-s=600"),)


def write(run_dir: Path, lines: list[RoundMetrics], record: Summary) -> Path:
    """Write them as a run's folder."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text(
        "".join(m.model_dump_json() + "\n" for m in lines), encoding="utf-8"
    )
    (run_dir / "summary.json").write_text(record.model_dump_json(), encoding="utf-8")
    return run_dir

"""The server of the echo app. Tasks: fine | lost (a site misses round 2) | boom (fails at once) | slow."""

import time
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedsplit.core.errors import FederationError
from fedsplit.core.records import LeftOut, RoundMetrics, SiteSummary, Status, Summary

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Write status, metrics and summary as the real app does."""
    config = context.run_config
    task = str(config["task"])
    if task == "boom":
        raise FederationError(
            "4 sites wanted, got 1:\n  - start more sites\n  - or lower min-sites"
        )
    rounds = int(config["rounds"])
    nodes = list(grid.get_node_ids())
    sites = tuple(f"site-{i}" for i in range(len(nodes)))
    run_dir = Path(str(config["runs-dir"])) / str(config["run-name"])
    run_dir.mkdir(parents=True)
    for number in range(1, rounds + 2):
        _ask(grid, nodes)
        here = [s for s in sites if not (task == "lost" and number == 2 and s == "site-1")]
        for i in range(len(here)):
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write(_metrics(here[i], number, rounds).model_dump_json() + "\n")
            phase = "training" if number <= rounds else "evaluating"
            _status(run_dir, phase, number, rounds, sites, here[: i + 1])
        time.sleep(0.5 if task == "slow" else 0.0)
    (run_dir / "summary.json").write_text(_summary(run_dir, task, rounds, sites).model_dump_json())
    _status(run_dir, "done", rounds + 1, rounds, sites, here)


def _ask(grid: Grid, nodes: list[int]) -> None:
    open_ids = set(
        grid.push_messages(
            [Message(RecordDict(), dst_node_id=n, message_type="query") for n in nodes]
        )
    )
    while open_ids:
        for reply in grid.pull_messages(list(open_ids)):
            open_ids.discard(reply.metadata.reply_to_message_id)
        time.sleep(0.05)


def _status(run_dir: Path, phase: str, number: int, rounds: int, sites, replied) -> None:
    text = Status(
        phase=phase, round=number, rounds=rounds, sites=sites, replied=tuple(replied)
    ).model_dump_json()
    (run_dir / "status.tmp").write_text(text)
    (run_dir / "status.tmp").replace(run_dir / "status.json")


def _metrics(site: str, number: int, rounds: int) -> RoundMetrics:
    trains = number <= rounds
    return RoundMetrics(
        round=number, site=site, cut="1,5", codec="fp32", samples=100 if trains else 0, test_samples=20,
        correct_global=min(20, 4 * number), correct_personal=15 if trains else None, loss=0.5 if trains else None,
        bytes_activation_up=1000, bytes_activation_down=500, bytes_module_up=50, bytes_module_down=50, steps=4,
        seconds_device=0.1, seconds_wait=0.1, peak_rss_bytes=10**8,
    )  # fmt: skip


def _summary(run_dir: Path, task: str, rounds: int, sites: tuple[str, ...]) -> Summary:
    lost = task == "lost"
    rows = tuple(
        SiteSummary(
            name=s, cut="1,5", samples=100, test_samples=20, accuracy_before=0.2, accuracy=0.6,
            accuracy_personal=0.75, accuracy_local_only=None, accuracy_local_only_personal=None, bytes_up=1,
            bytes_down=1, seconds_device=0.1, seconds_wait=0.1, peak_rss_bytes=10**8,
            rounds_missed=int(lost and s == "site-1"),
        )
        for s in sites
    )  # fmt: skip
    return Summary(
        run=run_dir.name, task=task, method="fedv", backbone="none", backbone_sha256="0" * 64,
        fedsplit_version="0", rounds=rounds, rounds_done=rounds, sites=rows, accuracy_global=0.6,
        accuracy_global_start=0.2, accuracy_by_round=(0.2, 0.4, 0.6), accuracy_local_only=None,
        bytes_activation=12000, bytes_module=800, bytes_full_model=10**6, wall_s=1.0,
        outcome="partial" if lost else "complete",
        left_out=(LeftOut(site="site-1", rounds=(2,), reason="no reply in time"),) if lost else (),
        reason="site-1 missed round 2" if lost else "", module="module",
    )  # fmt: skip

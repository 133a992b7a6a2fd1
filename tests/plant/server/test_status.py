"""What is shown of a federation: in JSON, in the terminal, in a real browser, as metrics."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from filelock import FileLock
from rich.console import Console

from fedsplit.cli.status import LIGHTS, view
from fedsplit.core.records import Status
from fedsplit.federation.server.books.run_dir import RunDir
from fedsplit.plant import pki
from fedsplit.plant.lock import taken
from fedsplit.plant.server.admission import Admission, Keys
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.metrics import exposition
from fedsplit.plant.server.page import Watcher, page_router
from fedsplit.plant.server.registry import Registry
from fedsplit.plant.server.status import FederationStatus, federation_status
from fedsplit.plant.wire import Report
from tests.plant.server.conftest import CA
from tests.report.samples import metrics, summary

ROOT = Path(__file__).parents[3]
SITES = {
    "line-a": "idle",
    "line-b": "working",
    "line-c": "sleeping",
    "line-d": "refused",
    "line-e": "invited",
    "line-f": "failing",
    "検査ライン7": "late",
}


@pytest.fixture
def held(folder: FederationFolder) -> Iterator[FileLock]:
    """As a server that is up holds its folder."""
    lock = taken(folder.state)
    yield lock
    lock.release(force=True)


@pytest.fixture
def plant(folder: FederationFolder, held: FileLock) -> Iterator[FederationFolder]:
    """Seven sites, each in another state; one run that goes on, and two that ended."""
    services = {
        n: {"port": 1, "state": "up", "restarts": 0}
        for n in ("superlink", "encoder", "control", "nginx")
    }
    services["encoder"]["restarts"] = 2
    folder.state.write_text(
        json.dumps({"pid": os.getpid(), "services": services}), encoding="utf-8"
    )
    clock = {"now": time.time() - 3600}
    folder.encoder_stats.write_text(
        '{"live_sessions": 2, "kept_steps": 1, "kept_bytes": 9, "sessions": 7, "encoded": 40, "backpropped": 30, '
        '"probed": 0, "scored": 0, "predicted": 12, "published": 3, "refused": {"token": 4}, "rss_bytes": 500000000}',
        encoding="utf-8",
    )
    with Registry(folder, now=lambda: clock["now"]) as registry:
        for number, name in enumerate(SITES):
            code = registry.add_site(name, 24)
            if SITES[name] != "invited":
                Admission(registry).redeem(
                    code.id, code.secret, Keys(f"{number:064x}", f"key {number}"), _signed
                )
                registry.seen(
                    name, Report(state="idle", rss_bytes=300_000_000, fedsplit_version="0.1.0")
                )
        registry.revoke("line-d")
        clock["now"] = time.time() - 2
        registry.seen(
            "line-a", Report(state="idle", rss_bytes=300_000_000, disk_free_bytes=7 * 10**9)
        )
        registry.seen("line-b", Report(state="working", detail="round 2 <b>"))
        registry.seen(
            "line-f", Report(state="failing", detail="the data folder /data/line-f is not there")
        )
        registry.seen("検査ライン7", Report(state="working", detail="round 2"))
    _run(folder, "inspection-1", outcome="complete", task="inspection")
    _run(folder, "inspection-2", outcome="failed", reason="too few sites", task="inspection")
    live = folder.runs / "inspection-3"
    (live).mkdir()
    (live / "config.json").write_text("{}", encoding="utf-8")
    run = RunDir(live)
    with ExitStack() as stack:
        stack.enter_context(run.sole_writer())
        for line in metrics(sites=2, rounds=1):
            run.add_metrics(
                line.model_copy(
                    update={"site": {"site-0": "line-a", "site-1": "line-b"}[line.site]}
                )
            )
        run.set_status(
            Status(
                phase="training",
                round=2,
                rounds=4,
                sites=("line-a", "line-c", "検査ライン7"),
                replied=("line-a", "line-c"),
            )
        )
        yield folder


def _signed(_name: str, common_name: str) -> bytes:
    return pki.issue(CA, pki.new_key().public_key(), common_name=common_name, days=30, client=True)


def _run(folder: FederationFolder, name: str, **changes: Any) -> None:
    path = folder.runs / name
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}", encoding="utf-8")
    made = summary(metrics(), run=name, **changes)
    (path / "summary.json").write_text(made.model_dump_json(), encoding="utf-8")


def test_each_site_and_run_is_shown_as_it_stands(plant: FederationFolder) -> None:
    now = federation_status(plant)
    assert {s.name: s.state for s in now.sites} == SITES
    assert (now.up, now.services["nginx"], now.restarts["encoder"]) == (True, "up", 2)
    assert now.run is not None
    assert (now.run.name, now.run.phase, now.run.round, now.run.replied) == (
        "inspection-3",
        "training",
        2,
        ("line-a", "line-c"),
    )
    assert now.run.left_s is not None
    assert {r.name: r.phase for r in now.ended} == {
        "inspection-1": "complete",
        "inspection-2": "failed",
    }
    moved = {s.name: s.bytes_up for s in now.sites}
    assert moved["line-a"] > 0 == moved["line-c"]


def test_a_server_that_is_down_is_told_and_its_sites_are_shown(
    plant: FederationFolder, held: FileLock
) -> None:
    held.release()
    now = federation_status(plant)
    assert not now.up
    assert "fedsplit server up" in now.message
    assert len(now.sites) == len(SITES)


def test_the_terminal_shows_all_of_it(plant: FederationFolder) -> None:
    assert LIGHTS.keys() == set(SITES.values())
    text = io.StringIO()
    Console(file=text, width=200).print(view(federation_status(plant)))
    for word in (
        *SITES,
        "inspection-3: training, round 2 of 4, 2 of 3 answers",
        "too few sites",
        "started again 2 times",
    ):
        assert word in text.getvalue()


def test_metrics_name_services_sites_and_runs(plant: FederationFolder) -> None:
    body = exposition(federation_status(plant))[0].decode()
    for line in (
        "fedsplit_up 1.0",
        'fedsplit_service_restarts{service="encoder"} 2.0',
        'fedsplit_site_state{site="line-c",state="sleeping"} 1.0',
        'fedsplit_site_memory_bytes{site="line-a"} 3e+08',
        "fedsplit_encoder_sessions 2.0",
        "fedsplit_encoder_steps_total 40.0",
        "fedsplit_encoder_predicted_total 12.0",
        'fedsplit_encoder_refused_total{reason="token"} 4.0',
        'fedsplit_run_replied{run="inspection-3"} 2.0',
        'fedsplit_run_ended{outcome="failed",run="inspection-2"} 1.0',
    ):
        assert line in body.splitlines()


def test_the_dashboard_asks_for_metrics_that_there_are(plant: FederationFolder) -> None:
    text = (ROOT / "deploy/grafana/fedsplit.json").read_text(encoding="utf-8")
    board = json.loads(text)
    asked = {
        m
        for p in board["panels"]
        for t in p["targets"]
        for m in re.findall(r"fedsplit_\w+", t["expr"])
    }
    given = set(
        re.findall(r"^(fedsplit_\w+)", exposition(federation_status(plant))[0].decode(), re.M)
    )
    assert len(asked) > 20
    assert asked <= given


def test_the_state_is_read_once_however_many_look(plant: FederationFolder) -> None:
    watcher = Watcher(plant, every_s=60)
    assert watcher.now() is watcher.now()


@contextmanager
def served(folder: FederationFolder) -> Iterator[str]:
    app = FastAPI()
    app.include_router(page_router(folder), prefix="/status")
    server = uvicorn.Server(
        uvicorn.Config(
            app, host="127.0.0.1", port=0, log_level="warning", ws="none", lifespan="off"
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.02)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/status/"
    finally:
        server.force_exit = server.should_exit = True
        thread.join(10)


def test_the_page_is_served_with_events_json_and_metrics(plant: FederationFolder) -> None:
    with served(plant) as url, httpx.Client(trust_env=False) as client:
        assert "script-src 'unsafe-inline'" in client.get(url).headers["content-security-policy"]
        assert FederationStatus.model_validate(client.get(f"{url}status.json").json()).up
        assert "fedsplit_up 1.0" in client.get(f"{url}metrics").text
        with client.stream("GET", f"{url}events") as stream:
            line = next(stream.iter_lines())
    assert FederationStatus.model_validate_json(line.removeprefix("data: ")).run is not None


@pytest.mark.slow
def test_a_browser_shows_each_state_in_its_own_way(plant: FederationFolder, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    if (chromium := shutil.which("chromium") or shutil.which("chromium-browser")) is None:
        pytest.skip("no Chromium here")
    with served(plant) as url, sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        page.goto(url)
        page.wait_for_selector(".site")
        shown = page.eval_on_selector_all(
            ".site", "all => all.map(e => [e.dataset.site, e.dataset.state])"
        )
        assert dict(shown) == SITES
        looks = page.eval_on_selector_all(
            ".site",
            "all => all.map(e => getComputedStyle(e).borderLeftColor + e.querySelector('.word').textContent)",
        )
        assert len(set(looks)) == len(SITES)
        assert page.eval_on_selector_all(
            "#ended tbody tr", "all => all.map(e => e.dataset.phase)"
        ) == ["failed", "complete"]
        assert "round 2 of 4" in page.text_content("#run")
        # What a site says is text, never a part of the page.
        assert "round 2 <b>" in page.text_content("[data-site=line-b]")
        before = page.get_attribute("body", "data-shown")
        page.wait_for_selector(f"body:not([data-shown='{before}'])")
        if folder := os.environ.get("FEDSPLIT_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/status-page.png", full_page=True)
            page.emulate_media(color_scheme="dark")
            page.screenshot(path=f"{folder}/status-page-dark.png", full_page=True)
        browser.close()
    assert faults == []

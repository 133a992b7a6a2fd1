"""The module in production reaches a site: the real control service behind the real nginx, a real registry, a site that joined."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from fedsplit.core.errors import PlantError
from fedsplit.model.description import described
from fedsplit.plant import paths
from fedsplit.plant.server import control
from fedsplit.plant.server.backbone import ServedBackbone
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.nginx_conf import Ports
from fedsplit.plant.server.registry import Registry
from fedsplit.plant.server.status import federation_status
from fedsplit.plant.site import expected, modules
from fedsplit.plant.site import join as joining
from fedsplit.plant.site.calls import open_client
from fedsplit.plant.site.folder import SiteFolder
from fedsplit.plant.site.modules import SiteModules, current, expected_file
from fedsplit.plant.site.report import Reports
from fedsplit.plant.site.wish import Wish
from fedsplit.predict.usage import Usage
from fedsplit.registry.module_files import digest_of, module_digest
from fedsplit.registry.registry import ModuleRegistry
from fedsplit.registry.version import Facts
from fedsplit.training.data.sides import Record
from tests.plant.server.conftest import serving
from tests.plant.server.public_port import free_port, make_folder, needs_nginx, running
from tests.plant.server.test_control import Flower

pytestmark = needs_nginx


@dataclass
class Plant:
    server: FederationFolder
    sites: dict[str, SiteFolder]
    registry: ModuleRegistry
    digests: list[str]
    said: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory, trained_image_module: Path) -> Iterator[Plant]:
    """Three versions of a task, of which none is promoted, and two sites: one of that task, one of another."""
    place = tmp_path_factory.mktemp("plant")
    server = make_folder(place / "server")
    registry = ModuleRegistry.open(server.modules, create=True)
    digests = []
    for number in range(3):
        folder = place / f"module{number}"
        shutil.copytree(trained_image_module / "module", folder)
        (folder / "README.md").write_text(f"version {number}\n")
        digests.append(registry.add(folder, Facts(task="digits")).digest)
    digits = load_digits()
    for i in range(80):
        file = place / "pictures" / str(digits.target[i]) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[i] * 15).astype(np.uint8)).save(file)
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(control, "ServedBackbone", partial(ServedBackbone, description=described))
        client = stack.enter_context(serving(control.create_app(server, connect=Flower())))
        assert client.base_url.port is not None
        stack.enter_context(running(server, Ports(free_port(), free_port(), client.base_url.port)))
        sites = {}
        with Registry(server) as members:
            for name, task in (("line-a", "digits"), ("line-b", "other")):
                wish = Wish(
                    code=members.add_site(name, 1), folder=place / name, data=f"folder:{place / 'pictures'}",
                    task=task, cut="6,6",
                )  # fmt: skip
                sites[name] = joining.join(wish, lambda _text: None).folder
        stack.enter_context(registry)
        yield Plant(server, sites, registry, digests)


@pytest.fixture
def running_site(plant: Plant) -> Iterator[Callable[[str], tuple[SiteModules, Reports]]]:
    """The parts of `site run` that report and fetch, of a site without a runtime."""
    with contextlib.ExitStack() as stack:

        def start(name: str) -> tuple[SiteModules, Reports]:
            folder = plant.sites[name]
            folder.logs.mkdir(exist_ok=True)
            site = stack.enter_context(
                SiteModules(folder, say=plant.said.append, idle=lambda: False)
            )
            reports = stack.enter_context(
                Reports(folder, services=dict, say=lambda _text: None, modules=site)
            )
            return site, reports

        yield start


def turn(site: SiteModules, reports: Reports) -> None:
    """One report, and what follows from its answer."""
    reports._due = 0.0
    reports.step()
    site.step()


def test_a_promoted_module_comes_by_digest_and_a_rollback_needs_no_line(
    plant: Plant, running_site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = plant.sites["line-a"]
    site, reports = running_site("line-a")
    turn(site, reports)
    assert current(folder) == {}
    first, second, third = plant.digests
    for digest in (first, second):
        plant.registry.promote(digest, by="test")
        turn(site, reports)
        assert json.loads(folder.current_modules.read_text()) == {"digits": digest}
        assert module_digest(folder.modules / digest) == digest
    asked: list[str] = []
    monkeypatch.setattr(modules, "Ranges", lambda *_a, **_k: asked.append("a fetch"))
    plant.registry.rollback("digits", by="test")
    began = time.monotonic()
    turn(site, reports)
    assert current(folder) == {"digits": first}
    assert not asked
    assert time.monotonic() - began < 5
    # The server knows who has what.
    turn(site, reports)
    shown = {s.name: s.module for s in federation_status(plant.server).sites}
    assert shown["line-a"] == "digits#1"
    monkeypatch.undo()
    # No more than are kept, and what lost bits comes again.
    plant.registry.promote(third, by="test")
    (folder.path / "site.toml").write_text(
        (folder.path / "site.toml").read_text().replace("modules = 3", "modules = 1")
    )
    damaged = folder.modules / third
    damaged.mkdir()
    (damaged / "fedsplit.json").write_text("half")
    again, again_reports = running_site("line-a")
    again._folder = SiteFolder.at(folder.path)
    turn(again, again_reports)
    assert module_digest(damaged) == third
    assert sorted(p.name for p in folder.modules.iterdir()) == sorted([third, "current.json"])


def test_a_site_gets_the_modules_of_its_own_task_alone(plant: Plant, running_site: Any) -> None:
    plant.registry.promote(plant.digests[0], by="test")
    site, reports = running_site("line-b")
    turn(site, reports)
    assert current(plant.sites["line-b"]) == {}
    path = f"{paths.MODULES}/{plant.digests[0]}"
    with open_client(plant.sites["line-b"]) as other, open_client(plant.sites["line-a"]) as own:
        assert other.get(path).status_code == 404
        assert other.get(f"{path}/files/fedsplit.json").status_code == 404
        # One that no alias points to is nobody's.
        assert own.get(f"{paths.MODULES}/{plant.digests[1]}").status_code == 404
        assert own.get(path).json()["task"] == "digits"
        part = own.get(f"{path}/files/fedsplit.json", headers={"range": "bytes=2-5"})
        assert (part.status_code, len(part.content)) == (206, 4)
        for odd in ("version.json", "..%2f..%2faliases.json", "nothing"):
            assert own.get(f"{path}/files/{odd}").status_code in (400, 404)
    url = f"https://localhost:{plant.server.settings.server.port}"
    with httpx.Client(base_url=url, verify=False) as nobody:
        assert nobody.get(path).status_code == 403


def test_wrong_bytes_and_a_broken_registry_leave_what_is_in_use(
    plant: Plant, running_site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules, "_PATIENCE_S", 1.0)
    folder = plant.sites["line-a"]
    plant.registry.promote(plant.digests[0], by="test")
    site, reports = running_site("line-a")
    turn(site, reports)
    assert current(folder) == {"digits": plant.digests[0]}
    shutil.rmtree(folder.modules / plant.digests[1], ignore_errors=True)
    plant.registry.promote(plant.digests[1], by="test")
    kept = plant.registry.folder(plant.registry.get("digits#2")) / "README.md"
    text = kept.read_text()
    kept.write_text("VERSION 1\n")
    turn(site, reports)
    assert current(folder) == {"digits": plant.digests[0]}
    state = site.state()
    assert state is not None
    assert "cannot read its registry" in state.fault
    kept.write_text(text)
    site._next = 0.0
    turn(site, reports)
    assert current(folder) == {"digits": plant.digests[1]}
    state = site.state()
    assert state is not None
    assert not state.fault
    database = plant.server.modules / "modules.db"
    whole = database.read_bytes()
    database.write_bytes(b"no database" * 100)
    try:
        turn(site, reports)
        assert current(folder) == {"digits": plant.digests[1]}
        assert reports.ended is None
    finally:
        database.write_bytes(whole)


def test_answers_that_leave_what_the_test_samples_gave_are_told(
    plant: Plant, running_site: Any
) -> None:
    folder = plant.sites["line-a"]
    plant.registry.promote(plant.digests[0], by="test")
    site, reports = running_site("line-a")
    turn(site, reports)
    # As a first run leaves it: every second sample tests.
    record = Record(folder.kept, "line-a", "run")
    found = expected.SiteSources().look(*_source(folder))
    sides = np.arange(len(found), dtype=np.int8) % 2
    record.add(found.digests(), sides)
    assert expected.main([str(folder.path), plant.digests[0]]) == 0
    said = json.loads(expected_file(folder, plant.digests[0]).read_text())["answered"]
    assert said["samples"] == 40
    assert sum(said["classes"].values()) == 40
    assert 4 <= said["confidence"] <= 40
    with Usage(folder.path, plant.digests[0]) as usage:
        usage.add(["3"] * 300, [0.4] * 300)
    turn(site, reports)
    shown = next(s for s in federation_status(plant.server).sites if s.name == "line-a")
    assert "of the answers go to other classes" in shown.drift
    assert "3 100%" in shown.drift
    assert [d.samples for d in shown.usage] == [300]
    with Registry(plant.server) as members:
        assert members.usage("line-a")[0].answered.classes == {"3": 300}


def _source(folder: SiteFolder) -> tuple[Any, Any]:
    site = expected.SiteSettings.from_node(expected.node_config(folder), node_id=0)
    config = expected.RunConfig.from_flat({"task": "digits"})
    own = site.for_task(config)
    assert own is not None
    return config, own


def test_threads_of_many_reports_do_not_disturb_each_other(plant: Plant) -> None:
    found: list[Any] = []
    served = control.ProductionModules(plant.server)

    def ask() -> None:
        found.extend(served.of_task("digits") for _ in range(20))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    served.close()
    assert found == [{"digits": plant.digests[0]}] * 80


class _Line:
    def __init__(self, text: bytes) -> None:
        self._text = text

    def whole(self, _path: str, _most: int) -> bytes:
        return self._text


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=12),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["task", "number", "files", "name", "bytes", "sha256"]), inner
            )
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode())
)
def test_a_list_of_files_from_anybody_is_refused_in_words(text: bytes) -> None:
    with pytest.raises(PlantError, match="module abababababab"):
        modules._listed("ab" * 32, _Line(text))  # type: ignore[arg-type]


def test_names_that_lead_elsewhere_are_refused_though_the_digest_fits() -> None:
    for name in ("../current.json", "version.json", "a/b", ".hidden", "", "x" * 101):
        files = {name: "cd" * 32}
        said = {"task": "t", "number": 1, "files": [{"name": name, "bytes": 3, "sha256": "cd" * 32}]}  # fmt: skip
        with pytest.raises(PlantError):
            modules._listed(digest_of(files), _Line(json.dumps(said).encode()))  # type: ignore[arg-type]

"""Predictions in a site's resident runtime: the promoted module answers, another one is swapped in, training goes on."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import RecordDict

from benchmarks.supernode import SECRET, asking, supernode
from fedsplit.core.errors import ConfigError
from fedsplit.core.programs import free_port
from fedsplit.plant.site import doctor
from fedsplit.plant.site.folder import ServeSection, SiteFile, SiteFolder, SiteSection
from fedsplit.plant.site.listening import listening
from fedsplit.plant.site.report import served
from fedsplit.plant.site.runtime import Place, resident
from fedsplit.plant.site.services import services
from fedsplit.plant.site.serving import LOG, SiteServing
from fedsplit.plant.site.settings_text import written
from fedsplit.predict.found import find_module
from fedsplit.predict.predictor import Predictor, load_predictor
from fedsplit.predict.usage import day_of, used
from fedsplit.site.runtime import SiteRuntime
from tests.federation.test_executor import until
from tests.predict.serving import pictures, version_of


def site(path: Path, **serve: Any) -> SiteFolder:
    path.mkdir(exist_ok=True)
    about = SiteSection(name="line-a", address="127.0.0.1:1", task="digits", data="digits")
    settings = SiteFile(site=about, serve=ServeSection(**({"port": free_port()} | serve)))
    (path / "site.toml").write_text(written(settings), encoding="utf-8")
    return SiteFolder.at(path)


def promote(folder: SiteFolder, module: Path | None) -> Predictor | None:
    """As the site does when it hears of a promotion."""
    modules = folder.path / "modules"
    modules.mkdir(exist_ok=True)
    meant: dict[str, str] = {}
    if module is not None:
        digest = find_module(str(module)).digest
        shutil.copytree(module, modules / digest, dirs_exist_ok=True)
        meant = {"digits": digest}
    (modules / "new").write_text(json.dumps(meant))
    (modules / "new").replace(modules / "current.json")
    return load_predictor(module) if module is not None else None


def ask(folder: SiteFolder, picture: bytes) -> httpx.Response:
    port = folder.settings.serve.port
    return httpx.post(f"http://127.0.0.1:{port}/v1/predict", content=picture, trust_env=False)


def test_the_promoted_module_answers_and_another_one_is_swapped_in(
    trained_image_module: Path, tmp_path: Path
) -> None:
    module = trained_image_module / "module"
    other = version_of(module, tmp_path / "other", 1).found.folder
    folder, runtime = site(tmp_path / "site"), SiteRuntime()
    (picture,) = pictures(1)
    with SiteServing(folder, runtime) as serving:
        assert ask(folder, picture).status_code == 503
        assert doctor._serve(folder).level == "yellow"
        for one in (module, other):
            own = promote(folder, one)
            assert own is not None
            until(lambda own=own: serving.told["module"] == own.found.digest)
            answer = ask(folder, picture).json()
            name, share = next(iter(own.predict(picture).items()))
            assert answer == {"class": name, "probability": share, "module": own.found.digest}
        # One copy of the backbone for both, and for training.
        assert runtime.kept.parts.loads == 1
        assert doctor._serve(folder).level == "green"
        assert served({"serve": serving.told}).startswith(
            f"serves module {own.found.digest[:12]} at http://127"
        )
        bad = folder.path / "modules" / "current.json"
        bad.write_text('{"digits": "../site.toml"}')
        until(lambda: serving.told["fault"])
        assert ask(folder, picture).status_code == 200
        assert doctor._serve(folder).level == "yellow"
        assert served({"serve": serving.told}).startswith("it serves as before: ")
        promote(folder, None)
        until(lambda: not serving.told["module"])
        assert ask(folder, picture).status_code == 503
    assert doctor._serve(folder).level == "red"
    sums = used(folder.path, day_of(time.time()))
    assert {digest[:12]: one.samples for digest, one in sums.items()} == {
        find_module(str(module)).digest[:12]: 1, own.found.digest[:12]: 2
    }  # fmt: skip
    lines = [json.loads(line) for line in (folder.logs / LOG).read_text().splitlines()]
    assert {line["status"] for line in lines} == {200, 503}


def test_a_port_that_is_taken_costs_the_service_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsplit.plant.site.serving._AGAIN_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        folder = site(tmp_path, port=taken.getsockname()[1])
        serving = SiteServing(folder, SiteRuntime())
        assert "choose another port" in serving.told["fault"]
        assert "it serves nothing: " in served({"serve": serving.told})
    with serving:
        serving.tend()
        assert serving.told["fault"] == ""
        assert ask(folder, b"x").status_code == 503


def test_settings_are_checked_before_a_site_starts(tmp_path: Path) -> None:
    folder = site(tmp_path, host="0.0.0.0", tls_cert="cert.pem", token_file="secrets/token")
    with pytest.raises(ConfigError) as caught:
        listening(folder).checked()
    for part in ("go together", str(tmp_path / "cert.pem"), str(tmp_path / "secrets" / "token")):
        assert part in str(caught.value)
    assert site(tmp_path / "plain", port=0).settings.serve == ServeSection()


def test_the_runtime_serves_beside_its_orders_and_ends_in_time(
    trained_image_module: Path, tmp_path: Path
) -> None:
    folder = site(tmp_path / "site")
    own = promote(folder, trained_image_module / "module")
    assert own is not None
    (tmp_path / "secret").write_bytes(SECRET)
    stop = threading.Event()
    with supernode({"site": "line-a"}) as node:
        place = Place(node.address, tmp_path / "secret", doing=folder.doing, site=folder)
        thread = threading.Thread(target=resident, args=[place, stop])
        thread.start()

        def told() -> dict[str, Any]:
            said: dict[str, Any] = (
                json.loads(folder.doing.read_text()) if folder.doing.is_file() else {}
            )
            return dict(said.get("serve", {}))

        until(lambda: told().get("module") == own.found.digest)
        node.give(asking(RecordDict({})))
        assert ask(folder, pictures(1)[0]).json()["module"] == own.found.digest
        assert node.reply(60).has_error()
        until(lambda: told().get("answered") == 1)
        stop.set()
        began = time.monotonic()
        thread.join(10)
        assert time.monotonic() - began < 5
    assert not thread.is_alive()
    with pytest.raises(httpx.ConnectError):
        ask(folder, b"x")
    assert sum(one.samples for one in used(folder.path, day_of(time.time())).values()) == 1


def test_a_runtime_that_serves_waits_asleep(tmp_path: Path) -> None:
    for serve, wanted in (({}, "passive"), ({"port": 0}, None)):
        folder = site(tmp_path / (wanted or "none"), **serve)
        folder.present.mkdir(exist_ok=True)
        (_, runtime) = services(folder)
        assert runtime.env.get("OMP_WAIT_POLICY") == wanted

"""A backbone on its way from server to site: ranges, cut lines, wrong bytes, another backbone, private blocks, no space."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import socket
import ssl
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from fedsplit.core.cut import Cut
from fedsplit.core.errors import BackboneError, PlantError, ServerAwayError, ServerRefusalError
from fedsplit.model import description
from fedsplit.model.backbone import Backbone
from fedsplit.model.description import described
from fedsplit.model.manifest import Manifest, StoredTensor
from fedsplit.model.module import ModuleSpec
from fedsplit.model.split import device_part
from fedsplit.model.store import BackboneStore
from fedsplit.plant import paths
from fedsplit.plant.server.backbone import ServedBackbone, backbone_router
from fedsplit.plant.site import ranges
from fedsplit.plant.site.fetch import fetch_backbone, fetcher
from tests.model.copies import add_tokenizer, change_tensors, copy_of
from tests.plant.server.conftest import serving

CUT = Cut(1, 4)


@pytest.fixture
def source(tiny: dict[str, Path], tmp_path: Path) -> Path:
    return add_tokenizer(copy_of(tiny["bert"], tmp_path / "source"))


@pytest.fixture
def store(tmp_path: Path) -> BackboneStore:
    return BackboneStore(tmp_path / "backbones")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "sleep", lambda _s: None)


def app_of(source: Path, private: str = "", **settings: Any) -> FastAPI:
    served = ServedBackbone(
        lambda: str(source), Cut.parse(private) if private else None, description=described
    )
    app = FastAPI()
    app.include_router(backbone_router(served, **settings))
    return app


@pytest.fixture
def client(source: Path) -> Iterator[httpx.Client]:
    with serving(app_of(source)) as found:
        yield found


def a_tensor(client: httpx.Client, at_least: int = 1000) -> StoredTensor:
    manifest = Manifest.parse(client.get(paths.MANIFEST).content)
    return next(t for t in manifest.tensors if t.bytes >= at_least)


def assert_whole(store: BackboneStore, path: Path, source: Path, cut: Cut = CUT) -> None:
    assert Backbone.find(str(path)).sha256 == Backbone.find(str(source)).sha256
    device_part(Backbone.find(str(path)), cut, ModuleSpec(classes=("a", "b"), kind="classifier"))
    assert not list(store.folder.rglob("*.part"))


# What the server gives.


def test_the_manifest_is_that_of_the_folder(client: httpx.Client, source: Path) -> None:
    answer = client.get(paths.MANIFEST)
    assert answer.content == Backbone.find(str(source)).manifest.canonical()
    assert answer.headers["etag"] == f'"{Backbone.find(str(source)).sha256}"'


def test_a_process_of_its_own_describes_as_this_one(source: Path) -> None:
    assert description.describe(source) == described(source)


def test_it_says_why_it_cannot(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "model.safetensors").unlink()
    monkeypatch.setattr("sys.argv", ["description", str(source)])
    assert description.main() == 1
    assert re.fullmatch(r"backbone .* has no weights.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("asked", "status", "start", "end"),
    [
        ("", 200, 0, None), ("bytes=0-", 206, 0, None), ("bytes=10-19", 206, 10, 20), ("bytes=10-", 206, 10, None),
        ("bytes=-7", 206, -7, None), ("bytes=0-999999999", 206, 0, None), ("bytes=999999999-", 416, 0, 0),
        ("bytes=-0", 416, 0, 0), ("bytes=9-3", 200, 0, None), ("bytes=-", 200, 0, None), ("lines=1-2", 200, 0, None),
        ("bytes=0-1,5-6", 200, 0, None), ("bytes=1-2x", 200, 0, None), ("bytes=" + "9" * 40 + "-", 200, 0, None),
    ],
)  # fmt: skip
def test_ranges(
    asked: str, status: int, start: int, end: int | None, client: httpx.Client, source: Path
) -> None:
    tensor = a_tensor(client)
    url = f"{paths.TENSORS}/{tensor.sha256}"
    whole = client.get(url).content
    assert hashlib.sha256(whole).hexdigest() == tensor.sha256
    answer = client.get(url, headers={"range": asked} if asked else {})
    assert (answer.status_code, answer.content) == (status, whole[start:end])
    if status == 206:
        first = start % len(whole)
        said = f"bytes {first}-{first + len(answer.content) - 1}/{len(whole)}"
        assert answer.headers["content-range"] == said
    if status == 416:
        assert answer.headers["content-range"] == f"bytes */{len(whole)}"


def test_a_range_of_other_bytes_is_answered_whole(client: httpx.Client) -> None:
    tensor = a_tensor(client)
    for etag, status in ((tensor.sha256, 206), ("0" * 64, 200)):
        headers = {"range": "bytes=4-", "if-range": f'"{etag}"'}
        assert client.get(f"{paths.TENSORS}/{tensor.sha256}", headers=headers).status_code == status


@pytest.mark.parametrize("name", ["model.safetensors", "../x", "%2e%2e%2fconfig.json", "x.py", ""])
def test_other_files_are_not_given(name: str, client: httpx.Client) -> None:
    assert client.get(f"{paths.FILES}/{name}").status_code == 404
    assert client.get(f"{paths.TENSORS}/{name}").status_code == 404


def test_transfers_are_bounded_and_their_turns_come_back(source: Path) -> None:
    with serving(app_of(source, max_transfers=1)) as client:
        url = f"{paths.TENSORS}/{a_tensor(client).sha256}"
        for _ in range(3):
            assert client.get(url).status_code == 200
    with serving(app_of(source, max_transfers=0)) as client:
        answer = client.get(f"{paths.FILES}/config.json")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")
        assert answer.json()["error"]["kind"] == "busy"


def test_a_backbone_that_cannot_be_read_is_said(client: httpx.Client, source: Path) -> None:
    (source / "model.safetensors").unlink()
    answer = client.get(paths.MANIFEST)
    assert (answer.status_code, answer.json()["error"]["kind"]) == (503, "backbone")
    assert "has no weights" in answer.json()["error"]["message"]


# What a site fetches.


def test_a_site_fetches_what_its_cut_needs_and_once(
    client: httpx.Client, source: Path, store: BackboneStore
) -> None:
    told: list[tuple[int, int]] = []
    path = fetch_backbone(store, client, CUT, progress=lambda here, all_: told.append((here, all_)))
    assert_whole(store, path, source)
    manifest = Backbone.find(str(path)).manifest
    needed = sum(t.bytes for t in {t.sha256: t for t in store.needed(manifest, CUT)}.values())
    assert told[0] == (0, needed)
    assert told[-1] == (needed, needed)
    assert [here for here, _ in told] == sorted(here for here, _ in told)
    told.clear()
    assert fetch_backbone(store, client, CUT, progress=lambda *say: told.append(say)) == path
    assert told == [(needed, needed)]
    client.close()
    # All is here: nobody is asked.
    sha256 = Backbone.find(str(path)).sha256
    with httpx.Client(base_url="http://127.0.0.1:9", trust_env=False) as nobody:
        assert fetch_backbone(store, nobody, CUT, sha256=sha256) == path


def test_another_cut_fetches_the_rest(client: httpx.Client, source: Path, tmp_path: Path) -> None:
    opened = partial(httpx.Client, base_url=client.base_url, trust_env=False)
    folder = tmp_path / "backbones"
    store = BackboneStore(folder, fetch=fetcher(opened, folder))
    sha256 = Backbone.find(str(source)).sha256
    for cut in (Cut(0, 4), Cut(4, 4)):
        assert_whole(store, store.ready(sha256, cut), source, cut)


@contextlib.contextmanager
def cut_lines(to: httpx.URL, after: Callable[[int], int | None]) -> Iterator[str]:
    """A proxy on loopback that cuts the i-th connection after so many bytes from the server; None: not."""
    listener = socket.create_server(("127.0.0.1", 0))
    ended, pumps = threading.Event(), list[threading.Thread]()

    def pump(source: socket.socket, sink: socket.socket, left: int | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                sink.sendall(data if left is None else data[:left])
                left = None if left is None else left - len(data)
                if left is not None and left <= 0:
                    break
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()  # the other pump closes the other end

    def accept() -> None:
        for i in range(10**6):
            try:
                near, _ = listener.accept()
            except OSError:
                return
            if ended.is_set():
                near.close()
                return
            far = socket.create_connection((to.host, to.port))
            for pair in ((near, far, None), (far, near, after(i))):
                pumps.append(threading.Thread(target=pump, args=pair, daemon=True))
                pumps[-1].start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        ended.set()
        with contextlib.suppress(OSError):
            socket.create_connection(listener.getsockname()).close()
        for one in (thread, *pumps):
            one.join(5)
        listener.close()


def test_a_cut_line_costs_only_what_was_on_it(
    client: httpx.Client, source: Path, store: BackboneStore
) -> None:
    """Each connection brings three kilobytes; the largest tensors are larger."""
    asked: list[str] = []
    with (
        cut_lines(client.base_url, lambda i: 3000 if i else None) as url,
        httpx.Client(base_url=url, trust_env=False) as cut,
    ):
        Manifest.parse(cut.get(paths.MANIFEST).content)
        cut.event_hooks = {"request": [lambda r: asked.append(r.headers.get("range", ""))]}
        sha256 = Backbone.find(str(source)).sha256
        path = store.add_backbone(
            manifest := Backbone.find(str(source)).manifest,
            {f.name: (source / f.name).read_bytes() for f in manifest.files},
        )
        assert fetch_backbone(store, cut, CUT, sha256=sha256) == path
    assert_whole(store, path, source)
    assert any(said.startswith("bytes=") for said in asked)


def test_another_process_goes_on_where_one_ended(
    client: httpx.Client, source: Path, store: BackboneStore
) -> None:
    sha256 = Backbone.find(str(source)).sha256
    path = store.add_backbone(
        manifest := Backbone.find(str(source)).manifest,
        {f.name: (source / f.name).read_bytes() for f in manifest.files},
    )
    tensor = max(store.missing(manifest, CUT), key=lambda t: t.bytes)
    with (
        cut_lines(client.base_url, lambda _i: 3000) as url,
        httpx.Client(base_url=url, trust_env=False) as cut,
        pytest.raises(ServerAwayError, match=r"does not come from the server: .*stays"),
    ):
        fetch_backbone(store, cut, CUT, sha256=sha256, patience_s=0.0)
    store.append(tensor, 0, [client.get(f"{paths.TENSORS}/{tensor.sha256}").content[:1000]])
    asked: dict[str, str] = {}
    client.event_hooks = {
        "request": [lambda r: asked.update({r.url.path: r.headers.get("range", "")})]
    }
    assert fetch_backbone(store, client, CUT, sha256=sha256) == path
    assert asked[f"{paths.TENSORS}/{tensor.sha256}"] == "bytes=1000-"
    assert_whole(store, path, source)


def test_nobody_there(store: BackboneStore) -> None:
    with (
        httpx.Client(base_url="http://127.0.0.1:9", trust_env=False) as nobody,
        pytest.raises(ServerAwayError, match=r"Nothing new came for 0 s.*fetch again when"),
    ):
        fetch_backbone(store, nobody, CUT, patience_s=0.0)


def test_wrong_bytes(source: Path, store: BackboneStore) -> None:
    """Once they are fetched again; twice is an error that leaves nothing half."""
    times, told = 0, 1
    app = app_of(source)
    manifest = Backbone.find(str(source)).manifest

    @app.middleware("http")
    async def flip(request: Request, go_on: Any) -> Response:
        nonlocal times
        answer = await go_on(request)
        if request.url.path.startswith(paths.TENSORS):
            body = bytearray(b"".join([chunk async for chunk in answer.body_iterator]))
            times += 1
            if times <= told:
                body[-1] ^= 1
            return Response(bytes(body), answer.status_code, dict(answer.headers))
        return answer  # type: ignore[no-any-return]

    with serving(app) as client:
        assert_whole(store, path := fetch_backbone(store, client, CUT), source)
        for file in (store.folder / "tensors").iterdir():
            file.unlink()
        times, told = 0, 2
        with pytest.raises(BackboneError, match=r"something on the way changes it"):
            fetch_backbone(store, client, CUT)
    assert not list((store.folder / "tensors").iterdir())
    assert store.find(manifest.sha256) == path


def test_more_bytes_than_the_manifest_says_are_not_taken(
    store: BackboneStore, source: Path
) -> None:
    manifest = Backbone.find(str(source)).manifest
    app = FastAPI()

    @app.get(paths.MANIFEST)
    def said() -> Response:
        return Response(manifest.canonical())

    @app.get(paths.BACKBONE + "/{_kind}/{_key}")
    def much(_kind: str, _key: str) -> Response:
        return Response(b"x" * 10_000_000)

    with serving(app) as client:
        with pytest.raises(BackboneError, match=r"config\.json .*the manifest says"):
            fetch_backbone(store, client, CUT)
        store.add_backbone(
            manifest, {f.name: (source / f.name).read_bytes() for f in manifest.files}
        )
        with pytest.raises(BackboneError, match=r"the manifest says"):
            fetch_backbone(store, client, CUT)
    assert store.total_bytes() < 1_000_000


def test_a_hostile_manifest(store: BackboneStore, source: Path) -> None:
    app, text = FastAPI(), json.loads(Backbone.find(str(source)).manifest.canonical())
    text["files"][0]["name"] = "../../config.json"

    @app.get(paths.MANIFEST)
    def said() -> Response:
        return Response(json.dumps(text))

    with serving(app) as client, pytest.raises(BackboneError, match=r"files\.0\.name"):
        fetch_backbone(store, client, CUT)


def test_a_backbone_that_changes_meanwhile(
    client: httpx.Client, source: Path, store: BackboneStore
) -> None:
    """The fetch starts again, and ends with the new one; a run that wants the old one is told."""
    before, said = Backbone.find(str(source)).sha256, list[str]()

    def change(here: int, _all: int) -> None:
        if here and Backbone.find(str(source)).sha256 == before:
            change_tensors(source, lambda _name, tensor: tensor + 1)

    path = fetch_backbone(store, client, CUT, progress=change, say=said.append)
    assert_whole(store, path, source)
    assert path.name != before
    assert "starting again with the new one" in said[0]
    with pytest.raises(
        (BackboneError, PlantError), match=rf"backbone {before[:12]} is wanted|has no tensor"
    ):
        fetch_backbone(store, client, CUT, sha256=before)


def test_private_blocks_stay(source: Path, store: BackboneStore) -> None:
    with serving(app_of(source, private="1,3")) as client:
        assert_whole(store, fetch_backbone(store, client, Cut(1, 3)), source, Cut(1, 3))
        with pytest.raises(ServerRefusalError, match=r"block [12] is private.*Choose a cut"):
            fetch_backbone(store, client, Cut(2, 3))
    assert not list(store.folder.rglob("*.part"))


def test_too_little_space(
    client: httpx.Client, store: BackboneStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(BackboneError, match=r"0\.\d MB more of the backbone .* 0\.0 MB free"):
        fetch_backbone(store, client, CUT)
    assert not (store.folder / "tensors").exists()


def test_two_fetch_at_once(client: httpx.Client, source: Path, store: BackboneStore) -> None:
    found: list[Path] = []

    def fetch() -> None:
        with httpx.Client(base_url=client.base_url, trust_env=False) as own:
            found.append(fetch_backbone(BackboneStore(store.folder), own, CUT))

    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert_whole(store, found[0], source)


def test_a_certificate_that_is_not_believed_is_no_matter_of_patience(store: BackboneStore) -> None:
    error = ssl.SSLCertVerificationError(1, "self-signed")
    error.verify_code, error.verify_message = 18, "self-signed"

    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("no") from error

    with (
        httpx.Client(transport=httpx.MockTransport(refuse), base_url="https://x") as client,
        pytest.raises(ServerAwayError, match="certificate of the server at x"),
    ):
        fetch_backbone(store, client, CUT)

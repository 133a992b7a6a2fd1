"""`site join`: all or nothing, with keys that are made here, and every fault known before the code is used up."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from fedsplit.core import whole_files
from fedsplit.core.errors import (
    ConfigError,
    DataError,
    PlantError,
    ServerAwayError,
    ServerRefusalError,
)
from fedsplit.plant import pki
from fedsplit.plant.site import keys
from fedsplit.plant.site.folder import SiteFolder
from fedsplit.plant.site.join import Joined, join
from fedsplit.plant.site.wish import Wish

from .server import Control, served

Join = Callable[..., Joined]


def modes(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mode & 0o777 for p in folder.rglob("*") if p.is_file()}


def test_a_site_folder_is_made(joined: Join, control: Control, pictures: Path) -> None:
    made = joined(cut="2,4", reading={"classes": "good,傷 deep"})
    folder = made.folder
    assert (made.again, made.cut, folder.settings.site.name) == (False, "2,4", "line-a")
    assert made.seen.classes == {"good": 6, "傷 deep": 6}
    assert folder.settings.site.data == f"folder:{pictures}"
    assert folder.settings.site.address == control.address
    certificate = keys.certificate(folder)
    assert certificate.issuer == control.ca.certificate.subject
    private = serialization.load_ssh_private_key(folder.node_key.read_bytes(), None)
    line = private.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    assert control.node_keys == [line.decode()]
    secret = {"site-key.pem", "node-key", "superexec.secret"}
    assert {n for n, mode in modes(folder.path).items() if mode == 0o600} == secret
    assert not (folder.path / keys.JOINING).exists()


def test_a_relative_source_is_kept_by_its_whole_path(
    joined: Join, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures.parent)
    assert joined(data=f"folder:{pictures.name}").folder.settings.site.data == f"folder:{pictures}"


def test_an_empty_folder_is_taken_and_another_is_not(joined: Join, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    joined()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match=r"not empty .*letter\.txt.*--dir"):
        joined(folder=tmp_path / "other")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["letter.txt"]


def fails(joined: Join, tmp_path: Path, match: str, kind: type[Exception], **wish: object) -> None:
    """The join fails with these words and leaves nothing."""
    before = {p.name for p in tmp_path.iterdir()}
    with pytest.raises(kind, match=match):
        joined(**wish)
    assert {p.name for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("wish", "kind", "match"),
    [
        ({"data": "folder:/no/such"}, DataError, "does not exist"),
        ({"data": "/no/such"}, ConfigError, "data source"),
        ({"data": ""}, ConfigError, "--data is missing"),
        ({"task": "", "data": "", "cut": "5,2"}, ConfigError, "(?s)--data.*--task.*--cut"),
        ({"task": "a/b"}, ConfigError, "--task a/b"),
    ],
)
def test_what_is_asked_for_is_checked_first(
    joined: Join,
    control: Control,
    tmp_path: Path,
    wish: dict[str, str],
    kind: type[Exception],
    match: str,
) -> None:
    fails(joined, tmp_path, match, kind, **wish)
    assert control.node_keys == []


def test_a_folder_without_pictures(joined: Join, control: Control, tmp_path: Path) -> None:
    (tmp_path / "none" / "good").mkdir(parents=True)
    fails(joined, tmp_path, "none", DataError, data=f"folder:{tmp_path / 'none'}")
    assert control.node_keys == []


@pytest.mark.parametrize(("ahead", "word"), [(-3600, "ahead of"), (3600, "behind"), (-6, "ahead")])
def test_another_clock(
    joined: Join, control: Control, tmp_path: Path, ahead: int, word: str
) -> None:
    control.clock_s = ahead
    fails(joined, tmp_path, rf"clock is [\d,]+ s {word}.*timedatectl", ConfigError)
    assert control.node_keys == []


def test_another_version(joined: Join, control: Control, tmp_path: Path) -> None:
    control.version = "9.9"
    fails(joined, tmp_path, r"server has fedsplit 9\.9.*not used up", ConfigError)
    assert control.node_keys == []


def test_another_federations_server(joined: Join, control: Control, tmp_path: Path) -> None:
    strange = replace(control.code(), ca_fingerprint="0" * 64)
    fails(joined, tmp_path, "not the one that gave this code", ServerAwayError, code=strange)
    assert control.node_keys == []


def test_a_certificate_for_another_name(pictures: Path, tmp_path: Path) -> None:
    with served(tmp_path / "server", hosts=("plant.example",)) as control:
        wish = Wish(
            code=control.code(), folder=tmp_path / "site", data=f"folder:{pictures}", task="t"
        )
        with pytest.raises(ServerAwayError, match=r"is for plant\.example, not for 127\.0\.0\.1"):
            join(wish, lambda _: None)
    assert not (tmp_path / "site").exists()
    assert control.node_keys == []


def test_nobody_answers(joined: Join, control: Control, tmp_path: Path) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        nobody = replace(control.code(), address=f"127.0.0.1:{bound.getsockname()[1]}")
        fails(joined, tmp_path, "nobody answers at 127", ServerAwayError, code=nobody)
    no_name = replace(control.code(), address="no-such-host.invalid:443")
    fails(joined, tmp_path, "no-such-host", ServerAwayError, code=no_name)


@pytest.mark.parametrize("what", ["plain http", "silence", "endless"])
def test_something_else_answers(
    joined: Join, control: Control, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsplit.plant.site.calls.look.__kwdefaults__", {"timeout_s": 0.5})
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            line, _ = listening.accept()
            with line:
                if what == "plain http":
                    line.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                elif what == "endless":
                    line.sendall(b"x" * 100_000)
                time.sleep(1)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        other = replace(control.code(), address=f"127.0.0.1:{listening.getsockname()[1]}")
        fails(joined, tmp_path, "server at 127|nobody answers", ServerAwayError, code=other)
        thread.join()


def test_the_servers_words_reach_the_person(joined: Join, control: Control, tmp_path: Path) -> None:
    used = control.code()
    joined(code=used)
    fails(
        joined, tmp_path, "used already; ask for a new one", ServerRefusalError,
        code=used, folder=tmp_path / "second",
    )  # fmt: skip
    unknown = replace(control.code(), id="0" * 8)
    fails(
        joined, tmp_path, "not known here", ServerRefusalError,
        code=unknown, folder=tmp_path / "second",
    )  # fmt: skip


def test_the_same_command_goes_on_after_a_cut_line(
    joined: Join, control: Control, tmp_path: Path
) -> None:
    control.cut_after_join = True
    code = control.code()
    with pytest.raises(ServerAwayError, match=r"line is cut\. Run the same command again"):
        joined(code=code)
    assert [p.name for p in (tmp_path / "site").iterdir()] == [keys.JOINING]
    assert joined(code=code).folder.settings.site.name == "line-a"
    assert len(set(control.node_keys)) == 1


def test_a_full_disk_behind_the_code_loses_nothing(
    joined: Join, control: Control, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, write = control.code(), whole_files.write_whole

    def full(path: Path, data: str, *, mode: int = 0o666) -> None:
        if path.name == "site.toml":
            raise OSError(28, "No space left on device")
        write(path, data, mode=mode)

    monkeypatch.setattr("fedsplit.plant.site.join.write_whole", full)
    with pytest.raises(ServerAwayError, match=r"No space left.*run the same command again"):
        joined(code=code)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="is no site folder"):
        SiteFolder.at(tmp_path / "site")
    assert joined(code=code).folder.settings.site.name == "line-a"
    assert len(set(control.node_keys)) == 1


def test_a_full_disk_before_it(
    joined: Join, control: Control, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsplit.plant.site.join.free_bytes", lambda _: 1_000_000)
    fails(joined, tmp_path, "has 1 MB free.*not used up", ConfigError)
    assert control.node_keys == []


def test_a_folder_that_cannot_be_made(joined: Join, control: Control, tmp_path: Path) -> None:
    fails(joined, tmp_path, "cannot be made", ConfigError, folder=Path("/proc/site"))
    assert control.node_keys == []


def test_a_member_keeps_its_keys_unless_it_is_asked(joined: Join, control: Control) -> None:
    joined()
    with pytest.raises(ConfigError, match=r"site 'line-a', which is a member.*--again"):
        joined()
    assert joined(again=True).again
    assert len(set(control.node_keys)) == 2


@pytest.mark.parametrize("why", ["revoked", "rotated", "over", "damaged"])
def test_a_site_that_is_no_member_joins_again_by_itself(
    joined: Join, control: Control, why: str
) -> None:
    if why == "over":
        control.days = 1e-6
    folder = joined().folder
    before = {p.name: p.read_bytes() for p in (folder.certificate, folder.node_key)}
    toml = (folder.path / "site.toml").read_text(encoding="utf-8")
    (folder.path / "site.toml").write_text(f"{toml}# ours\n", encoding="utf-8")
    control.days = 30
    if why == "damaged":
        folder.certificate.write_text("what is this?")
    elif why != "over":
        control.standing = why
    control.site = "line-b"
    again = joined(data="", task="")
    assert again.again
    assert again.folder.settings.site.name == "line-b"
    now = (folder.path / "site.toml").read_text(encoding="utf-8")
    assert now == f"{toml}# ours\n".replace('"line-a"', '"line-b"')
    assert all((folder.path / name).read_bytes() != old for name, old in before.items())
    # Used once: those before are gone.
    assert not (folder.path / keys.OLD).exists()
    assert len(control.reports) == (1 if why in ("over", "damaged") else 2)


def test_old_keys_stay_until_the_new_ones_were_used(joined: Join, control: Control) -> None:
    folder = joined().folder
    before = folder.node_key.read_bytes()
    control.standing = "revoked"
    real = control.node_keys

    class Once(list[str]):
        def append(self, key: str) -> None:
            super().append(key)
            control.standing = "nonsense"

    control.node_keys = Once(real)
    joined(data="", task="")
    assert (folder.path / keys.OLD / "node-key").read_bytes() == before


def test_a_site_that_joins_again_keeps_its_settings(joined: Join, control: Control) -> None:
    joined()
    control.standing = "revoked"
    with pytest.raises(ConfigError, match=r"task = 'other'; a site that joins again keeps"):
        joined(task="other")


def test_certificates_that_are_not_ours(
    joined: Join, control: Control, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = pki.csr(pki.new_key(), "x").decode()
    issue = control.certificate
    monkeypatch.setattr(control, "certificate", lambda _: issue(other))
    fails(joined, tmp_path, "certificate of another key", PlantError)


@contextlib.contextmanager
def a_proxy(port: int) -> Iterator[tuple[str, list[bytes]]]:
    """A proxy of an office that leads every CONNECT to `port` of loopback: its address, what it was asked."""
    asked: list[bytes] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            head = b""
            while b"\r\n\r\n" not in head:
                head += self.request.recv(4096)
            asked.append(head.split(b"\r\n")[0])
            self.request.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            with socket.create_connection(("127.0.0.1", port)) as there:
                back = threading.Thread(target=pump, args=[there, self.request], daemon=True)
                back.start()
                pump(self.request, there)

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


def test_through_a_proxy_and_not_to_loopback(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        served(tmp_path / "server", hosts=("plant.example", "127.0.0.1")) as control,
        a_proxy(control.port) as (proxy, asked),
    ):
        monkeypatch.setenv("HTTPS_PROXY", proxy)
        for host, times in (("127.0.0.1", 0), ("plant.example", 3)):
            code = replace(control.code(), address=f"{host}:{control.port}")
            folder = tmp_path / host
            wish = Wish(code=code, folder=folder, data=f"folder:{pictures}", task="t")
            join(wish, lambda _: None)
            assert len(asked) == times
        assert set(asked) == {f"CONNECT plant.example:{control.port} HTTP/1.1".encode()}

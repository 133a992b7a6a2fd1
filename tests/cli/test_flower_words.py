"""Flower's own commands against servers that are no good SuperLink: what they say becomes a cause and a cure."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedsplit.cli import flower
from fedsplit.cli.flower import FlowerCommands
from fedsplit.cli.flower_words import in_words, superlink_of
from fedsplit.core.errors import ConfigError, FederationError
from fedsplit.core.programs import flower_environment, free_port


@contextmanager
def answering(code: int) -> Iterator[str]:
    """A web server that answers everything so; its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(code)
            self.send_header("content-length", "6")
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def commands_at(address: str, home: Path) -> FlowerCommands:
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "plant"\n[superlink.plant]\naddress = "{address}"\ninsecure = true\n'
    )
    return FlowerCommands("plant", flower_environment(home))


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        (401, ("answered 401", "flwr login plant", "--database", "5 s ahead", "NTP")),
        (403, ("answered 403", "/v1/fleet/")),
        (200, ("is no SuperLink", "config.toml")),
    ],
)
def test_real_answers_in_words(code: int, parts: tuple[str, ...], tmp_path: Path) -> None:
    with answering(code) as address, pytest.raises(FederationError) as caught:
        commands_at(address, tmp_path).state("1")
    for part in (*parts, address, "`flwr list` said"):
        assert part in str(caught.value)


def test_nobody_there_and_a_name_that_is_not(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    commands = commands_at(address, tmp_path)
    with pytest.raises(FederationError, match=f"no SuperLink answers at {address}"):
        commands.state("1")
    commands.connection = "plnt"
    with pytest.raises(ConfigError, match=r"--superlink plnt: .*config.toml has no .*it has plant"):
        commands.state("1")


@pytest.mark.parametrize(("code", "part"), [(404, "is no SuperLink"), (502, "a proxy answers")])
def test_other_answers(code: int, part: str, tmp_path: Path) -> None:
    # As flwr 1.41 words it.
    said = f"Using SuperLink: plant\n\nServer error '{code} Nope' for url 'http://x/v1'\nFor more"
    commands_at("10.1.2.3:80", tmp_path)
    link = superlink_of("plant", {"FLWR_HOME": str(tmp_path)})
    assert part in str(in_words("run", said, link))
    assert str(in_words("run", "a\n\nsomething new", link)) == "`flwr run` failed: something new"


@pytest.mark.parametrize(
    ("address", "env", "caught"),
    [
        ("10.1.2.3:80", {"http_proxy": "http://p:1"}, "http_proxy"),
        (
            "10.1.2.3:80",
            {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "10.9.9.9"},
            "HTTPS_PROXY",
        ),
        ("10.1.2.3:80", {"http_proxy": "http://p:1", "no_proxy": "10.1.2.3"}, ""),
        ("plant.example:80", {"http_proxy": "http://p:1", "no_proxy": ".example"}, ""),
        ("10.1.2.3:80", {}, ""),
    ],
)
def test_a_proxy_in_the_way_is_named(
    address: str, env: dict[str, str], caught: str, tmp_path: Path
) -> None:
    commands_at(address, tmp_path)
    link = superlink_of("plant", env | {"FLWR_HOME": str(tmp_path)})
    assert link.proxy == caught
    words = str(in_words("run", "Connection to the SuperLink is unavailable.", link))
    assert (f"{caught} catches this address: add its host to no_proxy" in words) == bool(caught)


def test_loopback_goes_past_every_proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "plant.example")
    with answering(403) as address, pytest.raises(FederationError, match="answered 403"):
        commands_at(address, tmp_path).state("1")
    env = flower_environment(tmp_path)
    for host in ("127.0.0.1:1", "localhost:1", "[::1]:1"):
        commands_at(host, tmp_path)
        assert superlink_of("plant", env).proxy == ""


def test_a_long_folder_for_temporary_files_is_passed_by(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(flower.tempfile, "gettempdir", lambda: str(long))
    folder = flower._short_folder()
    assert folder.parent == Path("/tmp")
    folder.rmdir()
    monkeypatch.setattr(flower.os, "access", lambda *_: False)
    with pytest.raises(FederationError, match="set TMPDIR to a folder of at most 18 characters"):
        flower._short_folder()

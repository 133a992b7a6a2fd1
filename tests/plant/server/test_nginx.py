"""The nginx program: found or not, its version, its configuration checked before it starts."""

from __future__ import annotations

import os
import pwd
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest

from fedsplit.core.errors import ConfigError
from fedsplit.plant import paths
from fedsplit.plant.server import nginx
from fedsplit.plant.server.nginx_conf import Ports, render
from tests.plant.server.public_port import (
    SECRET,
    client,
    free_port,
    make_folder,
    needs_nginx,
    running,
    service,
)

PORTS = Ports(superlink=1001, encoder=1002, control=1003)


def program(folder: Path, says: str) -> str:
    """A program that prints what an nginx prints of itself."""
    path = folder / "nginx"
    path.write_text(f"#!/bin/sh\necho '{says}' >&2\n")
    path.chmod(0o755)
    return str(path)


ALL = "--with-http_ssl_module --with-http_v2_module --with-http_auth_request_module"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("nginx version: nginx/1.22.1", (1, 22, 1)),
        ("nginx version: nginx/1.18.0 (Ubuntu)", (1, 18, 0)),
        ("nginx version: openresty/1.27.1.2\nbuilt by gcc", (1, 27, 1)),
    ],
)
def test_versions(text: str, number: tuple[int, int, int]) -> None:
    assert nginx.version(text) == number


def test_an_nginx_that_will_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"no nginx at /nowhere/nginx: install it"):
        nginx.find("/nowhere/nginx")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nginx, "_PLACES", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no nginx on PATH .* install it .*mode = \"own\""):
        nginx.find()
    for says, text in (
        (
            f"nginx version: nginx/1.14.2\n{ALL}",
            r"nginx 1\.14\.2, which is too old: 1\.18\.0 or newer",
        ),
        (
            "nginx version: nginx/1.22.1\n--with-http_ssl_module",
            "without http_v2_module, http_auth",
        ),
        (
            f"nginx version: nginx/1.18.0\n{ALL} --without-http_limit_req_module",
            "without http_limit_req",
        ),
        ("caddy 2.7", "printed 'caddy 2.7 ', no version of nginx"),
    ):
        with pytest.raises(ConfigError, match=text):
            nginx.find(program(tmp_path, says))
    found = nginx.find(
        program(tmp_path, f"nginx version: nginx/1.18.0\n{ALL} --without-http_scgi_module")
    )
    assert found.without == {"http_scgi_module"}
    assert "-e" not in found.command(tmp_path / "nginx.conf")


def test_one_that_cannot_be_run(tmp_path: Path) -> None:
    path = tmp_path / "nginx"
    path.write_text("no program")
    path.chmod(0o755)
    with pytest.raises(ConfigError, match="cannot be run"):
        nginx.find(str(path))


@pytest.mark.parametrize("version", [(1, 18, 0), (1, 22, 1), (1, 25, 1), (1, 29, 3)])
def test_http2_is_asked_for_as_the_version_wants_it(
    tmp_path: Path, version: tuple[int, int, int]
) -> None:
    text = render(make_folder(tmp_path / "f"), PORTS, secret=SECRET, version=version)
    listen = next(line for line in text.splitlines() if "listen" in line)
    assert listen.endswith(" http2;") == (version < (1, 25, 1))
    assert ("http2 on;" in text) == (version >= (1, 25, 1))
    assert ("http2_max_field_size" in text) == (version < (1, 19, 7))


@needs_nginx
def test_the_real_nginx_takes_the_configuration_and_only_its_owner_may_read_it(
    tmp_path: Path,
) -> None:
    folder = make_folder(tmp_path / "a folder, ライン", public_page=True)
    command = nginx.prepare(folder, PORTS)
    assert command[-1] == str(folder.nginx_conf)
    assert SECRET in folder.nginx_conf.read_text()
    home = nginx.home_of(folder.nginx_conf)
    for path in (folder.nginx_conf, home / "page.login"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "a password" not in (home / "page.login").read_text()


@needs_nginx
def test_what_nginx_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "f")
    folder.loopback_certificate_key.write_text("no key")
    with pytest.raises(
        ConfigError, match=r"nginx refuses the configuration .*server-key.pem.*federation.toml"
    ):
        nginx.prepare(folder, PORTS)
    folder = make_folder(tmp_path / 'a "folder"')
    with pytest.raises(ConfigError, match="no quotation mark"):
        nginx.prepare(folder, PORTS)
    folder = make_folder(tmp_path / "page", public_page=True)
    folder.page_password.unlink()
    with pytest.raises(ConfigError, match=r"page.password cannot be read .*public = false"):
        nginx.prepare(folder, PORTS)


@needs_nginx
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("started_by", ["root", "the owner"])
def test_a_folder_of_an_ordinary_user(started_by: str) -> None:
    """Started by root for another user, and by that user: its worker can write what is too large for its memory."""
    nobody = pwd.getpwnam("nobody")
    with tempfile.TemporaryDirectory() as place:
        folder = make_folder(Path(place) / "plant")
        for path in (Path(place), *Path(place).rglob("*")):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        with service(folder) as superlink:
            ports = Ports(superlink.port, free_port(), free_port())
            as_whom: dict[str, Any] = {}
            if started_by == "the owner":
                as_whom = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            with running(folder, ports, **as_whom), client(folder) as asked:
                size = 8 << 20
                answer = asked.post(f"{paths.FLEET}/push-object", content=bytes(size))
                assert (answer.status_code, superlink.seen[0][3]) == (200, size)

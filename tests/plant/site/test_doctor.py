"""`fedsplit doctor` on a site: green where all is well, and each planted fault is found and named with a cure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsplit.core.cut import Cut
from fedsplit.model.backbone import Backbone
from fedsplit.model.store import BackboneStore
from fedsplit.plant import checks, pki
from fedsplit.plant.checks import Check
from fedsplit.plant.site import settings_text
from fedsplit.plant.site.doctor import site_checks
from fedsplit.plant.site.join import Joined
from tests.cli.conftest import Cli, cli, environment
from tests.model.stores import fill

from .server import Control, served

Join = Callable[..., Joined]
__all__ = ["cli", "environment"]


@pytest.fixture
def site(joined: Join, control: Control, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site that has just joined, and whose backbone nobody has fetched."""
    control.backbone.parts()  # read before somebody asks, as a server does
    for name in (
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    folder = joined().folder.path
    settings = folder / "site.toml"
    text = settings.read_text(encoding="utf-8").replace("ab" * 32, "")
    settings.write_text(text, encoding="utf-8")
    return folder


def found(folder: Path) -> dict[str, Check]:
    return {c.name: c for c in site_checks(folder, joining=True)}


def test_a_site_that_has_just_joined_is_green(site: Path) -> None:
    all_ = found(site)
    assert {name: c.level for name, c in all_.items() if c.level != "green"} == {}
    assert {
        "disk",
        "memory",
        "clock",
        "versions",
        "certificate",
        "server",
        "membership",
        "line",
        "data",
    } <= all_.keys()
    assert "12 images in 2 classes: good (6), 傷 deep (6)" in all_["data"].found
    assert "round trip" in all_["line"].found


def test_what_a_cut_lacks_of_the_backbone_is_said(site: Path) -> None:
    path = fill(BackboneStore(site / "backbones"), Backbone.find("vit-glyphs").path, Cut(1, 5))
    before = (site / "site.toml").read_text(encoding="utf-8")
    for cut, level in (("1,5", "green"), ("2,5", "yellow"), ("", "green")):
        values = {"backbone-sha256": path.name, "cut": cut}
        (site / "site.toml").write_text(settings_text.changed(before, values), encoding="utf-8")
        check = found(site)["backbone"]
        assert check.level == level
        assert ("MB that cut 2,5 needs" in check.found) == (level == "yellow")


def _data_gone(site: Path, control: Control) -> None:
    text = (site / "site.toml").read_text(encoding="utf-8")
    at = text.index("data = ")
    line = text[at : text.index("\n", at)]
    (site / "site.toml").write_text(
        text.replace(line, 'data = "folder:/nowhere/line-a"'), encoding="utf-8"
    )


def _clock_off(site: Path, control: Control) -> None:
    control.clock_s = -3600.0


def _other_version(site: Path, control: Control) -> None:
    control.version = "9.9.9"


def _revoked(site: Path, control: Control) -> None:
    control.refusal = 403, "revoked", "this site was revoked"


def _other_key(site: Path, control: Control) -> None:
    (site / "site-key.pem").write_bytes(pki.key_pem(pki.new_key()))


def _certificate_over(site: Path, control: Control) -> None:
    key = pki.read_key((site / "site-key.pem").read_bytes())
    old = pki.issue(control.ca, key.public_key(), common_name="line-a", days=-0.01, client=True)
    (site / "site.pem").write_bytes(old)


def _another_ca(site: Path, control: Control) -> None:
    (site / "ca.pem").write_bytes(pki.make_ca("Another", days=9).pem)


def _open_secrets(site: Path, control: Control) -> None:
    (site / "node-key").chmod(0o644)


def _backbone_gone(site: Path, control: Control) -> None:
    text = (site / "site.toml").read_text(encoding="utf-8")
    (site / "site.toml").write_text(
        text.replace('backbone-sha256 = ""', f'backbone-sha256 = "{"cd" * 32}"'), encoding="utf-8"
    )


def _no_server(site: Path, control: Control) -> None:
    text = (site / "site.toml").read_text(encoding="utf-8")
    (site / "site.toml").write_text(text.replace(control.address, "127.0.0.1:9"), encoding="utf-8")


def _no_name(site: Path, control: Control) -> None:
    text = (site / "site.toml").read_text(encoding="utf-8")
    (site / "site.toml").write_text(
        text.replace(control.address, "fl.invalid:8443"), encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("plant", "name", "said", "cure"),
    [
        (_data_gone, "data", "/nowhere/line-a", "see what it says"),
        (_clock_off, "clock", "3,600 s ahead of the server's", "timedatectl"),
        (_other_version, "versions", "9.9.9 at the server", "install the same"),
        (_revoked, "membership", "this site was revoked", "federation rotate line-a"),
        (_other_key, "certificate", "is not the key of", "join again with a new code"),
        (_certificate_over, "certificate", "over since", "join again with a new code"),
        (_another_ca, "server", "", "fedsplit doctor"),
        (_open_secrets, "secrets", "others may read", "chmod 600"),
        (_backbone_gone, "backbone", "cdcdcdcdcdcd", "fedsplit site fetch"),
        (_no_server, "server", "nobody answers at 127.0.0.1:9", "firewall"),
        (_no_name, "name", "fl.invalid has no address here", "DNS"),
    ],
)  # fmt: skip
def test_each_planted_fault_is_found(
    plant: Callable[[Path, Control], None],
    name: str,
    said: str,
    cure: str,
    site: Path,
    control: Control,
) -> None:
    plant(site, control)
    check = found(site)[name]
    assert check.level == "red"
    assert said in check.found
    assert cure in check.do


def test_a_disk_without_room_and_a_proxy_in_the_way_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    assert (checks.disk(tmp_path).level, checks.disk(tmp_path).found) == ("red", "1 MB free")
    caught = checks.proxies("fl.example:8443", {"https_proxy": "http://user:pw@office:3128"})
    assert (caught.level, "pw" in caught.found) == ("yellow", False)
    assert "no_proxy" in caught.do
    assert (
        checks.proxies("fl.example:8443", {"https_proxy": "x", "no_proxy": "fl.example"}).level
        == "green"
    )


def test_a_look_that_fails_hides_no_other_one() -> None:
    all_ = list(checks.look_at({"one": lambda: 1 / 0, "two": lambda: Check("two", "green", "")}))
    assert [(c.name, c.level) for c in all_] == [("one", "red"), ("two", "green")]
    assert "ZeroDivisionError" in all_[0].found


def test_the_command_prints_json_and_ends_with_1_on_red_alone(
    site: Path, control: Control, cli: Cli, tmp_path: Path
) -> None:
    done = cli("doctor", str(site), "--json")
    told = json.loads(done.stdout)
    # Nobody has started it: worth a look, and no fault.
    assert (done.returncode, told["level"]) == (0, "yellow"), done.stderr
    assert {"name", "level", "do"} <= told["checks"][0].keys()
    control.refusal = 403, "revoked", "this site was revoked"
    done = cli("doctor", str(site))
    assert done.returncode == 1
    assert "this site was revoked" in done.stdout
    done = cli("doctor", str(tmp_path / "empty"), "--json")
    assert done.returncode == 2
    assert "neither a federation folder" in json.loads(done.stdout)["error"]["message"]


def test_the_wrong_name_in_the_servers_certificate_is_told(
    joined: Join, site: Path, tmp_path: Path
) -> None:
    with served(tmp_path / "other", hosts=("other.example",)) as other:
        text = (site / "site.toml").read_text(encoding="utf-8")
        at = text.index("address = ")
        line = text[at : text.index("\n", at)]
        (site / "site.toml").write_text(
            text.replace(line, f'address = "{other.address}"'), encoding="utf-8"
        )
        (site / "ca.pem").write_bytes(other.ca.pem)
        check = found(site)["server"]
    assert check.level == "red"
    assert "other.example" in check.found or "127.0.0.1" in check.found

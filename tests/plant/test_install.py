"""A service is installed with an account of its own, or not at all. systemctl is a script that notes what it is told."""

from __future__ import annotations

import functools
import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsplit.core.errors import ConfigError, ServiceError
from fedsplit.plant import install as installing
from fedsplit.plant.install import install, remove
from fedsplit.plant.units import Place

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root installs for a whole machine")


class Machine:
    """Where units go, and what systemctl was told."""

    def __init__(self, root: Path) -> None:
        self.units, self.folder, self.calls = root / "units", root / "site", root / "calls"
        self.said: list[str] = []
        self.folder.mkdir()
        (self.folder / "site.toml").touch()

    def told(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    # Not tmp_path: another account may not enter that.
    root = Path(tempfile.mkdtemp(prefix="fedsplit-install-"))
    root.chmod(0o755)
    made = Machine(root)
    programs = root / "bin"
    programs.mkdir()
    for name in ("systemctl", "loginctl"):
        script = programs / name
        script.write_text(f'#!/bin/sh\necho "{name} $*" >> {made.calls}\ntest ! -e {root}/fails || {{ echo no such luck >&2; exit 5; }}\n')  # fmt: skip
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(root / "config"))
    monkeypatch.setattr(installing, "_MACHINE_UNITS", made.units)
    monkeypatch.setattr(installing, "_BOOTED", root)
    monkeypatch.setattr(installing, "ACCOUNT", "daemon")
    program = functools.partial(Place, program=Path("/bin/true"), prefix=Path("/usr"))
    monkeypatch.setattr(installing, "Place", program)
    yield made
    shutil.rmtree(root)


@as_root
def test_root_installs_for_the_machine_under_an_account(machine: Machine) -> None:
    assert install("site", machine.folder, say=machine.said.append) == "fedsplit-site.service"
    text = (machine.units / "fedsplit-site.service").read_text()
    assert "User=daemon\n" in text
    assert {p.owner() for p in [machine.folder, *machine.folder.iterdir()]} == {"daemon"}
    unit = "fedsplit-site.service"
    assert machine.told() == [f"systemctl {w}" for w in ("daemon-reload", f"enable {unit}", f"restart {unit}")]  # fmt: skip
    install("site", machine.folder, say=machine.said.append)  # once more: it is written anew
    remove("fedsplit-site.service", everywhere=True)
    assert not list(machine.units.iterdir())
    assert "systemctl disable --now fedsplit-site.service" in machine.told()


@as_root
def test_a_folder_of_a_persons_account_stays_that_persons(machine: Machine) -> None:
    os.chown(machine.folder, pwd.getpwnam("games").pw_uid, -1)
    install("server", machine.folder, port=8443, say=machine.said.append)
    assert "User=games\n" in (machine.units / "fedsplit-server.service").read_text()


@as_root
def test_data_that_the_account_cannot_read_is_told_before_anything_is_done(
    machine: Machine,
) -> None:
    secret = machine.folder.parent / "data"
    secret.mkdir(mode=0o700)
    with pytest.raises(
        ConfigError, match=r"account 'daemon' cannot read .*/data; give it the right"
    ):
        install("site", machine.folder, reads=[secret], say=machine.said.append)
    assert (machine.folder.owner(), machine.told(), machine.units.exists()) == ("root", [], False)


def test_a_person_installs_for_that_person(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    install("server", machine.folder, port=8443, say=machine.said.append)
    text = (machine.units.parent / "config/systemd/user/fedsplit-server.service").read_text()
    assert "User=" not in text
    assert "WantedBy=default.target\n" in text
    assert machine.told()[1] == "systemctl --user enable fedsplit-server.service"
    assert machine.told()[3].startswith("loginctl enable-linger ")


@as_root
def test_a_service_that_does_not_start_leaves_no_unit(machine: Machine) -> None:
    (machine.folder.parent / "fails").touch()
    with pytest.raises(ServiceError, match=r"systemctl daemon-reload ended with exit code 5: no such luck"):  # fmt: skip
        install("site", machine.folder, say=machine.said.append)
    assert not list(machine.units.iterdir())


@as_root
def test_the_name_of_another_folders_service(machine: Machine) -> None:
    install("site", machine.folder, say=machine.said.append)
    other = machine.folder.parent / "other"
    other.mkdir()
    with pytest.raises(ConfigError, match="is the service of another folder; give this one another name"):  # fmt: skip
        install("site", other, say=machine.said.append)
    assert install("site", other, name="line-b", say=machine.said.append) == "line-b.service"


def test_a_machine_without_systemd(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installing, "_BOOTED", machine.folder / "nowhere")
    with pytest.raises(ConfigError, match=r"systemd does not run .*fedsplit site run .*/site"):
        install("site", machine.folder, say=machine.said.append)

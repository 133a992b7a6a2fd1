"""systemd's units: read by systemd itself without a word, hardened, and quoted as systemd wants it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fedsplit.core.errors import ConfigError
from fedsplit.plant.units import Place, nightly_unit, server_unit, site_unit, timer

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "deploy" / "systemd").iterdir())
MOST_EXPOSED = 2.0
"""Of 10; systemd calls up to 2.3 good, and a service without any hardening has 9.6."""

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here: apt-get install systemd"
)  # fmt: skip


def place(folder: Path, **other: object) -> Place:
    """A place whose program is one that systemd finds, for `verify` looks for it."""
    return Place(folder=folder, program=Path("/bin/true"), prefix=Path("/usr"), **other)  # type: ignore[arg-type]


def units(where: Place) -> dict[str, str]:
    return {
        "fedsplit-server.service": server_unit(where, port=443),
        "fedsplit-site.service": site_unit(where),
        "fedsplit-nightly.service": nightly_unit(where, ["rounds=3", "task=defects"]),
        "fedsplit-nightly.timer": timer(),
    }


def check(folder: Path) -> None:
    """What systemd says of the units in a folder: nothing. It calls a key that it does not know a warning, with exit 0."""
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, sorted(folder.iterdir()))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if str(folder) in line or "Unknown" in line]
    assert not said
    assert done.returncode == 0, done.stderr


def exposure(unit: Path) -> float:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    (found,) = re.findall(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    return float(found)


@needs_systemd
@pytest.mark.parametrize("user", ["", "daemon"], ids=["a person's", "the machine's"])
def test_systemd_reads_them_and_finds_them_hardened(user: str, tmp_path: Path) -> None:
    for name, text in units(place(Path("/srv/fedsplit"), user=user)).items():
        (tmp_path / name).write_text(text)
    check(tmp_path)
    if user:
        for unit in tmp_path.glob("*.service"):
            assert exposure(unit) <= MOST_EXPOSED, unit.name


@needs_systemd
def test_the_examples_too(tmp_path: Path) -> None:
    """The machine that checks has neither the account nor the program of the examples."""
    for example in EXAMPLES:
        text = example.read_text(encoding="utf-8")
        assert "User=fedsplit\n" in text or example.suffix == ".timer"
        text = text.replace("User=fedsplit", "User=daemon")
        text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE)
        (tmp_path / example.name).write_text(text)
    check(tmp_path)
    for unit in tmp_path.glob("*.service"):
        assert exposure(unit) <= MOST_EXPOSED, unit.name


def test_the_examples_are_what_install_writes() -> None:
    where = Place(
        folder=Path("/srv/fedsplit"),
        program=Path("/usr/local/lib/fedsplit/bin/fedsplit"),
        prefix=Path("/usr/local/lib/fedsplit"),
        user="fedsplit",
    )
    wanted = units(where) | {"fedsplit-server.service": server_unit(where, port=8443)}
    wanted["fedsplit-nightly.service"] = nightly_unit(where)
    found = {path.name: path.read_text(encoding="utf-8") for path in EXAMPLES}
    assert found == wanted


@needs_systemd
def test_odd_names_of_folders(tmp_path: Path) -> None:
    """Blanks, systemd's own signs and Japanese reach the program as they are."""
    folder = Path('/srv/line 1 "a"/100%/検査 $HOME')
    for name, text in units(place(folder, user="daemon")).items():
        (tmp_path / name).write_text(text)
    check(tmp_path)
    text = site_unit(place(folder))
    assert r'ExecStart=/bin/true site run "/srv/line 1 \"a\"/100%%/検査 $$HOME"' in text
    assert 'WorkingDirectory=/srv/line 1 "a"/100%%/検査 $HOME\n' in text
    with pytest.raises(ConfigError, match="cannot hold"):
        site_unit(place(Path("/srv/a\nExecStartPre=/bin/rm")))


@pytest.mark.parametrize(
    ("where", "home", "temporary"),
    [
        (place(Path("/srv/f"), user="daemon"), "yes", "yes"),
        (place(Path("/home/kurz/f"), user="kurz"), "read-only", "yes"),
        (place(Path("/srv/f"), user="daemon", reads=(Path("/home/kurz/data"),)), "read-only", "yes"),
        (place(Path("/tmp/pilot"), user="daemon"), "yes", "no"),
    ],
)  # fmt: skip
def test_what_a_service_needs_is_not_hidden_from_it(
    where: Place, home: str, temporary: str
) -> None:
    text = site_unit(where)
    assert f"ProtectHome={home}\n" in text
    assert f"PrivateTmp={temporary}\n" in text


def test_only_a_port_below_1024_needs_a_capability() -> None:
    where = place(Path("/srv/f"), user="daemon")
    assert "AmbientCapabilities=CAP_NET_BIND_SERVICE\n" in server_unit(where, port=443)
    assert "AmbientCapabilities=\n" in server_unit(where, port=8443)

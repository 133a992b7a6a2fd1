"""federation.toml and site.toml: read strictly, every fault at once, other formats by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.core.errors import ConfigError
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.site.folder import SiteFolder

SITE = 'format = 1\n[site]\nname = "line-a"\naddress = "h:8443"\ntask = "t"\ndata = "folder:/d"\n'


def federation(path: Path, text: str) -> FederationFolder:
    (path / "federation.toml").write_text(text, encoding="utf-8")
    return FederationFolder.at(path)


def test_what_is_not_said_has_its_default(tmp_path: Path) -> None:
    folder = federation(tmp_path, 'format = 1\n[server]\nhost = "factory.example"\n')
    assert folder.settings.server.port == 8443
    assert folder.settings.backbone.path == "vit-glyphs"
    assert folder.certificate == tmp_path / "tls" / "server.pem"
    (tmp_path / "site.toml").write_text(SITE, encoding="utf-8")
    assert SiteFolder.at(tmp_path).settings.site.name == "line-a"


def test_certificates_of_ones_own_pki_serve_the_public_port_alone(tmp_path: Path) -> None:
    own = '[tls]\ncertificate = "/etc/pki/a.pem"\nkey = "own-key.pem"\n'
    folder = federation(tmp_path, f'format = 1\n[server]\nhost = "h"\n{own}')
    assert folder.certificate == Path("/etc/pki/a.pem")
    assert folder.certificate_key == tmp_path / "own-key.pem"
    assert folder.loopback_certificate == tmp_path / "tls" / "server.pem"


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    text = 'format = 1\n[server]\nhost = "h"\nport = 99999\nprot = 1\n[run]\nrouns = 3\n[backbone]\nprivate-blocks = "x"\n'
    with pytest.raises(ConfigError) as told:
        federation(tmp_path, text)
    for word in (
        "server.port = 99999",
        "server.prot: no such setting",
        "'rouns' is no setting",
        "private-blocks",
    ):
        assert word in str(told.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no line `format = 1`"),
        ('format = "1"\n', "has no line `format = 1`"),
        ("format = 0\n", "an older fedsplit made this federation folder"),
        ("format = 2\n", "a newer fedsplit made this federation folder"),
        ("format = \n", "is not TOML"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        federation(tmp_path, text)


def test_a_folder_of_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no federation folder: it holds no federation\.toml"):
        FederationFolder.at(tmp_path)
    with pytest.raises(ConfigError, match=r"is no site folder: it holds no site\.toml"):
        SiteFolder.at(tmp_path / "nowhere")


@given(text=st.text(max_size=300))
def test_any_text_gives_settings_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("any")
    (path / "site.toml").write_text("format = 1\n" + text, encoding="utf-8", errors="replace")
    with pytest.raises(ConfigError):
        SiteFolder.at(path)

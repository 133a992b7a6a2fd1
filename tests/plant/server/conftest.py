"""A federation folder with a CA, as `fedsplit server init` makes it, without the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsplit.plant import pki
from fedsplit.plant.server.folder import FederationFolder

CA = pki.make_ca("fedsplit test", days=3650)


@pytest.fixture
def folder(tmp_path: Path) -> FederationFolder:
    path = tmp_path / "plant"
    (path / "ca").mkdir(parents=True)
    (path / "secrets").mkdir()
    (path / "federation.toml").write_text(
        'format = 1\n[server]\nhost = "fl.example"\nport = 8443\n'
    )
    found = FederationFolder.at(path)
    found.ca.write_bytes(CA.pem)
    found.ca_key.write_bytes(CA.key_pem)
    found.proxy_secret.write_text("proxy's secret")
    return found

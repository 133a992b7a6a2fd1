"""Where a site serves, by `[serve]` of its site.toml. Without torch: `site run` checks it before anything starts."""

from __future__ import annotations

from pathlib import Path

from fedsplit.plant.site.folder import SiteFolder
from fedsplit.predict.serve.listening import Listening


def listening(folder: SiteFolder) -> Listening:
    """The place and who may ask; paths may start at the site folder."""
    said = folder.settings.serve

    def path(text: str) -> Path | None:
        return folder.path / Path(text).expanduser() if text else None

    return Listening(
        host=said.host,
        port=said.port,
        tls_cert=path(said.tls_cert),
        tls_key=path(said.tls_key),
        token_file=path(said.token_file),
    )

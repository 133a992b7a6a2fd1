"""Predicting at a site that holds only a part of the backbone: which part, and a grant for the rest.

The site's certificate opens the control service, which grants, and the encoder behind the same port.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedsplit import __version__
from fedsplit.core.cut import Cut, parse_cuts
from fedsplit.model.backbone import Backbone
from fedsplit.model.manifest import read_manifest
from fedsplit.model.store import BackboneStore
from fedsplit.plant.site.calls import ControlCalls
from fedsplit.plant.site.fetch import of_site
from fedsplit.plant.site.folder import SiteFolder
from fedsplit.plant.wire import GrantRequest
from fedsplit.predict.remote import Way
from fedsplit.transport.wiring import ClientTls


@dataclass(frozen=True)
class Held:
    """What of a backbone a device has, and which blocks the encoder runs."""

    path: Path
    cut: Cut
    blocks: int


def held(folder: SiteFolder, sha256: str, cut: Cut | None = None) -> Held:
    """The backbone of this digest in the site's store, with what its cut needs; fetched where it is not here.

    Without a `cut` the site's own holds; without that, all that is here runs here: the deeper the head, the less the
    activations tell. Raises BackboneError, ConfigError.
    """
    store = BackboneStore(folder.backbones, fetch=of_site(folder))
    if cut is None and folder.settings.site.cut:
        cut = parse_cuts(folder.settings.site.cut)[0]
    path = store.ready(sha256, cut)
    blocks = Backbone.find(str(path)).blocks
    return Held(path, _most_here(store, path, blocks) if cut is None else cut, blocks)


def _most_here(store: BackboneStore, path: Path, blocks: int) -> Cut:
    """The cut with the most blocks on the device of those that need nothing more."""
    manifest = read_manifest(path)

    def is_here(cut: Cut) -> bool:
        return not store.missing(manifest, cut)

    if not is_here(Cut(0, blocks)):
        store.ready(manifest.sha256, Cut(0, blocks))
    # A skeleton is made for each cut that is looked at, so few are.
    a, beyond = 0, blocks + 1
    while beyond - a > 1:
        middle = (a + beyond) // 2
        a, beyond = (middle, beyond) if is_here(Cut(middle, blocks)) else (a, middle)
    below, b = a - 1, blocks
    while b - below > 1:
        middle = (b + below) // 2
        below, b = (below, middle) if is_here(Cut(a, middle)) else (middle, b)
    return Cut(a, b)


def granted(folder: SiteFolder, digest: str, sha256: str, cut: Cut) -> Way:
    """A grant of the site's federation for the module of this digest. Raises PlantError, ConfigError."""
    site = folder.settings.site
    pair = (folder.certificate, folder.certificate_key)
    request = GrantRequest(
        version=digest, backbone_sha256=sha256, cut=str(cut), fedsplit_version=__version__
    )
    with ControlCalls(site.address, folder.ca, pair) as calls:
        answer = calls.grant(request)
    tls = ClientTls(root_ca=folder.ca, cert=folder.certificate, key=folder.certificate_key)
    return Way(site.address, answer.token, answer.grant, answer.seconds, tls)

"""Grants to predict: a member asks for one module version at one cut, and gets a token for the encoder.

A grant allows forwards alone, of a version in the federation's registry, within the limits of `[inference]` in
federation.toml. The encoder keeps these limits (transport/admission.py); how many grants a site gets is kept here.
"""

from __future__ import annotations

import logging
import threading

from fedsplit import __version__
from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Grant, Inference
from fedsplit.core.errors import ConfigError, EnrolmentError, RegistryError
from fedsplit.core.foreign import printable
from fedsplit.plant.server import audit
from fedsplit.plant.server.enrolment import Allowance
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.registry import Shown
from fedsplit.plant.wire import GrantAnswer, GrantRequest
from fedsplit.registry.registry import ModuleRegistry
from fedsplit.registry.version import Version
from fedsplit.transport import tokens
from fedsplit.transport.keys import read_key

log = logging.getLogger(__name__)


class InferenceGrants:
    """The grants of one federation; safe in several threads."""

    def __init__(self, folder: FederationFolder) -> None:
        """Raises ConfigError where the key that signs cannot be read."""
        self._folder = folder
        self._key = read_key(folder.encoder_secret)
        self._left: dict[str, Allowance] = {}
        self._lock = threading.Lock()

    def grant(self, shown: Shown, wanted: GrantRequest) -> GrantAnswer:
        """A grant for a member. Raises EnrolmentError, which says why there is none; ConfigError for a cut that is none."""
        limits = self._folder.settings.inference
        if not limits.enabled:
            raise EnrolmentError(
                "this federation lets no site predict with the encoder ([inference] enabled = false in its federation.toml)",
                kind="inference-off",
            )
        if wanted.fedsplit_version != __version__:
            raise EnrolmentError(
                f"the site has fedsplit {printable(wanted.fedsplit_version, limit=40)}, the server has {__version__}; "
                "install the same version on both",
                kind="other-version",
            )
        cut = self._cut(wanted.cut)
        version = self._version(wanted)
        self._count(shown.name)
        grant = Grant.to_predict(
            cut,
            Inference(max_rows=limits.rows, rows_per_minute=limits.rows_per_minute),
            site=shown.name,
            task=version.task,
            version=version.digest,
            backbone_sha256=version.backbone_sha256,
        )
        audit.record(
            self._folder, "granted", shown.name, module=version.digest, cut=str(cut), minutes=limits.minutes,
            rows=limits.rows,
        )  # fmt: skip
        seconds = 60 * limits.minutes
        return GrantAnswer(
            token=tokens.sign(grant, self._key, seconds), grant=grant, seconds=seconds
        )

    def _cut(self, text: str) -> Cut:
        cut = Cut.parse(text)
        if cut.a == cut.b:
            raise ConfigError(
                f"cut {cut} leaves nothing for the encoder, so no grant is needed: predict without --site"
            )
        private = self._folder.settings.backbone.private_blocks
        if private:
            inner = Cut.parse(private)
            # One private block alone between two activations would be easy to copy.
            if not (cut.a <= inner.a and inner.b <= cut.b):
                raise EnrolmentError(
                    f"cut {cut} splits the private blocks {inner} of this federation; a cut that holds all of them is wanted",
                    kind="private-blocks",
                )
        return cut

    def _version(self, wanted: GrantRequest) -> Version:
        try:
            with ModuleRegistry.open(self._folder.modules) as registry:
                versions = registry.of_digest(wanted.version)
        except (ConfigError, RegistryError) as err:
            log.warning("no grant for module version %s: %s", wanted.version[:12], err)
            raise EnrolmentError(
                "the server has no registry of modules that can be read: no run has ended there as yet, or it is damaged (on the "
                "server: `fedsplit module list`, and the log control.jsonl)",
                kind="no-registry",
            ) from err
        if not versions:
            raise EnrolmentError(
                f"module version {wanted.version[:12]} is not in the federation's registry: what its runs made is there "
                "(on the server: `fedsplit module list`). Has a file of the module's folder here been changed?",
                kind="unknown-module",
            )
        version = versions[0]
        if version.backbone_sha256 != wanted.backbone_sha256:
            raise EnrolmentError(
                f"module version {version.digest[:12]} belongs to backbone {version.backbone_sha256[:12]}, the site has "
                f"{wanted.backbone_sha256[:12]}; fetch that one (on the site: fedsplit site fetch)",
                kind="other-backbone",
            )
        return version

    def _count(self, site: str) -> None:
        """Raise EnrolmentError for a site that has asked too often."""
        most = self._folder.settings.inference.grants_per_hour
        with self._lock:
            left = self._left.setdefault(site, Allowance(most, every_s=3600 / most))
        if not left.any_left():
            raise EnrolmentError(
                f"site {printable(site)!r} has had its {most} grants to predict of this hour; wait, or have the server's "
                "administrator raise grants-per-hour in [inference] of federation.toml",
                kind="too-many",
            )
        left.take()

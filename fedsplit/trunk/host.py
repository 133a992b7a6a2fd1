"""Hosts the frozen backbone: one set of weights, a few module versions over it, a session a stream.

Implements core's EncoderHost for transport's server. Each version is a part of its own that shares the
frozen tensors, so versions do not disturb each other and cost only their module. What sessions train here: training.py;
what they predict with: registered.py.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import partial

from fedsplit import __version__
from fedsplit.core.cpus import usable_cpus
from fedsplit.core.encoder import Array, Capabilities, Grant, HostedEncoder
from fedsplit.core.errors import BackboneError, ConfigError, ProtocolError, RefusedError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.local_encoder import Graphs, LocalEncoder
from fedsplit.model.module import ModuleSpec
from fedsplit.model.part import Part
from fedsplit.model.split import server_part
from fedsplit.model.turns import FairTurns
from fedsplit.trunk.registered import Find, RegisteredVersions
from fedsplit.trunk.training import TRAINING_BYTES, Trainees

# The version of this round, the one before it, and room for a second run on the same host.
MAX_VERSIONS = 4
MAX_SPECS = 16


class BackboneHost:
    """A frozen backbone that many sites' sessions share. Safe to call from several threads."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        training_bytes: int = TRAINING_BYTES,
        modules: Find | None = None,
    ) -> None:
        """Read all blocks of the backbone. Raises BackboneError.

        `training_bytes` is what all that sessions train here, and deltas that nobody has collected, may take. `modules`
        finds the module versions that sites may predict with.
        """
        self.backbone = backbone
        bare = ModuleSpec(classes=("?",), kind="classifier")
        self._bare = server_part(backbone, bare)
        self._versions: OrderedDict[str, tuple[Part, Graphs]] = OrderedDict()
        self._registered = RegisteredVersions(backbone, self._bare, modules)
        self._trainees = Trainees(training_bytes)
        # As many computations as cores: more would only take time from each other, and a site's many from another's one.
        self._turns = FairTurns(usable_cpus())
        self._graphs: dict[ModuleSpec, Graphs] = {}
        """What graphs hold, by what the module is made of: measured once, not once a version."""
        self._lock = threading.Lock()

    def capabilities(self) -> Capabilities:
        """See core.encoder.EncoderHost."""
        with self._lock:
            versions = tuple(self._versions)
        return Capabilities(
            fedsplit_version=__version__,
            backbone=self.backbone.name,
            backbone_sha256=self.backbone.sha256,
            blocks=self.backbone.blocks,
            width=self.backbone.width,
            pooled_width=self.backbone.pooled_width,
            versions=versions,
        )

    def publish(self, version: str, tensors: bytes) -> None:
        """See core.encoder.EncoderHost. The oldest version goes when there are more than MAX_VERSIONS."""
        spec, values = module.unpack(tensors)
        try:
            wanted = module.server_names(self.backbone, spec)
            if values.keys() != wanted:
                odd = sorted(values.keys() ^ wanted)
                raise ProtocolError(
                    f"module version {version!r} does not fit backbone {self.backbone.name!r}: tensor "
                    f"{odd[0][:200]!r} is missing or not wanted"
                )
            part = server_part(self.backbone, spec, share=self._bare)
            module.load(part, values)
        except (BackboneError, ConfigError) as err:
            raise ProtocolError(f"module version {version!r}: {err}") from err
        with self._lock:
            self._trainees.forget(version)
            if len(self._graphs) >= MAX_SPECS:
                self._graphs.clear()
            self._versions[version] = part, self._graphs.setdefault(spec, {})
            self._versions.move_to_end(version)
            while len(self._versions) > MAX_VERSIONS:
                self._trainees.forget(self._versions.popitem(last=False)[0])

    def open(self, grant: Grant) -> HostedEncoder:
        """See core.encoder.EncoderHost."""
        if grant.backbone_sha256 != self.backbone.sha256:
            raise RefusedError(
                f"site {grant.site!r} was granted backbone {grant.backbone_sha256[:12]}, this encoder "
                f"hosts {self.backbone.sha256[:12]} ({self.backbone.name}): "
                f"{self.backbone.differs(grant.backbone_sha256)}; use the same model files"
            )
        if not grant.a < grant.b <= self.backbone.blocks:
            raise RefusedError(
                f"cut {grant.cut} is not for this encoder: 0 <= a < b <= {self.backbone.blocks} is wanted"
            )
        if grant.inference is not None:
            part, graphs = self._registered.part(grant.version)
        else:
            part, graphs = self._published(grant.version)
        turn = partial(self._turns.of, (grant.run, grant.site))
        if grant.training is None:
            return LocalEncoder(part, grant.cut, turn=turn, graphs=graphs)
        encoder = self._trainees.open(part, grant, grant.training, turn=turn, graphs=graphs)
        with self._lock:
            if grant.version not in self._versions:  # evicted meanwhile: nobody can collect it
                self._trainees.forget(grant.version)
        return encoder

    def _published(self, version: str) -> tuple[Part, Graphs]:
        """Raises RefusedError."""
        with self._lock:
            found = self._versions.get(version)
            known = tuple(self._versions)
        if found is None:
            raise RefusedError(
                f"module version {version!r} is not published here; known: {known or 'none'}"
            )
        return found

    def collect(self, version: str) -> dict[str, dict[str, Array]]:
        """See core.encoder.EncoderHost."""
        with self._lock:
            known = tuple(self._versions)
        if version not in known:
            raise RefusedError(
                f"module version {version!r} is not here, so nothing that was trained on it is; known: {known or 'none'}"
            )
        return self._trainees.collect(version)

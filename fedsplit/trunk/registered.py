"""Module versions that sites predict with, by their digest: read from a registry of modules when one is asked for.

Kept apart from what runs publish, so that predicting never evicts a round's version. The registry may be made, and filled,
while the encoder runs: it is looked at each time.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from fedsplit.core.errors import FedsplitError, RefusedError
from fedsplit.core.foreign import printable
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.local_encoder import Graphs
from fedsplit.model.part import Part
from fedsplit.model.split import server_part
from fedsplit.registry.registry import ModuleRegistry

log = logging.getLogger(__name__)

MAX_REGISTERED = 4
"""Versions held at once; each costs its module's bytes."""


Find = Callable[[str], Path]
"""A module's digest -> the folder of its files, which have that digest. Raises FedsplitError."""


def in_registry(folder: Path) -> Find:
    """The modules of a registry, which may not be there as yet."""

    def find(digest: str) -> Path:
        with ModuleRegistry.open(folder) as registry:
            versions = registry.of_digest(digest)
            if not versions:
                raise RefusedError(
                    f"it is not in the registry {folder}; `fedsplit module list` there shows what is"
                )
            registry.files(versions[0])  # whole, or an error
            return registry.folder(versions[0])

    return find


class RegisteredVersions:
    """Module versions by digest over one backbone. Safe to call from several threads."""

    def __init__(self, backbone: Backbone, bare: Part, find: Find | None) -> None:
        """`bare` lends its frozen tensors. Without `find` there is nothing to predict with here."""
        self._backbone, self._bare, self._find = backbone, bare, find
        self._parts: OrderedDict[str, Part] = OrderedDict()
        self._lock = threading.Lock()

    def part(self, digest: str) -> tuple[Part, Graphs]:
        """All blocks with the module of this digest. Raises RefusedError where it cannot be had."""
        with self._lock:  # also while it is read: who asks for the same one meanwhile has it then
            part = self._parts.get(digest)
            if part is None:
                part = self._parts[digest] = self._read(digest)
            self._parts.move_to_end(digest)
            while len(self._parts) > MAX_REGISTERED:
                self._parts.popitem(last=False)
        # Nothing is kept of a forward, so what graphs hold is never asked for.
        return part, {}

    def _read(self, digest: str) -> Part:
        if self._find is None:
            raise RefusedError(
                "this encoder has no registry of modules, so nobody can predict with it: start it with --registry DIR"
            )
        try:
            folder = self._find(digest)
            spec, tensors = module.load_exported(folder, self._backbone)
            part = server_part(self._backbone, spec, share=self._bare)
            names = module.server_names(self._backbone, spec)
            module.load(part, {name: tensors[name] for name in names})
        except (FedsplitError, OSError) as err:
            raise RefusedError(
                f"the encoder cannot predict with module version {digest[:12]}: {printable(err, limit=600)}"
            ) from err
        log.info("module version %s is read from %s", digest[:12], folder)
        return part

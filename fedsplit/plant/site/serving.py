"""Predictions at a site, beside its training: `[serve]` of site.toml, in the resident runtime's process.

The module is the one that modules/current.json names for the site's task, and another one is swapped in when that changes.
Backbone tensors that training holds are shared. Training is never paused: requests and steps share the machine's cores.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fedsplit.core.closing import Closing
from fedsplit.core.cut import Cut
from fedsplit.core.errors import BackboneError, ConfigError, ServiceError
from fedsplit.core.foreign import read_json
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import wanted_backbone
from fedsplit.model.store import BackboneStore
from fedsplit.plant.logs import FILES, JsonLines
from fedsplit.plant.site.folder import SiteFolder
from fedsplit.plant.site.listening import listening
from fedsplit.predict.answers import Answer
from fedsplit.predict.found import FoundModule
from fedsplit.predict.predictor import Predictor, load_predictor
from fedsplit.predict.serve.answering import Answering
from fedsplit.predict.serve.follow import Follow
from fedsplit.predict.serve.running import Serving
from fedsplit.predict.usage import Usage
from fedsplit.site.runtime import SiteRuntime

log = logging.getLogger(__name__)

LOG = "serve.jsonl"
_GRACE_S = 2.0
"""The runtime has to end within five seconds."""
_AGAIN_S = 10.0
_MB = 10**6


class SiteServing(Closing):
    """What a site serves. `tend` is called every few seconds; `told` is what runtime.json says of it."""

    def __init__(self, folder: SiteFolder, runtime: SiteRuntime) -> None:
        """Settings that cannot be used and a port that is taken cost the service, never the training: they are told."""
        self._folder, self._runtime = folder, runtime
        self._usage: Usage | None = None
        self._next = 0.0
        self._fault = ""
        self._serving: Serving | None = None
        self._stack = ExitStack()
        folder.logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        most = folder.settings.retention.log_mb * _MB // FILES
        self._lines = self._stack.enter_context(
            JsonLines(folder.logs / LOG, "serve", max_bytes=most)
        )
        self._answering = self._stack.enter_context(Answering(told=self._count))
        self._follow = self._stack.enter_context(Follow(self._answering, self._find, self._load))
        self.tend()

    def tend(self) -> None:
        """Listen, where that could not be done before; write what was counted."""
        if self._usage is not None:
            self._usage.flush()
        if self._serving is not None or time.monotonic() < self._next:
            return
        try:
            self._serving = Serving(
                self._answering, listening(self._folder), access=self._lines.add, fault=lambda: self._follow.fault, grace_s=_GRACE_S
            )  # fmt: skip
        except (ServiceError, ConfigError) as err:
            self._next = time.monotonic() + _AGAIN_S
            if str(err) != self._fault:
                log.error("nothing is served: %s; it is tried again", err)
            self._fault = str(err)
            return
        self._fault = ""
        log.info("serving at %s", self._serving.address)

    @property
    def told(self) -> dict[str, Any]:
        """Address, module, fault and counts."""
        predictor = self._answering.predictor
        found: dict[str, Any] = {
            "address": self._serving.address if self._serving else "",
            "module": predictor.found.digest if predictor else "",
            "fault": self._fault or self._follow.fault,
        }
        return found | (self._serving.counts.shown() if self._serving else {})

    def close(self) -> None:
        """Answer what was taken, and end."""
        if self._serving is not None:
            self._serving.close()
        self._stack.close()
        if self._usage is not None:
            self._usage.close()

    def _find(self) -> FoundModule | None:
        """The module in use by current.json; None where no module of the task is. Raises ConfigError."""
        file, task = self._folder.current_modules, self._folder.settings.site.task
        try:
            digest = read_json(file, limit=1 << 16).get(task, "")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, AttributeError) as err:
            raise ConfigError(f"{file} cannot be read ({err}); the site writes it anew") from err
        if not digest:
            return None
        if not isinstance(digest, str) or Path(digest).name != digest:
            raise ConfigError(f"{file} names no module for {task}; the site writes it anew")
        return FoundModule(self._folder.modules / digest, digest, f"{task} (production)", task)

    def _load(self, found: FoundModule) -> Predictor:
        """The module on the whole backbone; tensors that are not here are fetched. Raises FedsplitError."""
        fetch = self._runtime.fetch
        try:
            return self._on(found, "")
        except BackboneError:
            if fetch is None:
                raise
        # Only now: a server that is away is waited for.
        store = BackboneStore(self._folder.backbones, fetch=fetch)
        sha256 = wanted_backbone(found.folder).sha256
        blocks = Backbone.find(str(store.ready(sha256, None))).blocks
        return self._on(found, str(store.ready(sha256, Cut(blocks, blocks))))

    def _on(self, found: FoundModule, backbone: str) -> Predictor:
        return load_predictor(
            found,
            backbone=backbone,
            pixel_max=self._folder.settings.reading.pixel_max,
            threads=self._folder.settings.machine.threads,
            weights=self._runtime.kept.parts.frozen,
        )

    def _count(self, predictor: Predictor, answers: Sequence[Answer]) -> None:
        digest = predictor.found.digest
        if self._usage is None or self._usage.module != digest:
            if self._usage is not None:
                self._usage.close()
            self._usage = Usage(self._folder.path, digest)
        classes = [answer for answer in answers if not answer.is_number]
        self._usage.add([answer.name for answer in classes], [answer.value for answer in classes])

"""What sessions train at the encoder: who has which copy, what is left of it, and how much memory all of it may take.

`Trainees` is BackboneHost's book of it. A session's copy becomes its delta when the session ends, and is gone when the
ServerApp has collected it or its version is evicted. Of a site's sessions on one version the last one counts: a site that
lost its stream begins anew.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial

from torch import nn

from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Array, EncoderTraining, Grant, HostedEncoder
from fedsplit.core.errors import OverloadedError, RefusedError
from fedsplit.model.local_encoder import Graphs, Turn
from fedsplit.model.part import Part
from fedsplit.model.probing_encoder import ProbingEncoder
from fedsplit.model.trained_tensors import TrainedTensors, trained_at, twin
from fedsplit.model.training_encoder import TrainingEncoder
from fedsplit.model.turns import Turns

TRAINING_BYTES = 4 << 30
SHARED = ""
"""Stands where a site's name does for the one copy of shared training."""

_RETRY_S = 2.0
# Values, the snapshot that forwards run with, a gradient or direction, and an older snapshot that a graph holds.
_COPIES = {"sgd": 4, "adamw": 6}

Delta = dict[str, Array]
Start = Mapping[str, nn.Parameter]


class _Copy:
    """Tensors in training; after `finish` what is left of them."""

    def __init__(self, start: Start, training: EncoderTraining) -> None:
        self.held_bytes = copy_bytes(start, training)
        self.tensors: TrainedTensors | None = TrainedTensors(start, training)
        self.turns = Turns()
        self._delta: Delta = {}

    def finish(self) -> None:
        """Keep the delta alone."""
        self._delta = self.delta()
        self.tensors = None
        self.held_bytes = sum(d.nbytes for d in self._delta.values())

    def delta(self) -> Delta:
        """What has been trained so far; empty when no step was taken."""
        if self.tensors is None:
            return self._delta
        return self.tensors.delta() if self.tensors.steps else {}


def _check_leave(part: Part, cut: Cut, leave: int) -> None:
    """Raise RefusedError for a block that steps cannot leave after."""
    if leave and not (cut.pooled(part.backbone.blocks) and cut.a < leave <= cut.b):
        raise RefusedError(
            f"steps are to leave after block {leave} of cut {cut}: {cut.a + 1} to {cut.b} are wanted, of a cut that ends "
            f"at the last block"
        )


def copy_bytes(start: Start, training: EncoderTraining) -> int:
    """What one copy is counted with while it trains."""
    return _COPIES[training.optimizer] * sum(p.numel() * p.element_size() for p in start.values())


class Trainees:
    """The copies of all versions. Safe to call from several threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._latest: dict[str, dict[str, _Copy]] = {}
        """version -> site -> the copy that counts."""
        self._live: set[_Copy] = set()
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """What live copies are counted with, and the deltas that wait to be collected."""
        with self._lock:
            return self._held_bytes()

    def open(
        self, part: Part, grant: Grant, training: EncoderTraining, *, turn: Turn, graphs: Graphs
    ) -> HostedEncoder:
        """A session that trains. Raises RefusedError when it cannot, OverloadedError when there is no room."""
        start = trained_at(part, grant.cut, training.lora)
        if not start:
            raise RefusedError(
                f"encoder-training={training.mode}: the module has no tensors to train on blocks {grant.a} to "
                f"{grant.b - 1}; use encoder-training=frozen, or another module or cut"
            )
        _check_leave(part, grant.cut, training.leave)
        own = twin(part)
        if training.mode == "shared":
            tensors, turns = self._shared(part, grant.version, training)
            return TrainingEncoder(
                own,
                grant.cut,
                tensors,
                weight=training.weight,
                leave=training.leave,
                turns=turns,
                turn=turn,
                graphs=graphs,
            )
        copy = self._begin(start, grant, training)
        assert copy.tensors is not None, "a copy that has just begun is in training"
        end = partial(self._end, grant.version, grant.site, copy)
        if training.mode == "zeroth-order":
            return ProbingEncoder(own, grant.cut, copy.tensors, on_close=end, turn=turn)
        return TrainingEncoder(
            own,
            grant.cut,
            copy.tensors,
            leave=training.leave,
            on_close=end,
            turn=turn,
            graphs=graphs,
        )

    def collect(self, version: str) -> dict[str, Delta]:
        """site -> delta, of all who took a step; what it gives is forgotten here."""
        with self._lock:
            found = self._latest.pop(version, {})
        deltas = {site: copy.delta() for site, copy in found.items()}
        return {site: delta for site, delta in deltas.items() if delta}

    def forget(self, version: str) -> None:
        """Drop what was trained on a version that is evicted."""
        with self._lock:
            self._latest.pop(version, None)

    def _begin(self, start: Start, grant: Grant, training: EncoderTraining) -> _Copy:
        with self._lock:
            of_version = self._latest.setdefault(grant.version, {})
            of_version.pop(grant.site, None)
            copy = self._make(start, training)
            of_version[grant.site] = copy
            self._live.add(copy)
            return copy

    def _end(self, version: str, site: str, copy: _Copy) -> None:
        with self._lock:
            if copy not in self._live:
                return
            self._live.remove(copy)
            if self._latest.get(version, {}).get(site) is copy:
                copy.finish()

    def _shared(
        self, part: Part, version: str, training: EncoderTraining
    ) -> tuple[TrainedTensors, Turns]:
        # The copy has the tensors of all blocks, for sites of every cut; a session steps those of its own.
        start = trained_at(part, Cut(0, part.backbone.blocks), training.lora)
        agreed = training.model_copy(update={"weight": 1.0, "leave": 0})
        with self._lock:
            of_version = self._latest.setdefault(version, {})
            if SHARED not in of_version:
                of_version[SHARED] = self._make(start, agreed)
            copy = of_version[SHARED]
        tensors = copy.tensors
        assert tensors is not None, "a shared copy is not finished, only collected"
        if tensors.training != agreed:
            raise RefusedError(
                f"version {version!r} is trained with {tensors.training}, the token asks for {agreed}: sites that "
                "share a copy train it alike"
            )
        return tensors, copy.turns

    def _make(self, start: Start, training: EncoderTraining) -> _Copy:
        wanted, held = copy_bytes(start, training), self._held_bytes()
        if held + wanted > self._max_bytes:
            raise OverloadedError(
                f"training at the encoder holds {held} bytes and one more session wants {wanted}, {self._max_bytes} "
                "are allowed: come back when other sites are done, or train fewer tensors at the encoder",
                retry_after_s=_RETRY_S,
            )
        return _Copy(start, training)

    def _held_bytes(self) -> int:
        counted = self._live.union(*(v.values() for v in self._latest.values()))
        return sum(copy.held_bytes for copy in counted)

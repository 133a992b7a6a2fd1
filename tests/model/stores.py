"""Stores for tests, filled from a whole folder without a network."""

from __future__ import annotations

from pathlib import Path

from fedsplit.core.cut import Cut
from fedsplit.model.backbone import Backbone
from fedsplit.model.manifest import spans
from fedsplit.model.store import BackboneStore


def fill(store: BackboneStore, source: Path, cut: Cut | None) -> Path:
    """Put the parts of a whole folder that a cut needs into a store; None: the small files alone. The partial folder."""
    manifest = Backbone.find(str(source)).manifest
    path = store.add_backbone(
        manifest, {f.name: (source / f.name).read_bytes() for f in manifest.files}
    )
    where = {span.name: span for span in spans(source)}
    for tensor in store.missing(manifest, cut) if cut else []:
        span = where[tensor.name]
        data = span.file.read_bytes()[span.offset : span.offset + span.bytes]
        store.add_tensor(tensor, [data[:100], data[100:]])
    return path

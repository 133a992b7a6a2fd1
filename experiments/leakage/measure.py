"""All attacks on one scene, row by row. Called by __main__.py and by the test."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from experiments.leakage import inputs, labels, steps
from experiments.leakage.scene import Scene
from experiments.leakage.table import Row
from fedsplit.core.cut import Cut
from fedsplit.training.data import partition

CODECS = ("fp32", "fp16")
UPLINK, GRADIENT, BACK = "h, up", "dz, up", "z, back"
_CLUSTER = "k-means"
_QUERIES = 2
_ONE_BY_ONE = 256


def label_rows(scene: Scene, *, epochs: int) -> Iterator[Row]:
    """What each mode tells of the labels."""
    cut = Cut(1, scene.backbone.blocks - 1)
    for mode in steps.MODES:
        for codec in CODECS if mode in {"head+tail", "frozen"} else CODECS[:1]:
            seen = steps.train(scene, mode, cut, codec=codec, epochs=epochs, queries=_QUERIES)
            yield from _rows_of(scene, seen, mode, codec)
    yield from _losses_one_by_one(scene, cut, epochs=epochs)


def _rows_of(scene: Scene, seen: steps.Seen, mode: str, codec: str) -> Iterator[Row]:
    def row(reads: str, attack: str, unit: str, found: tuple[float, float]) -> Row:
        return Row(
            scene=scene.name,
            target="labels",
            mode=mode,
            cut=str(seen.cut),
            codec=codec,
            reads=reads,
            attack=attack,
            unit=unit,
            value=found[0],
            reference=found[1],
        )

    if "dz" in seen.tensors:
        dz = seen.tensors["dz"]
        yield row(GRADIENT, _CLUSTER, "share", labels.clustering(dz, seen.labels))
        yield row(GRADIENT, "norm score", "area", (labels.norm_score(dz, seen.labels), 0.5))
    else:
        yield row("no gradient up", "none", "none", (0.0, 0.0))
    if "losses" in seen.tensors:
        of_samples = seen.tensors["losses"][seen.steps_of]
        found = labels.clustering(of_samples, seen.labels)
        yield row("losses of a batch, up", _CLUSTER, "share", found)
    yield row(UPLINK, _CLUSTER, "share", labels.clustering(seen.tensors["h"], seen.labels))
    yield row(
        BACK,
        f"{_CLUSTER} on the public backbone's features",
        "share",
        labels.clustering(steps.features(seen), seen.labels),
    )
    chance = float(np.bincount(seen.labels).max() / len(seen.labels))
    yield row("module, to the ServerApp", "its own prediction", "share", (seen.accuracy, chance))


def _losses_one_by_one(scene: Scene, cut: Cut, *, epochs: int) -> Iterator[Row]:
    """Zeroth order at its worst: batches of one, so that every loss is one sample's."""
    before = steps.train(scene, "zeroth-order", cut, epochs=epochs, queries=_QUERIES)
    first = np.arange(min(_ONE_BY_ONE, len(scene.site)))
    seen = steps.train(
        scene, "zeroth-order", cut, epochs=1, batch=1, queries=_QUERIES, indices=first, after=before
    )
    losses = seen.tensors["losses"]
    # The level of the loss tells how sure the model is; the differences along directions tell more of the label.
    blind, chance = labels.clustering(losses[:, 0::2] - losses[:, 1::2], seen.labels)
    shares = steps.log_shares(scene, before, seen)
    knowing = labels.of_losses(losses[:, 0], shares, seen.labels)
    most = float(np.bincount(seen.labels).max() / len(seen.labels))
    for attack, value, reference in [
        (_CLUSTER, blind, chance),
        ("matched with the round's first module", knowing, most),
    ]:
        yield Row(
            scene=scene.name,
            target="labels",
            mode="zeroth-order, batch of 1",
            cut=str(cut),
            codec="fp32",
            reads="losses of a sample, up",
            attack=attack,
            unit="share",
            value=value,
            reference=reference,
        )


def class_rows(scene: Scene, *, epochs: int, sites: int = 5) -> Iterator[Row]:
    """Which classes a site has, read off the change of its classifier by whoever aggregates."""
    cut = Cut(1, scene.backbone.blocks - 1)
    found = []
    for share in partition(scene.site.labels, "pathological:2", sites, 0):
        seen = steps.train(scene, "frozen", cut, epochs=epochs, indices=share)
        found.append(labels.classes_of(seen.bias_change, seen.labels))
    value, reference = np.mean(found, axis=0)
    yield Row(
        scene=scene.name,
        target="classes",
        mode="all that average a classifier",
        cut=str(cut),
        codec="fp32",
        reads="classifier's change, to the ServerApp",
        attack="biases that rose most",
        unit="share",
        value=float(value),
        reference=float(reference),
    )


def image_rows(scene: Scene, *, images: int) -> Iterator[Row]:
    """What h tells of the images, the same in every mode that sends it."""
    truth = np.stack([scene.transform.resize(scene.site.image(i)) for i in range(images)])
    grey = inputs.psnr(truth, inputs.mean_colour(truth))
    for a in (0, 1, 2):
        for codec in CODECS:
            up = inputs.Uplink(scene, a, codec)
            h = up(truth)
            for attack, decode in _decoders(scene, a, up):
                yield Row(
                    scene=scene.name,
                    target="images",
                    mode="all that send h",
                    cut=f"{a},b",
                    codec=codec,
                    reads=UPLINK,
                    attack=attack,
                    unit="dB",
                    value=inputs.psnr(truth, decode(h)),
                    reference=grey,
                )


def _decoders(scene: Scene, a: int, up: inputs.Uplink) -> Iterator[tuple[str, inputs.Decoder]]:
    if a == 0:
        yield "pinv", inputs.pseudo_inverse(scene, grey=False)
    if a == 0 and scene.grey:
        yield "pinv, grey known", inputs.pseudo_inverse(scene, grey=True)
    for kind, public in scene.public.items():
        decode = inputs.linear_decoder(up(public), public, inputs.patch_side(scene))
        yield f"linear decoder, learned on {kind}", decode

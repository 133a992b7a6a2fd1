"""Predicting with the encoder in between, over real gRPC: the whole model's outputs, to the bit; what is refused, and why."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Grant, Inference
from fedsplit.core.errors import BackboneError, ConfigError, RefusedError, UnreachableError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.split import SplitModel, device_part, whole_model
from fedsplit.predict.predictor import load_predictor
from fedsplit.predict.remote import RemoteMiddle, Way
from fedsplit.registry.registry import ModuleRegistry
from fedsplit.registry.version import Facts
from fedsplit.training.data import load_source
from fedsplit.transport import tokens
from fedsplit.transport.server import EncoderServer
from fedsplit.trunk.host import MAX_VERSIONS, BackboneHost
from fedsplit.trunk.registered import MAX_REGISTERED, in_registry
from tests.model.kinds import SPECS, away_from_zero
from tests.model.whole import make_batch
from tests.tiny import CONFIGS
from tests.trunk.wire import KEY, dial, grant, packed

DIGEST = "ab" * 32
KINDS = tuple(SPECS)


class Modules:
    """A registry of folders by digest."""

    def __init__(self, **folders: Path) -> None:
        self.folders = folders
        self.asked: list[str] = []

    def __call__(self, digest: str) -> Path:
        self.asked.append(digest)
        if digest not in self.folders:
            raise BackboneError("the registry has no such module")
        return self.folders[digest]


def to_predict(backbone: Backbone, cut: Cut, version: str = DIGEST, **limits: int) -> Grant:
    inference = Inference(**{"max_rows": 1000, "rows_per_minute": 100_000} | limits)
    return grant(backbone, cut, version=version, inference=inference, max_steps=1000, round=0)


def way_to(server: EncoderServer, what: Grant, seconds: float = 60.0) -> Callable[[], Way]:
    return lambda: Way(server.address, tokens.sign(what, KEY, seconds), what, seconds)


@contextmanager
def serving(backbone: Backbone, modules: Modules | None, **more: Any) -> Iterator[EncoderServer]:
    server = EncoderServer(BackboneHost(backbone, modules=modules), key=KEY, **more)
    try:
        yield server
    finally:
        server.close(grace_s=0.5)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_whole_models_outputs_in_every_family(
    family: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    """At cuts of every form; the families share out the kinds of modules."""
    backbone = Backbone.find(str(tiny[family]))
    inputs, mask, _ = make_batch(family)
    modules, wanted = Modules(), {}
    kinds = KINDS[list(CONFIGS).index(family) % 4 :: 4]
    for number, kind in enumerate(kinds):
        tensors = away_from_zero(backbone, SPECS[kind])
        digest = f"{number:064x}"
        modules.folders[digest] = tmp_path / kind
        module.export(tmp_path / kind, backbone, SPECS[kind], tensors)
        spec, exported = module.load_exported(tmp_path / kind, backbone)
        with torch.no_grad():
            wanted[digest] = spec, exported, whole_model(backbone, spec, exported)(inputs, mask)
    with serving(backbone, modules) as server:
        for number, (digest, (spec, exported, logits)) in enumerate(wanted.items()):
            for text in ("0,4", "1,3") if number % 2 else ("2,4", "0,2"):
                cut = Cut.parse(text)
                part = device_part(backbone, cut, spec)
                module.load(part, exported)
                what = to_predict(backbone, cut, digest)
                with RemoteMiddle(way_to(server, what)) as middle, torch.no_grad():
                    found = SplitModel(part, cut, middle)(inputs, mask)
                assert torch.equal(found, logits), (family, kinds[number], text)
    assert len(modules.asked) == len(set(modules.asked))  # read once, for both cuts


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_predictor_of_which_the_middle_is_elsewhere(
    kind: str, trained_image_module: Path, trained_text_module: Path
) -> None:
    run = trained_image_module if kind == "image" else trained_text_module
    whole = load_predictor(run)
    data = "digits" if kind == "image" else f"csv:{run.parent.parent / 'texts.csv'}"
    examples = load_source(data, site="here", max_samples=50)
    cuts = [Cut(2, 4), Cut(0, whole.backbone.blocks)] if kind == "image" else [Cut(1, 3)]
    samples: list[Any] = (
        [examples.image(i) for i in range(3)] if kind == "image" else ["pump leaks oil", "belt 3"]
    )
    with serving(whole.backbone, Modules(**{whole.found.digest: run / "module"})) as server:
        for cut in cuts:
            what = to_predict(whole.backbone, cut, whole.found.digest)
            with RemoteMiddle(way_to(server, what)) as middle:
                split = load_predictor(run, middle=middle, cut=cut)
                np.testing.assert_array_equal(
                    split.over(examples, batch_size=8), whole.over(examples, batch_size=8)
                )
                np.testing.assert_array_equal(
                    split.outputs([split.prepare(s) for s in samples]),
                    whole.outputs([whole.prepare(s) for s in samples]),
                )
                assert min(middle.bytes_up, middle.bytes_down) > 0
        assert server.stats().predicted == len(cuts) * (len(examples) + len(samples))


@pytest.fixture
def vit(tiny: dict[str, Path]) -> Backbone:
    return Backbone.find(str(tiny["vit"]))


@pytest.fixture
def exported(vit: Backbone, tmp_path: Path) -> Path:
    spec = SPECS["lora"]
    module.export(tmp_path / "module", vit, spec, away_from_zero(vit, spec))
    return tmp_path / "module"


def test_what_is_not_in_the_registry_is_refused_by_name(vit: Backbone, exported: Path) -> None:
    h = np.zeros((1, 17, 24), np.float32)
    cut = Cut(1, 3)
    modules = Modules(**{DIGEST: exported})
    with serving(vit, modules) as server:
        unknown = RemoteMiddle(way_to(server, to_predict(vit, cut, "cd" * 32)))
        with pytest.raises(RefusedError, match=r"module version cdcdcdcdcdcd: .* no such module"):
            unknown.encode(0, h)
        # A run's token opens what its run has published, and no registered version.
        with pytest.raises(RefusedError, match="is not published here"):
            dial(server, grant(vit, cut, version=DIGEST))
        assert modules.asked == ["cd" * 32]
        # Nor does a token to predict open what a run has published.
        (exported / "module.safetensors").unlink(missing_ok=True)
        for file in exported.glob("*.safetensors"):
            file.write_bytes(b"damaged")
        with pytest.raises(RefusedError, match=r"cannot predict with module version .* read"):
            RemoteMiddle(way_to(server, to_predict(vit, cut))).encode(0, h)
    with serving(vit, None) as server, pytest.raises(RefusedError, match="--registry DIR"):
        RemoteMiddle(way_to(server, to_predict(vit, cut))).encode(0, h)


def test_the_registrys_files_are_compared_with_the_digest(
    vit: Backbone, exported: Path, tmp_path: Path
) -> None:
    find = in_registry(tmp_path / "modules")  # not there as yet
    with pytest.raises(ConfigError, match="no registry of modules"):
        find(DIGEST)
    with ModuleRegistry.open(tmp_path / "modules", create=True) as registry:
        version = registry.add(exported, Facts(task="a"))
        registry.add(exported, Facts(task="b"))
        assert find(version.digest) == registry.folder(version)
        with pytest.raises(RefusedError, match="it is not in the registry"):
            find(DIGEST)
        host = BackboneHost(vit, modules=find)
        about = registry.folder(version) / "fedsplit.json"
        about.chmod(0o600)
        about.write_text(about.read_text() + " ")
        with pytest.raises(RefusedError, match=r"cannot predict with .* were changed"):
            host.open(to_predict(vit, Cut(1, 3), version.digest))


def test_predicting_evicts_no_rounds_version(vit: Backbone, exported: Path) -> None:
    versions = [f"{n:064x}" for n in range(MAX_VERSIONS + MAX_REGISTERED)]
    modules = Modules(**dict.fromkeys(versions, exported))
    host = BackboneHost(vit, modules=modules)
    host.publish("r/1", packed(vit))
    for version in versions:
        host.open(to_predict(vit, Cut(1, 3), version)).close()
    assert host.capabilities().versions == ("r/1",)
    host.open(grant(vit, Cut(1, 3), version="r/1")).close()
    assert len(host._registered._parts) == MAX_REGISTERED
    host.open(to_predict(vit, Cut(1, 3), versions[-1])).close()
    host.open(to_predict(vit, Cut(1, 3), versions[0])).close()
    assert modules.asked == [*versions, versions[0]]


def test_a_middle_outlives_its_encoder_and_its_grants(vit: Backbone, exported: Path) -> None:
    h = np.random.default_rng(0).standard_normal((4, 17, 24), dtype=np.float32)
    cut, modules, told = Cut(1, 3), Modules(**{DIGEST: exported}), list[str]()
    with serving(vit, modules) as server:
        asked = []

        def ask() -> Way:
            asked.append(1)
            return way_to(server, to_predict(vit, cut, max_rows=8))()

        middle = RemoteMiddle(ask, say=told.append, patience_s=20)
        with middle:
            z = middle.encode(0, h)
            for step in range(1, 5):
                np.testing.assert_array_equal(middle.encode(step, h), z)
            assert len(asked) == 3  # 8 samples each
            address = server.address
            server.close(grace_s=0.2)
            with serving(vit, modules, bind=address):
                np.testing.assert_array_equal(middle.encode(5, h), z)
            with pytest.raises(RefusedError, match="gives outputs alone, no gradient"):
                middle.encode(6, h, want="gradient")
            with pytest.raises(RefusedError, match="trains nothing"):
                middle.settle(5, h)
    # One that never answered is told of at once.
    started = time.monotonic()
    away = way_to(server, to_predict(vit, cut))
    with RemoteMiddle(away) as middle, pytest.raises(UnreachableError, match="no encoder answers"):
        middle.encode(0, h)
    assert time.monotonic() - started < 10

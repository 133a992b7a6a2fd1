"""A site that holds a part of the backbone predicts with its federation's encoder, through the real nginx.

The control service, the encoder and the registry are the real ones, in this process; Flower is not needed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from fedsplit.cli.main import call
from fedsplit.core.cut import Cut
from fedsplit.core.errors import (
    NotMemberError,
    ProtocolError,
    RefusedError,
    ServerRefusalError,
)
from fedsplit.model.backbone import Backbone
from fedsplit.model.description import described
from fedsplit.plant.server import audit, control
from fedsplit.plant.server.backbone import ServedBackbone
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.nginx_conf import Ports
from fedsplit.plant.server.registry import Registry
from fedsplit.plant.site import join as joining
from fedsplit.plant.site.folder import SiteFolder
from fedsplit.plant.site.inference import granted, held
from fedsplit.plant.site.wish import Wish
from fedsplit.predict.found import find_module
from fedsplit.predict.predictor import Predictor, load_predictor
from fedsplit.predict.remote import RemoteMiddle, Way
from fedsplit.registry.registry import ModuleRegistry
from fedsplit.registry.version import Facts
from fedsplit.transport.client import StreamEncoder, collect, publish
from fedsplit.transport.server import EncoderServer
from fedsplit.trunk.host import BackboneHost
from fedsplit.trunk.registered import in_registry
from tests.plant.server.conftest import serving
from tests.plant.server.public_port import free_port, make_folder, needs_nginx, running
from tests.plant.server.test_control import Flower

pytestmark = needs_nginx
CUT = Cut(1, 5)


@dataclass
class Federation:
    """A server that is up but for Flower, and two sites that have joined."""

    server: FederationFolder
    encoder: EncoderServer
    sites: dict[str, SiteFolder]
    module: Path
    pictures: Path

    @property
    def digest(self) -> str:
        return find_module(str(self.module)).digest

    def way(self, site: str, cut: Cut = CUT, digest: str = "") -> Way:
        sha256 = Backbone.find("vit-glyphs").sha256
        return granted(self.sites[site], digest or self.digest, sha256, cut)


@pytest.fixture(scope="module")
def federation(
    tmp_path_factory: pytest.TempPathFactory, trained_image_module: Path
) -> Iterator[Federation]:
    place = tmp_path_factory.mktemp("plant")
    server = make_folder(place / "server")
    module = place / "module"
    shutil.copytree(trained_image_module / "module", module)
    ModuleRegistry.open(server.modules, create=True).add(module, Facts(task="digits"))
    pictures = place / "pictures"
    digits = load_digits()
    for i in range(12):
        file = pictures / str(digits.target[i]) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[i] * 15).astype(np.uint8)).save(file)
    with contextlib.ExitStack() as stack:
        # In this process, for another one that loads torch takes seconds.
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(control, "ServedBackbone", partial(ServedBackbone, description=described))
        client = stack.enter_context(serving(control.create_app(server, connect=Flower())))
        host = BackboneHost(Backbone.find("vit-glyphs"), modules=in_registry(server.modules))
        encoder = stack.enter_context(
            EncoderServer(
                host, key=server.encoder_secret.read_bytes(), revoked_file=server.revoked,
                proxy_secret=server.proxy_secret.read_bytes(),
            )
        )  # fmt: skip
        behind, port = client.base_url.port, int(encoder.address.rpartition(":")[2])
        assert behind is not None
        stack.enter_context(running(server, Ports(free_port(), port, behind)))
        sites = {}
        with Registry(server) as registry:
            for name in ("line-a", "line-b"):
                wish = Wish(
                    code=registry.add_site(name, 1), folder=place / name, data=f"folder:{pictures}",
                    task="digits", cut="1,5",
                )  # fmt: skip
                sites[name] = joining.join(wish, lambda _text: None).folder
        yield Federation(server, encoder, sites, module, pictures)


def outputs(predictor: Predictor, pictures: Path) -> Any:
    files = sorted(pictures.rglob("*.png"))
    return predictor.outputs([predictor.prepare(file) for file in files])


def test_a_site_with_a_part_answers_as_the_whole_model(federation: Federation) -> None:
    site, module = federation.sites["line-a"], federation.module
    whole = outputs(load_predictor(module, backbone="vit-glyphs"), federation.pictures)
    sha256 = Backbone.find("vit-glyphs").sha256
    here = held(site, sha256)  # its own cut; what that needs is fetched
    assert (here.cut, here.blocks) == (Cut(1, 5), 6)
    for cut in (here.cut, Cut(0, 6)):
        found = held(site, sha256, cut)
        with RemoteMiddle(lambda cut=cut: federation.way("line-a", cut)) as middle:  # type: ignore[misc]
            split = load_predictor(module, backbone=str(found.path), middle=middle, cut=cut)
            np.testing.assert_array_equal(outputs(split, federation.pictures), whole)
    lines = [line for line in audit.read(federation.server) if line["what"] == "granted"]
    assert [line["cut"] for line in lines] == ["1,5", "0,6"]
    assert {(line["who"], line["module"]) for line in lines} == {("line-a", federation.digest)}


def answers(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, Any, str]:
    """Exit code, JSON and stderr of `fedsplit predict`."""
    code = call(["predict", *map(str, args), "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out), said.err


def test_the_command_at_a_site(
    federation: Federation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, module = federation.sites["line-a"].path, federation.module
    given = ("--module", module, federation.pictures)
    _, whole, _ = answers(capsys, *given)
    code, split, said = answers(capsys, *given, "--site", site)
    assert (code, split["answers"]) == (0, whole["answers"])
    assert "blocks 1 to 4 run at the encoder of localhost" in said
    _, thin, _ = answers(capsys, *given, "--site", site, "--cut", "0,6", "--batch-size", "5")
    assert [a["class"] for a in thin["answers"]] == [a["class"] for a in whole["answers"]]
    code, here, said = answers(capsys, *given, "--site", site, "--cut", "6,6")
    assert (code, here["answers"]) == (0, whole["answers"])
    assert "all 6 blocks of the backbone are here" in said
    # A changed module is another one.
    shutil.copytree(module, other := federation.pictures.parent / "other")
    about = other / "fedsplit.json"
    about.write_text(about.read_text() + " ")
    code, told, _ = answers(capsys, "--module", other, federation.pictures, "--site", site)
    assert code == 1
    assert "is not in the federation's registry" in told["error"]["message"]
    code, told, _ = answers(capsys, *given, "--site", site, "--backbone", "vit-glyphs")
    assert (code, told["error"]["kind"]) == (2, "ConfigError")
    code, told, _ = answers(capsys, *given, "--site", federation.pictures)
    assert code == 2
    # One without nobody at the other end.
    monkeypatch.setattr("fedsplit.plant.site.calls.TIMEOUT_S", 2.0)
    text = (site / "site.toml").read_text()
    (site / "site.toml").write_text(text.replace("localhost:", "localhost:1"))
    code, told, _ = answers(capsys, *given, "--site", site)
    (site / "site.toml").write_text(text)
    assert code in (1, 2)
    assert "address" in told["error"]["message"]


def test_what_a_site_without_a_cut_runs_itself(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = federation.sites["line-a"]
    shutil.copytree(whole.path, tmp_path / "site")
    file = tmp_path / "site" / "site.toml"
    file.write_text(file.read_text().replace('cut = "1,5"', 'cut = ""'))
    folder = SiteFolder.at(tmp_path / "site")
    sha256 = Backbone.find("vit-glyphs").sha256
    shutil.rmtree(folder.backbones)
    assert held(folder, sha256).cut == Cut(0, 6)  # what no cut can do without is fetched
    for cut in (Cut(2, 6), Cut(1, 4)):
        held(folder, sha256, cut)
        assert held(folder, sha256).cut == Cut(2, 6 if cut.b == 6 else 4)
    held(folder, sha256, Cut(6, 6))
    assert held(folder, sha256).cut == Cut(6, 6)


def ask_on(stream: StreamEncoder, h: Any) -> None:
    """For a few seconds."""
    for step in range(1, 200):
        stream.encode(step, h)
        time.sleep(0.02)


def test_who_is_granted_nothing_and_why(federation: Federation) -> None:
    with pytest.raises(
        ServerRefusalError, match=r"version cdcdcdcdcdcd is not in the federation's"
    ):
        federation.way("line-a", digest="cd" * 32)
    with pytest.raises(ServerRefusalError, match="leaves nothing for the encoder"):
        federation.way("line-a", Cut(3, 3))
    with pytest.raises(ServerRefusalError, match=r"belongs to backbone .* fedsplit site fetch"):
        granted(federation.sites["line-a"], federation.digest, "ab" * 32, Cut(1, 5))
    beyond = RemoteMiddle(lambda: federation.way("line-a", Cut(1, 9)))
    with beyond, pytest.raises(RefusedError, match="beyond block 6"):
        beyond.encode(0, np.zeros((1, 17, 64), np.float32))


def test_a_grant_is_its_sites_own_and_does_nothing_else(federation: Federation) -> None:
    """A hostile member, through the public port and past it."""
    own, other = federation.way("line-a"), federation.way("line-b")
    tls = own.tls
    with pytest.raises(RefusedError, match="token is for site 'line-b', the certificate for"):
        StreamEncoder(own.address, other.token, other.grant, tls=tls)
    with pytest.raises(RefusedError, match="came past the proxy"):
        StreamEncoder(federation.encoder.address, own.token, own.grant)
    for past in (own.address, federation.encoder.address):
        told = tls if past == own.address else None
        with pytest.raises((RefusedError, ProtocolError)):
            publish(past, own.token, "v1", b"tensors", told)
        with pytest.raises((RefusedError, ProtocolError)):
            collect(past, own.token, federation.digest, told)
    wanted = own.grant.model_copy(update={"version": "run/1"})
    with pytest.raises(RefusedError, match="module version is 'run/1', the token's is"):
        StreamEncoder(own.address, own.token, wanted, tls=tls)
    with StreamEncoder(own.address, own.token, own.grant, tls=tls) as stream:
        width = stream.welcome.width
        with pytest.raises(RefusedError, match="ENCODE without KEEP is all that it allows"):
            stream.encode(0, np.zeros((1, 17, width), np.float32), want="gradient")
    assert federation.encoder.stats().kept_steps == 0


def test_a_revoked_site_predicts_no_more(federation: Federation) -> None:
    way = federation.way("line-b")
    with StreamEncoder(way.address, way.token, way.grant, tls=way.tls) as stream:
        h = np.zeros((1, 17, stream.welcome.width), np.float32)
        stream.encode(0, h)
        with Registry(federation.server) as registry:
            registry.revoke("line-b")
        with pytest.raises(RefusedError, match="this site's access was revoked"):
            ask_on(stream, h)
    with pytest.raises(NotMemberError, match="site 'line-b' was revoked"):
        federation.way("line-b")
    with pytest.raises(RefusedError, match="was revoked"):
        StreamEncoder(way.address, way.token, way.grant, tls=way.tls)

"""Sites that are missing, wrong or hold bad data: a message that names the site, the file and what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.federation.conftest import simulated
from tests.system.conftest import BASE, run_once

# The sites.


def test_more_sites_than_supernodes(fails: Callable[..., str]) -> None:
    assert "--federation-config 'num-supernodes=5'" in fails(sites=5)
    message = fails(in_simulation=False, sites=5, min_sites=5, deadline_s=1.0, run_name="deployed")
    for words in ("2 sites are connected", "min-sites=5", "flower-supernode"):
        assert words in message


def test_fewer_supernodes_than_sites_is_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurried = SimpleNamespace(monotonic=iter(range(0, 10**6, 100)).__next__, sleep=lambda _: None)
    monkeypatch.setattr("fedsplit.federation.server.roll_call.time", hurried)
    flat = BASE | {"runs-dir": str(tmp_path), "sites": 3, "cut": "6,6"}
    summary = run_once(flat, simulated(2), in_simulation=False)
    assert summary.outcome == "partial"
    assert [(e.site, e.reason) for e in summary.left_out] == [
        ("(site 3 of 3)", "it was not connected")
    ]


def test_two_sites_of_one_name(fails: Callable[..., str]) -> None:
    message = fails([n | {"site": "press-3"} for n in simulated(2)])
    assert "another site is called 'press-3' too; give each its own name" in message


def test_site_with_another_version(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsplit.site.runtime.__version__", "9.9.9")
    message = fails()
    assert "site-0, site-1: it runs fedsplit 9.9.9" in message
    assert "install the same version on both" in message


def test_node_config_with_every_kind_of_fault(fails: Callable[..., str]) -> None:
    message = fails([simulated(2)[0], {"site": "x" * 500, "cut": "a", "thread": 1, "threads": -1}])
    for words in ("thread", "threads=-1", "cut 'a'", "site="):
        assert words in message


def test_sites_own_cut_beyond_the_backbone(fails: Callable[..., str]) -> None:
    nodes = simulated(2)
    nodes[1]["cut"] = "2,9"
    message = fails(nodes)
    assert "cut 2,9 does not fit the backbone" in message
    assert "site-1" in message


# A site's data.


def write_images(folder: Path, classes: str = "ab", count: int = 6) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((16, 16, 3), 20 * i + ord(name), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def corrupt(folder: Path) -> Path:
    (folder / "b" / "3.png").write_bytes(b"no image")
    return folder / "b" / "3.png"


def unknown_label(folder: Path) -> Path:
    (folder / "c").mkdir()
    return Path(shutil.copy(folder / "a" / "0.png", folder / "c"))


def empty_class(folder: Path) -> Path:
    for file in (folder / "b").iterdir():
        file.unlink()
    return folder / "b"


def one_sample(folder: Path) -> Path:
    shutil.rmtree(folder / "b")
    for i in range(1, 6):
        (folder / "a" / f"{i}.png").unlink()
    return folder


def no_files(folder: Path) -> Path:
    shutil.rmtree(folder)
    return folder


SPOILED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "corrupt image": (corrupt, "replace or remove the file"),
    "unknown label": (unknown_label, "label 'c' is not one of the task's classes: 'a', 'b'"),
    "empty class": (empty_class, "the class folder has no image; add files"),
    "one sample": (one_sample, "only one sample"),
    "no files": (no_files, "does not exist; check the path"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_bad_data_at_a_site(what: str, fails: Callable[..., str], tmp_path: Path) -> None:
    spoil, words = SPOILED[what]
    good, bad = write_images(tmp_path / "good"), write_images(tmp_path / "bad")
    culprit = spoil(bad)
    nodes = [
        {"site": "press-1", "data": f"folder:{good}"}, {"site": "press-2", "data": f"folder:{bad}"},
    ]  # fmt: skip
    message = fails(nodes, classes="a,b", max_samples=0)
    for part in ("press-2: ", str(culprit), words, "1 of 2 sites can take part, min-sites=2"):
        assert part in message
    assert "press-1" not in message


def test_image_that_only_decoding_finds_out(tmp_path: Path) -> None:
    """Half a JPEG has a good header: its site is left out of the round, by name and file, and the others go on."""
    nodes = []
    for name in ("press-1", "press-2"):
        folder = write_images(tmp_path / name)
        nodes.append({"site": name, "data": f"folder:{folder}"})
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for i in range(6):
        path = tmp_path / "press-2" / "a" / f"{i}.jpg"
        Image.fromarray(picture).save(path, quality=95)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    flat = BASE | {
        "runs-dir": str(tmp_path / "runs"),
        "max-samples": 0,
        "min-sites": 1,
        "cut": "6,6",
    }
    summary = run_once(flat, nodes)
    assert summary.outcome == "partial"
    reasons = [e.reason for e in summary.left_out if e.site == "press-2"]
    assert reasons
    assert all(".jpg: not a readable image" in r and "press-2" in r for r in reasons)
    assert "press-2" in summary.reason

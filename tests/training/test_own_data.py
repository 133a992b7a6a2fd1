"""A real site's samples while files come, go and change: no sample ever changes sides, no run changes its samples."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsplit.core.config import RunConfig
from fedsplit.core.errors import DataError, RunDirError
from fedsplit.model.backbone import Backbone
from fedsplit.training.data import Examples, load_source
from fedsplit.training.data.sides import LISTS_KEPT, Record
from fedsplit.training.own_data import open_own
from fedsplit.training.site_data import SiteData
from fedsplit.training.site_settings import SiteSettings
from tests.kept import KEPT, open_site


@pytest.fixture(autouse=True)
def forget() -> None:
    KEPT.sources.forget()


class Camera:
    """A folder of pictures of two classes that somebody saves into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rng = np.random.default_rng(0)

    def save(self, label: str, *names: object) -> None:
        for name in names:
            path = self.folder / label / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = self._rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)


@pytest.fixture
def camera(tmp_path: Path) -> Camera:
    camera = Camera(tmp_path / "pictures")
    camera.save("crack", *range(100, 120))
    camera.save("fine", *range(100, 130))
    return camera


def of_data(own: SiteData) -> SiteData:
    """Without what there is to say of the tiny backbone."""
    return replace(own, notes=tuple(n for n in own.notes if not n.startswith("the backbone")))


@pytest.fixture
def site(tmp_path: Path, camera: Camera) -> Any:
    """Opens the site as a message of a run does: in a process of its own."""
    backbone_of = SiteSettings.from_node(
        {"site": "line-a", "data": f"folder:{camera.folder}"}, node_id=1
    )

    def opened(
        vit: Backbone,
        run: str,
        classes: tuple[str, ...] | None = None,
        source: str = "",
        **other: Any,
    ) -> SiteData:
        KEPT.sources.forget()
        given = SiteSettings.from_node(
            {"site": "line-a", "data": source or str(backbone_of.data)}, node_id=1
        )
        flat = {k.replace("_", "-"): v for k, v in other.items()}
        record = Record(tmp_path / "state", "line-a", run)
        return of_data(open_site(RunConfig.from_flat(flat), given, vit, classes, record))

    return opened


def named(own: SiteData, side: np.ndarray) -> list[str]:
    paths = [Path(own.examples.origin(int(i))) for i in side]
    return [f"{path.parent.name}/{path.stem}" for path in paths]


CLASSES = ("crack", "fine")


def test_files_that_come_leave_the_run_as_it_was(site: Any, camera: Camera, vit: Backbone) -> None:
    call = site(vit, "a")
    # They sort before, between and after the others, one is of a new class and one half written.
    camera.save("crack", 1, 110.5, 999)
    camera.save("burn", 1)
    (camera.folder / "fine" / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    again = site(vit, "a", CLASSES)
    for side in ("train", "test"):
        before, after = getattr(call, side), getattr(again, side)
        assert np.array_equal(before, after)
        assert named(call, before) == named(again, after)
    images = zip(call.examples.labels, again.examples.labels, strict=True)
    assert all(a == b for a, b in images)
    assert np.array_equal(call.examples.image(7), again.examples.image(7))
    assert again.notes == ()


def test_no_sample_changes_sides_from_run_to_run(site: Any, camera: Camera, vit: Backbone) -> None:
    first = site(vit, "a")
    tests, trains = set(named(first, first.test)), set(named(first, first.train))
    assert (len(trains), len(tests)) == (40, 10)
    camera.save("crack", *range(10))
    (camera.folder / "fine" / "100.png").unlink()
    # Another seed, another share, a file that is moved, the folder under another name.
    (camera.folder / "fine" / "101.png").rename(camera.folder / "fine" / "0-moved.png")
    moved = {"fine/101": "fine/0-moved"}
    shutil.move(camera.folder, camera.folder.with_name("elsewhere"))
    source = f"folder:{camera.folder.with_name('elsewhere')}"
    next_ = site(vit, "b", source=source, seed=7, test_fraction=0.4)
    gone = {"fine/100"}
    for side, before in (("test", tests), ("train", trains)):
        now = set(named(next_, getattr(next_, side)))
        assert {moved.get(name, name) for name in before - gone} <= now
    assert len(next_.test) + len(next_.train) == 59
    assert any("keep the sides that they had" in note for note in next_.notes)


def test_what_came_and_went_is_told(site: Any, camera: Camera, vit: Backbone) -> None:
    assert site(vit, "a").notes == ()
    camera.save("crack", *range(5))
    (camera.folder / "fine" / "100.png").unlink()
    (told,) = site(vit, "b").notes
    assert told == (
        "5 new samples since the last run: 4 train, 1 test; 1 samples of the last run are gone or changed"
    )
    assert site(vit, "c").notes == ()


def test_files_that_vanish_or_change(site: Any, camera: Camera, vit: Backbone) -> None:
    call = site(vit, "a")
    order = named(call, np.arange(50))
    (camera.folder / "crack" / "100.png").unlink()
    camera.save("fine", 105)
    shutil.move(camera.folder / "fine" / "107.png", camera.folder / "crack" / "307.png")
    again = site(vit, "a", CLASSES)
    left = [name for name in order if name not in ("crack/100", "fine/105", "fine/107")]
    assert named(again, np.arange(47)) == left
    assert set(named(again, again.test)) <= set(named_paths(order, call.test))
    (note,) = again.notes
    assert note.startswith("3 of the 50 samples that site line-a had at roll call are gone")
    for name in named(again, again.test):
        (camera.folder / f"{name}.png").unlink()
    with pytest.raises(
        DataError, match=r"'line-a': of the 50 samples .* at roll call \d+ are left"
    ):
        site(vit, "a", CLASSES)


def named_paths(order: list[str], side: np.ndarray) -> list[str]:
    return [order[i] for i in side]


def test_a_file_that_did_not_change_is_not_read_again(
    site: Any, camera: Camera, vit: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsplit.training.data.image_files import ImageFiles

    site(vit, "a")
    read = []
    digest = ImageFiles.digest
    monkeypatch.setattr(
        ImageFiles, "digest", lambda self, i: read.append(self.origin(i)) or digest(self, i)
    )
    camera.save("crack", 100)
    site(vit, "a", CLASSES)
    assert [Path(path).name for path in read] == ["100.png"]


@pytest.mark.parametrize("kind", ["csv", "npz"])
def test_other_sources_change_too(
    kind: str,
    site: Any,
    tmp_path: Path,
    tiny: dict[str, Path],
    vit: Backbone,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(KEPT.sources, "transforms", lambda *_: None)
    monkeypatch.setattr(KEPT.sources, "forget", KEPT.sources.own.clear)
    model = Backbone.find(str(tiny["bert"])) if kind == "csv" else vit
    path = tmp_path / f"table.{kind}"
    pixels = np.random.default_rng(1).integers(0, 256, (60, 4, 4), dtype=np.uint8)

    def write(rows: list[int]) -> None:
        names = ["crack" if i % 3 else "fine" for i in rows]
        if kind == "npz":
            np.savez(path, x=pixels[rows], y=np.array(names))
        else:
            lines = [f"pump {i},{name}" for i, name in zip(rows, names, strict=True)]
            path.write_text("text,label\n" + "\n".join(lines))

    def sample(own: SiteData, i: int) -> Any:
        return own.examples.text(i) if kind == "csv" else own.examples.image(i).tobytes()

    write(list(range(10, 50)))
    call = site(model, "a", source=f"{kind}:{path}")
    write([59, *range(11, 55), 3])
    again = site(model, "a", CLASSES, source=f"{kind}:{path}")
    assert len(again.examples) == 39
    at = list(range(1, 40))
    assert [sample(again, i) for i in range(39)] == [sample(call, i) for i in at]
    assert again.examples.labels.tolist() == call.examples.labels[1:].tolist()
    now = site(model, "b", source=f"{kind}:{path}")
    tests = {sample(now, int(i)) for i in now.test}
    assert {sample(again, int(i)) for i in again.test} <= tests
    assert not {sample(again, int(i)) for i in again.train} & tests


def test_a_run_that_goes_on_takes_no_new_class_in(site: Any, camera: Camera, vit: Backbone) -> None:
    site(vit, "a")
    camera.save("burn", 1, 2, 3)
    resumed = site(vit, "resumed", CLASSES)
    assert resumed.examples.classes == CLASSES
    assert len(resumed.examples) == 50
    assert any("3 samples of class burn are not used" in note for note in resumed.notes)


def test_a_class_without_a_test_sample_is_told(site: Any, camera: Camera, vit: Backbone) -> None:
    camera.save("burn", 1)
    assert site(vit, "a").notes == ("no sample of class burn tests: a class needs two that differ",)
    # The second one tests, and the class keeps a test sample.
    camera.save("burn", 2)
    own = site(vit, "b")
    assert [n for n in named(own, own.test) if n.startswith("burn")] == ["burn/2"]


def test_in_simulation_a_class_that_nobody_tests_is_told(camera: Camera, vit: Backbone) -> None:
    camera.save("burn", 1)
    flat = {"data": f"folder:{camera.folder}", "partition": "iid"}
    node = {"partition-id": 1, "num-partitions": 2}
    given = SiteSettings.from_node(node, node_id=1)
    own = of_data(open_site(RunConfig.from_flat(flat), given, vit, None))
    assert own.notes == ("no sample of class burn tests: a class needs two that differ",)


def test_what_is_kept_is_bounded_private_and_may_be_damaged(
    site: Any, camera: Camera, vit: Backbone, tmp_path: Path
) -> None:
    first = site(vit, "run-0")
    for i in range(1, 12):
        site(vit, f"run-{i}")
    state = tmp_path / "state"
    lists = list(state.glob("*.list.npz"))
    (sides,) = state.glob("*.sides.npz")
    assert len(lists) == LISTS_KEPT
    assert {path.stat().st_mode & 0o077 for path in [*lists, sides]} == {0}
    sides.write_bytes(sides.read_bytes()[:200])
    for path in lists:
        path.write_bytes(b"\x93NUMPY" if path is lists[0] else b"PK\x03\x04nonsense")
    again = site(vit, "after")
    assert any("dealt anew" in note for note in again.notes)
    # The digests deal the same samples alike.
    assert named(again, again.test) == named(first, first.test)


def test_a_disk_that_takes_nothing(camera: Camera, vit: Backbone, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    given = SiteSettings.from_node({"site": "a", "data": f"folder:{camera.folder}"}, node_id=1)
    record = Record(tmp_path / "file" / "state", "a", "run")
    with pytest.raises(RunDirError, match=r"'a' cannot keep in .*which samples test.*state-dir"):
        open_site(RunConfig.from_flat({}), given, vit, None, record)


def test_runs_at_once_lose_no_side(tmp_path: Path) -> None:
    """A site may be in several runs: what one keeps the other does not write over."""
    digests = np.arange(80, dtype=np.uint64).reshape(8, 10)

    def run(i: int) -> None:
        record = Record(tmp_path, "line-a", str(i))
        with record.alone():
            record.add(digests[i], np.full(10, i % 2, np.int8))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(8)))
    found = Record(tmp_path, "line-a", "").sides(digests.ravel())
    assert found.reshape(8, 10).tolist() == [[i % 2] * 10 for i in range(8)]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [(("1.0", "0.0"), ("0", "1")), (("1", "0"), ("1.0", "0.0")), (("none", "crack"), ("crack", "none"))],
)  # fmt: skip
def test_labels_are_the_runs_in_every_message(
    tmp_path: Path, labels: tuple[str, str], classes: tuple[str, str]
) -> None:
    path = tmp_path / "t.csv"
    # A first line that is a sample only because its label is declared.
    path.write_text(f"x,{labels[1]}\n" + "".join(f"part {i},{labels[0]}\n" for i in range(9)))

    def read(
        classes: tuple[str, ...] | None = None,
        *,
        listed: frozenset[str] | None = None,
        pixel_max: float = 0.0,
    ) -> Examples:
        return load_source(
            f"csv:{path}", site="line-a", classes=classes, listed=listed, pixel_max=pixel_max
        )

    record = Record(tmp_path / "state", "line-a", "run")
    for _ in range(2):
        own = open_own(read, record, source="t", fraction=0.3, classes=classes, declared=True)
        assert own.examples.classes == classes
        names = [classes[label] for label in own.examples.labels]
        assert names.count(classes[labels == ("none", "crack")]) in (1, 9)
        assert len(names) == 10

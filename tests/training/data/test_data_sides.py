"""What a site keeps of a run's samples comes back as it was, and a long path costs its own length alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedsplit.training.data.sides import Listed, Record

ORIGINS = ("a/1.png", "検査/キズ.png", "bytes/\udce9.png", "long/" + 3000 * "x" + ".png")


def listed(origins: tuple[str, ...]) -> Listed:
    n = len(origins) or 4
    return Listed(
        digests=np.arange(n, dtype=np.uint64),
        sides=np.zeros(n, np.int8),
        labels=np.zeros(n, np.int64),
        classes=("キズ", "ok"),
        origins=origins,
        stamps=np.zeros((n, 2), np.int64),
    )


def test_a_list_comes_back(tmp_path: Path) -> None:
    for run, origins in (("1", ORIGINS), ("2", ())):
        record = Record(tmp_path, "line-a", run)
        record.keep("folder:photos", listed(origins))
        found = record.listed("folder:photos")
        assert found is not None
        assert (found.origins, found.classes) == (origins, ("キズ", "ok"))


def test_one_long_path_does_not_pad_the_others(tmp_path: Path) -> None:
    short = tuple(f"{i}.png" for i in range(1000))
    Record(tmp_path, "line-a", "1").keep("folder:photos", listed((*short, ORIGINS[-1])))
    (file,) = tmp_path.glob("*.list.npz")
    assert file.stat().st_size < 1001 * 50 + 3010 + 4096


def test_a_list_of_another_form_is_left_aside(tmp_path: Path) -> None:
    record = Record(tmp_path, "line-a", "1")
    record.keep("folder:photos", listed(ORIGINS))
    (file,) = tmp_path.glob("*.list.npz")
    arrays = dict(np.load(file))
    for wrong in (np.array(ORIGINS[:2]), np.frombuffer(b"\xff\xfe", np.uint8)):
        np.savez(file, **arrays | {"origins": wrong})
        assert record.listed("folder:photos") is None

"""What a run may have of a site's own data: nothing that its node config does not name."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message
from flwr.common.logger import LOGGER_NAME
from PIL import Image

from client_app.app import runtime
from fedsplit.core.errors import FederationError
from tests.federation.conftest import prepared, settings


@pytest.fixture
def nodes(tmp_path: Path) -> list[dict[str, str]]:
    """Two sites with a column that is nobody's business."""
    nodes = []
    for name in ("line-a", "line-b"):
        path = tmp_path / f"{name}.csv"
        rows = [f"pump {i},{'leak' if i % 2 else 'tear'},met Ms Kurz {i % 3}" for i in range(20)]
        path.write_text("text,label,note\n" + "\n".join(rows))
        nodes.append({"site": name, "data": f"csv:{path}"})
    return nodes


def everything(folder: Path) -> str:
    return "\n".join(p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file())


def test_no_column_leaves_that_the_site_does_not_name(
    nodes: list[dict[str, str]], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    config = settings(runs, label_column="note")
    with (
        prepared(config, nodes) as (run, net),
        pytest.raises(FederationError, match=r"line-a, line-b: the run reads label-column='note'"),
    ):
        run.go()
    assert "Kurz" not in everything(runs)
    assert "Kurz" not in "".join(str(m.content) for m in net.sent)


def test_a_site_tells_its_own_log_what_leaves_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the run, that a proxy may stand before the encoder; not how one logs in there."""
    monkeypatch.setenv("http_proxy", "http://kurz:hunter2@proxy.example:3128")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    nodes = [{"site": name, "data": "digits"} for name in ("line-a", "line-b")]
    config = settings(tmp_path, rounds=1, cut="0,6", encoder_address="encoder.example:9095")
    logger = logging.getLogger(LOGGER_NAME)
    logger.addHandler(caplog.handler)
    try:
        with (
            prepared(config, nodes) as (run, _),
            caplog.at_level("INFO", logger=LOGGER_NAME),
        ):
            ended = run.go()
    finally:
        logger.removeHandler(caplog.handler)
    assert "site line-a tells the server its classes: 0 (" in caplog.text
    for site in ended.sites:
        (note,) = (n for n in site.notes if "proxy" in n)
        assert note.startswith("http_proxy is set where the SuperNode runs, and catches")
        assert (
            "encoder.example:9095; if the encoder is not reached, add its host to no_proxy" in note
        )
    assert "hunter2" not in everything(tmp_path)


def test_a_run_whose_files_change(tmp_path: Path) -> None:
    """Pictures come and go after roll call, and each message finds them anew, as a process of its own would."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    nodes = []
    for name in ("line-a", "line-b"):
        for i in range(20):
            path = tmp_path / name / "ab"[i % 2] / f"{i + 10}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i]).save(path)
        nodes.append({"site": name, "data": f"folder:{tmp_path / name}"})

    def next_message(place: int, message: Message, reply: Message) -> Message:
        runtime.kept.sources.forget()
        if message.metadata.group_id == "0":
            # Of equal number: were they told apart by their places, training would test from now on.
            Image.fromarray(pixels[30]).save(tmp_path / "line-a" / "a" / "0.png")
        if message.metadata.group_id == "0" and place == 2:
            (tmp_path / "line-b" / "a" / "10.png").unlink()
        return reply

    config = settings(tmp_path / "runs", cut="0,6", max_samples=0)
    with prepared(config, nodes, tamper=next_message, workers=1) as (run, _):
        ended = run.go()
    assert ended.outcome == "complete", ended
    assert ended.rounds_done == 2
    samples = {m.site: m.samples for m in run.dir.read_metrics() if m.loss is not None}
    assert samples["line-a"] == 16
    assert [
        note for note in ended.notes if note.startswith("line-b: ") and "gone or changed" in note
    ]
    again = settings(tmp_path / "runs", cut="0,6", max_samples=0, run_name="next", rounds=1)
    with prepared(again, nodes) as (run, _):
        (line_a,) = (s for s in run.go().sites if s.name == "line-a")
    assert "1 new samples since the last run: 1 train, 0 test" in line_a.notes

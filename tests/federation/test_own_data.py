"""What a run may have of a site's own data: nothing that its node config does not name."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from flwr.common.logger import LOGGER_NAME

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
    nodes: list[dict[str, str]], tmp_path: Path, tiny: dict[str, Path]
) -> None:
    runs = tmp_path / "runs"
    config = settings(runs, label_column="note", backbone=str(tiny["bert"]), cut="0,2")
    with (
        prepared(config, nodes) as (run, net),
        pytest.raises(FederationError, match=r"line-a: the run reads label-column='note'"),
    ):
        run.go()
    assert "Kurz" not in everything(runs)
    assert "Kurz" not in "".join(str(m.content) for m in net.sent)


def test_a_site_tells_its_own_log_what_leaves_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = [{"site": name, "data": "digits"} for name in ("line-a", "line-b")]
    logger = logging.getLogger(LOGGER_NAME)
    logger.addHandler(caplog.handler)
    try:
        with (
            prepared(settings(tmp_path, rounds=1, cut="0,6"), nodes) as (run, _),
            caplog.at_level("INFO"),
        ):
            run.go()
    finally:
        logger.removeHandler(caplog.handler)
    assert "site line-a tells the server its classes: 0 (" in caplog.text

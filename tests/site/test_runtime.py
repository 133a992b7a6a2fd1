"""A runtime owns what its process keeps: two of them share nothing, one shares between sites and runs."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from fedsplit.core.config import RunConfig
from fedsplit.model.backbone import Backbone
from fedsplit.site.kept import MB, Kept
from fedsplit.site.runtime import SiteRuntime, _proxy_note
from fedsplit.training.site_settings import SiteSettings


def opened(kept: Kept, number: int) -> object:
    config = RunConfig.from_flat({"max-samples": 120, "partition": "iid"})
    site = SiteSettings.from_node({"partition-id": number, "num-partitions": 2}, node_id=1)
    return kept.sources.open(config, site, Backbone.find("vit-glyphs"), None).examples.items


def test_two_runtimes_share_nothing() -> None:
    one, other = SiteRuntime().kept, SiteRuntime().kept
    assert opened(one, 0) is opened(one, 1)
    assert opened(one, 0) is not opened(other, 0)
    assert one.parts is not other.parts
    assert one.activations is not other.activations


def test_a_site_needs_no_flower() -> None:
    code = "import sys, fedsplit.site.runtime; print([m for m in sys.modules if m.split('.')[0] == 'flwr'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_proxy_before_the_sites_own_address_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "encoder.example")
    monkeypatch.setenv("NO_PROXY", "encoder.example")
    (note,) = _proxy_note("gate.example:443")
    assert "http_proxy is set" in note
    assert "the encoder's address gate.example:443" in note
    assert _proxy_note("encoder.example:9095") == ()


def test_what_does_not_fit_is_told_once() -> None:
    kept = Kept(memory_bytes=5 * MB)
    assert (kept.share_bytes, kept.notes()) == (MB, [])
    rows = np.zeros((3, 2**17), np.float32)
    kept.activations.rows.keep("here", [1, 2, 3], list(rows))
    (note,) = kept.notes()
    assert note.startswith("this process has no more room than 1 MB for activations")
    assert "memory-mb=5" in note
    assert kept.notes() == []
    kept.limit(10 * MB)
    kept.activations.rows.keep("here", [1, 2, 3], list(rows))
    assert kept.activations.rows.nbytes == rows.nbytes
    kept.limit(0)
    assert kept.activations.rows.nbytes <= MB

"""A runtime owns what its process keeps: two of them share nothing, one shares between sites and runs."""

from __future__ import annotations

import subprocess
import sys

from fedsplit.core.config import RunConfig
from fedsplit.model.backbone import Backbone
from fedsplit.site.kept import Kept
from fedsplit.site.runtime import SiteRuntime
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

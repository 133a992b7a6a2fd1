"""What the test process keeps, as a site's process does: parts of backbones and samples."""

from __future__ import annotations

from fedsplit.site.kept import Kept

KEPT = Kept()
frozen_weights = KEPT.parts.frozen
open_site = KEPT.sources.open

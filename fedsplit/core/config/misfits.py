"""Settings that do not fit a backbone of some depth, each as a sentence that says what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsplit.core.config.run_config import RunConfig


def misfits(c: RunConfig, blocks: int) -> list[str]:
    """Every setting that does not fit a backbone of `blocks` blocks, in words."""
    cuts = c.cuts_on(blocks)
    found = [
        (
            cut.b > blocks,
            f"cut {cut} does not fit the backbone: it has {blocks} blocks, so 0 <= a <= b <= {blocks} is wanted",
        )
        for cut in cuts
    ]
    found += [
        (
            c.train.local_loss_epochs > 0 and cut.pooled(blocks),
            f"local-loss-epochs={c.train.local_loss_epochs} with cut={cut}: the last norm and the pooling are the server's, "
            f"so head and tail make no model of their own; use a cut that ends before block {blocks}, e.g. "
            f"0,{blocks - 1}",
        )
        for cut in cuts
    ]
    found += [
        (
            c.placement.block_sampling > 0 and not cut.pooled(blocks),
            f"block-sampling={c.placement.block_sampling} with cut={cut}: what leaves early goes to the encoder's own norm and pooling; "
            f"use cut={cut.a},{blocks}",
        )
        for cut in cuts
    ]
    found += [
        (
            cut.pooled(blocks) and c.placement.block_sampling > cut.b,
            f"block-sampling={c.placement.block_sampling} with cut={cut}: at most {cut.b} is wanted",
        )
        for cut in cuts
    ]
    return [text for wrong, text in found if wrong]

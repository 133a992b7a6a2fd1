"""The backbone, which of its blocks run where, and on which side of the cut tensors train."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedsplit.core.config.section import Check, Section, read_by
from fedsplit.core.cut import Cut, parse_cuts


class PlacementSection(Section):
    """The backbone and which of its blocks run where."""

    backbone: str = "vit-glyphs"
    """A local model directory, a hub id, or the name of the bundled one."""
    cut: Annotated[str, read_by(parse_cuts)] = "1,5"
    """"a,b", or several, "a,b;c,d", dealt to the sites in turn. A site's node config overrides it."""
    device_training: Literal["tail", "head+tail"] = "tail"
    """tail freezes the head of a split: no gradient comes back to the device, and none leaves it unless the encoder trains. Without a split the device trains all blocks."""
    encoder_training: Literal["frozen", "hosted", "shared", "zeroth-order"] = "frozen"
    """What trains on the server: nothing, one copy for each site, one copy that the sites step in turn, or copies without gradients."""
    block_sampling: int = Field(default=0, ge=0)
    """FeSViBS: a training step leaves the encoder after a block that is drawn each round, this block or a later one; 0: after the last."""

    def contradictions(self) -> list[Check]:
        """Settings of this section that cannot go together."""
        serves = self.encoder_training
        return [
            (
                serves != "frozen" and self.local,
                f"encoder-training={serves} with cut={self.cut}: nothing runs on the server; use e.g. cut=1,5",
            ),
            (
                serves == "zeroth-order" and self.device_training != "tail",
                "encoder-training=zeroth-order sends no gradient down, so a head cannot train; use "
                "device-training=tail",
            ),
            (
                self.block_sampling > 0 and serves not in ("hosted", "shared"),
                f"block-sampling={self.block_sampling} draws blocks of an encoder that trains by gradients, not of "
                f"encoder-training={serves}; use hosted or shared",
            ),
            (
                serves == "shared" and len(set(self.cuts)) > 1,
                f"encoder-training=shared with cut={self.cut}: one copy for all wants one cut for all; use one cut, or "
                f"encoder-training=hosted",
            ),
        ]

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The cuts that are dealt to the sites in turn."""
        return parse_cuts(self.cut)

    @property
    def local(self) -> bool:
        """Does no cut leave a block to the server?"""
        return all(cut.a == cut.b for cut in self.cuts)

    def trains_head(self, cut: Cut) -> bool:
        """Does LoRA below the cut train? Always where nothing is split: then no gradient could cross."""
        return self.device_training == "head+tail" or cut.a == cut.b

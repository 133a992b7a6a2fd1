"""What a node is asked before it takes part: who it is; and what makes of its answer a site of the run."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import Message

from fedsplit import __version__
from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.errors import FederationError, FedsplitError
from fedsplit.core.foreign import printable
from fedsplit.core.notes import fit
from fedsplit.core.orders import NotHeld, Order, RollCall
from fedsplit.core.versions import differences, installed
from fedsplit.federation import messages
from fedsplit.model.backbone import Backbone


@dataclass(frozen=True, kw_only=True)
class Question:
    """The roll call's order, and how its answers are read."""

    run: str
    config: RunConfig
    backbone: Backbone
    simulated: bool
    classes: tuple[str, ...] | None = None
    """The classes that are settled before the sites are asked; None: those of the settings, else the sites' own."""

    def not_held(self, reply: Message) -> str | None:
        """The name of a site that does not hold the task; None for any other answer."""
        if reply.has_error() or messages.NOT_HELD not in reply.content.config_records:
            return None
        try:
            told = messages.read(reply.content, messages.NOT_HELD, NotHeld)
        except FedsplitError:
            return None  # An answer like any other that cannot be read.
        return told.site if told.task == self.config.task.name else None

    def call_of(self, reply: Message) -> RollCall:
        """What a site says of itself. Raises FedsplitError when it cannot take part."""
        if (fault := messages.fault_of(reply)) is not None:
            raise FederationError(fault.message)
        call = messages.read(reply.content, messages.ANSWER, RollCall)
        if call.fedsplit_version != __version__:
            raise FederationError(
                f"it runs fedsplit {printable(call.fedsplit_version)}, the server {__version__}; install the same "
                f"version on both"
            )
        if call.cut:
            self._check_cut(Cut.parse(call.cut))
        if call.rank > self.config.module.lora_rank:
            raise FederationError(
                f"its lora-rank={call.rank} is above the run's lora-rank={self.config.module.lora_rank}, the largest; "
                f"lower it in the site's node config"
            )
        if (call.spread is None) != (self.config.task.target == "class"):
            raise FederationError("it did not say where its numbers lie, or said it unasked")
        others = differences(call.versions, installed())
        return call.model_copy(update={"notes": fit([*others, *call.notes])})

    def name_of(self, reply: Message) -> str:
        """The site's name where the answer says it, whatever else is wrong with it; else empty."""
        if (fault := messages.fault_of(reply)) is not None:
            return fault.site
        try:
            return messages.read(reply.content, messages.ANSWER, RollCall).site
        except FedsplitError:
            return ""

    def _check_cut(self, cut: Cut) -> None:
        """Raise FederationError unless a site's own cut fits backbone and method."""
        placement = self.config.run.method_description.placement
        local = cut.local(self.backbone.blocks)
        if placement != "any" and local != (placement == "device"):
            wanted = "runs the whole model on the device" if placement == "device" else "is a split"
            raise FederationError(
                f"its cut={cut} does not fit method={self.config.run.method}, which {wanted}; leave cut out of the "
                f"site's node config"
            )

    def order(self, node: int) -> Message:
        """What a node is asked."""
        # A simulation's sites wait for one another, and that is no lateness of theirs.
        deadline_s = self.config.server.deadline_s
        order = Order(
            kind="roll-call",
            run=self.run,
            round=0,
            fedsplit_version=__version__,
            config=self.config.flat_for_sites(),
            classes=self.classes or self.config.task.class_names,
            cut="",
            rank=self.config.module.lora_rank,
            backbone_sha256=self.backbone.sha256,
            stream=None,
            deadline_s=0 if self.simulated else deadline_s,
        )
        content = messages.write(messages.ORDER, order)
        return Message(content, node, "query", ttl=deadline_s, group_id="0")

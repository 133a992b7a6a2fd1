"""What a run asks of its sites before its first round: statistics for a closed-form classifier, training alone.

The module is published by then. The sums are closed_form_start.py's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from fedsplit.core.errors import FederationError, FedsplitError
from fedsplit.core.orders import STATISTICS, Answer, Calibration, LocalOnly, OrderKind
from fedsplit.federation import messages
from fedsplit.federation.server.orders import Orders, Site
from fedsplit.federation.server.replies import Replies
from fedsplit.model.module import ModuleTensors
from fedsplit.training.closed_form_start import ClosedFormStart


def closed_form(
    grid: Grid, orders: Orders, replies: Replies, tensors: ModuleTensors
) -> ModuleTensors:
    """The module with its classifier solved from the sites' summed statistics, calibrated if wanted.

    Raises FederationError below `min-sites`.
    """
    start = ClosedFormStart(orders.config, orders.backbone, orders.spec, tensors)
    weights = orders.weights(orders.sites)

    def asked(
        kind: OrderKind, module: ModuleTensors, sites: Sequence[Site]
    ) -> Iterator[tuple[Site, Message]]:
        def again(site: Site) -> Iterator[Message]:
            return orders.messages(kind, 0, module, only=site)

        first = orders.messages(kind, 0, module, sites)
        for reply in replies.awaited(grid, 0, first, "starting", again=again):
            yield replies.site_of(reply), reply

    for site, reply in asked("statistics", tensors, orders.sites):
        try:
            answer = replies.read(0, site.name, reply, Answer)
            arrays = messages.from_arrays(reply.content, STATISTICS, start.wanted)
            samples, weight = site.call.samples, weights[site.name]
            start.add(site.name, arrays, samples=samples, weight=weight)
        except FedsplitError as err:
            replies.left_out(0, site.name, str(err))
            continue
        replies.account(answer.metrics)
    for name, why in start.without_the_far(orders.config.server.max_update_ratio).items():
        replies.left_out(0, name, why)
    replies.check_enough(0, len(start.sites), done=0)
    if orders.config.module.calibrate:
        tensors = tensors | start.provisional()
        summed = [site for site in orders.sites if site.name in start.sites]
        for site, reply in asked("calibrate", tensors, summed):
            try:
                told = replies.read(0, site.name, reply, Calibration)
                start.add_nll(told.nll)
            except FedsplitError as err:
                replies.left_out(0, site.name, str(err))
                continue
            replies.account(told.metrics)
    return tensors | start.final()


def local_only(
    grid: Grid,
    orders: Orders,
    replies: Replies,
    tensors: ModuleTensors,
) -> Iterator[tuple[str, LocalOnly]]:
    """Let every site train alone, for as many epochs as the run has: (its name, what it reached) as they answer."""
    asked = orders.messages("local-only", 0, tensors)

    def again(site: Site) -> Iterator[Message]:
        return orders.messages("local-only", 0, tensors, only=site)

    deadline_s = orders.deadline_s("local-only")
    answers = replies.awaited(grid, 0, asked, "training", again=again, deadline_s=deadline_s)
    for reply in answers:
        site = replies.site_of(reply)
        try:
            alone = messages.answer_of(reply, LocalOnly)
            if not all(map(replies.scoring.possible, (alone.own, alone.everywhere))):
                raise FederationError("its test numbers contradict each other")
        except FederationError as err:
            replies.left_out(0, site.name, f"it could not train alone: {err}")
            continue
        yield site.name, alone

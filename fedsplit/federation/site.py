"""A site's side of a Flower message: read the order, hand it to whoever carries it out, answer.

Called by client_app/app.py. Imports nothing of the server: no strategy, no encoder host, no gRPC server.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.common.logger import LOGGER_NAME
from pydantic import ValidationError

from fedsplit import __version__
from fedsplit.core.config import RunConfig
from fedsplit.core.errors import BackboneError, ConfigError, DataError, FedsplitError
from fedsplit.core.foreign import printable
from fedsplit.core.notes import fit
from fedsplit.core.proxies import proxy_variable
from fedsplit.core.versions import installed
from fedsplit.federation import messages, site_state
from fedsplit.federation.dial import Dial, dial_stream
from fedsplit.federation.messages import NotHeld, Order, RollCall
from fedsplit.federation.site_round import SiteRound
from fedsplit.federation.time_limit import TimeLimit
from fedsplit.model.backbone import Backbone
from fedsplit.model.threads import limit_threads
from fedsplit.training.data.sides import Record
from fedsplit.training.site_data import SiteData, SiteSettings, open_site, with_text_notes

# What Flower's own logger says is in the SuperNode's output.
_log = logging.getLogger(LOGGER_NAME)


def answer(message: Message, context: Context, *, dial: Dial = dial_stream) -> Message:
    """Carry out the order of a message; a typed error becomes a reply that names it."""
    try:
        messages.check_version(message.content)
        order = messages.read(message.content, messages.ORDER, Order)
        limit = TimeLimit.of(message, order.deadline_s)
        # What waited behind another order for too long is not begun.
        limit.check()
        content = _carry_out(order, message.content, context, dial, limit)
    except FedsplitError as err:
        name = str(context.node_config.get("site", ""))
        if not name and "partition-id" in context.node_config:
            name = f"site-{context.node_config['partition-id']}"
        return messages.fault_reply(err, message, site=name)
    return Message(content, reply_to=message)


def _carry_out(
    order: Order, content: RecordDict, context: Context, dial: Dial, limit: TimeLimit
) -> RecordDict:
    site = SiteSettings.from_node(context.node_config, node_id=context.node_id)
    config = RunConfig.from_flat(order.config)
    number = site.partition[0] if site.partition else -1
    held = site.for_task(config)
    if held is None:
        return _not_held(order, config, site)
    site = held
    limit_threads(site.threads)
    backbone = Backbone.find(config.backbone)
    if order.backbone_sha256 != backbone.sha256:
        raise BackboneError(
            f"site {site.name!r}: backbone {backbone.path} has digest {backbone.sha256[:12]}, the server's "
            f"has {order.backbone_sha256[:12]} ({backbone.differs(order.backbone_sha256)}); copy the server's model "
            f"files to this site"
        )
    record = _record(order, site, context) if site.data else None
    own = open_site(config, site, backbone, order.classes, record)
    if order.kind == "roll-call":
        own = with_text_notes(own)
        if site.data:
            _tell(site, own)
        notes = (*own.notes, *_proxy_note(config))
        return messages.write(messages.ANSWER, _roll_call(site, own, backbone, number, notes))
    return SiteRound(order, config, site, backbone, own, dial, limit).carry_out(content)


def _not_held(order: Order, config: RunConfig, site: SiteSettings) -> RecordDict:
    """That the task is none of this site's. Raises ConfigError where it is ordered to work on it all the same."""
    if order.kind != "roll-call":
        raise ConfigError(
            f"site {site.name!r} does not hold task {config.task!r} and was ordered to {order.kind}; it must not "
            f"lose a task while the run lasts, see tasks in its node config"
        )
    return messages.write(messages.NOT_HELD, NotHeld(site=site.name, task=config.task))


def _record(order: Order, site: SiteSettings, context: Context) -> Record:
    """What a real site keeps of its samples. A run that is resumed is a new one to Flower, and gets a new list."""
    folder = Path(site.state_dir or site_state.DEFAULT_FOLDER)
    return Record(folder, site.name, f"{context.run_id}/{order.run}")


def _tell(site: SiteSettings, own: SiteData) -> None:
    """Write into the site's log which names leave it, before they do."""
    counts = np.bincount(own.examples.labels, minlength=len(own.examples.classes))
    told = ", ".join(
        f"{printable(name)} ({count})"
        for name, count in zip(own.examples.classes, counts, strict=True)
    )
    _log.info("site %s tells the server its classes: %s", site.name, printable(told, limit=2000))
    for note in own.notes:
        _log.info("site %s: %s", site.name, printable(note))


def _proxy_note(config: RunConfig) -> tuple[str, ...]:
    """That a proxy stands before the encoder, which gRPC does not say when it fails there."""
    variable = proxy_variable(config.encoder_address, os.environ)
    if not variable:
        return ()
    return (
        f"{variable} is set where the SuperNode runs, and catches the encoder's address {config.encoder_address}; if the "
        f"encoder is not reached, add its host to no_proxy there",
    )


def _roll_call(
    site: SiteSettings, own: SiteData, backbone: Backbone, number: int, notes: tuple[str, ...]
) -> RollCall:
    if site.cut is not None:
        site.cut.check(backbone.blocks)
    try:
        return RollCall(
            site=site.name,
            cut=str(site.cut) if site.cut is not None else "",
            rank=site.lora_rank,
            classes=own.examples.classes,
            samples=len(own.train),
            test_samples=len(own.test),
            backbone_sha256=backbone.sha256,
            fedsplit_version=__version__,
            versions=installed(),
            number=number,
            pixel_max=own.examples.pixel_max,
            notes=fit(notes),
        )
    except ValidationError as err:
        first = err.errors()[0]
        raise DataError(
            f"site {site.name!r} cannot take part with {first['loc'][0]}: {printable(first['msg'])}"
        ) from err

"""A running encoder for the tests of the trunk, and what a site and a ServerApp need to talk to it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from fedsplit import __version__
from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Grant
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec
from fedsplit.transport import tokens
from fedsplit.transport.client import StreamEncoder, publish
from fedsplit.transport.server import EncoderServer
from fedsplit.trunk.host import BackboneHost
from tests.model.whole import SPEC, trained_start

KEY = secrets.token_bytes(32)


def packed(
    backbone: Backbone,
    spec: ModuleSpec = SPEC,
    tensors: module.ModuleTensors | None = None,
) -> bytes:
    """The host's part of a module; by default of the trained start."""
    tensors = tensors if tensors is not None else trained_start(backbone)
    return module.pack(spec, {n: tensors[n] for n in module.server_names(backbone, spec)})


def publisher() -> str:
    return tokens.sign_publisher("r", KEY, 60)


@contextmanager
def serving(backbone: Backbone) -> Iterator[EncoderServer]:
    """A running encoder that has the trained start published as version "v"."""
    server = EncoderServer(BackboneHost(backbone), key=KEY)
    try:
        publish(server.address, publisher(), "v", packed(backbone))
        yield server
    finally:
        server.close(grace_s=0.5)


def grant(backbone: Backbone, cut: Cut, **other: object) -> Grant:
    values = {
        "run": "r",
        "site": "s",
        "task": "t",
        "round": 1,
        "a": cut.a,
        "b": cut.b,
        "version": "v",
        "backbone_sha256": backbone.sha256,
        "fedsplit_version": __version__,
        "max_batch": 8,
        "max_tokens": 40,
        "max_steps": 20,
    }
    return Grant.model_validate(values | other)


def dial(server: EncoderServer, what: Grant, codec: str = "fp32") -> StreamEncoder:
    return StreamEncoder(server.address, tokens.sign(what, KEY, 60), what, codec=codec)

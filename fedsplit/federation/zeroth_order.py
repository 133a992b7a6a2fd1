"""Zeroth order at the device, seen from both ends: the settings that a seed depends on, and the server's replay.

A site sends one number a step and direction; both sides make the directions of the run's seed, the site's name and
the round, so the server arrives at the site's very weights (training/zeroth_order.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from fedsplit.core.config import RunConfig
from fedsplit.core.errors import ProtocolError, UpdateError
from fedsplit.federation import messages
from fedsplit.model.backbone import Backbone
from fedsplit.training.zeroth_order import ZerothOrder, replay


def zeroth_order(config: RunConfig, *, site: str, round_: int) -> ZerothOrder:
    """How a site estimates its gradients in a round."""
    return ZerothOrder(
        seed=direction_seed(config, site=site, round_=round_),
        estimator=config.zo_estimator,
        queries=config.zo_queries,
        epsilon=config.zo_epsilon,
        directions=config.zo_directions,
    )


def direction_seed(config: RunConfig, *, site: str, round_: int) -> int:
    """63 bits of the run's seed, the site and the round: no two of them share directions."""
    key = f"{config.seed}/{site}/{round_}/directions"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def scalars_shape(config: RunConfig, samples: int) -> messages.Shape:
    """(steps, queries) of a site's round."""
    return config.local_epochs * -(-samples // config.batch_size), config.zo_queries


def scalars_of(
    content: RecordDict, config: RunConfig, *, site: str, samples: int
) -> NDArray[np.float32]:
    """A site's scalars of a round, [steps, queries]. Raises UpdateError and FederationError where they are not that."""
    wanted = scalars_shape(config, samples)
    found = messages.from_arrays(content, messages.SCALARS, {messages.SCALARS: wanted})
    if messages.SCALARS not in found:
        raise UpdateError(
            f"update of site {site!r} refused: no scalars, {wanted[0]} steps are wanted"
        )
    return found[messages.SCALARS]


def replayed(
    scalars: NDArray[np.float32],
    config: RunConfig,
    backbone: Backbone,
    *,
    site: str,
    round_: int,
    start: Mapping[str, NDArray[np.float32]],
) -> dict[str, NDArray[np.float32]]:
    """The deltas that a site's scalars stand for; `start` is what it trained, as it received it.

    Raises UpdateError for scalars that its training cannot have given.
    """
    classifier = backbone.family.classifier
    other = config.lora_learning_rate or config.learning_rate
    rates = {n: config.learning_rate if n.split(".", 1)[0] in classifier else other for n in start}
    try:
        now = replay(
            start,
            scalars,
            zeroth_order(config, site=site, round_=round_),
            rates,
            factors=[config.learning_rate_factor(round_)] * len(scalars),
            weight_decay=config.weight_decay,
        )
    except ProtocolError as err:
        raise UpdateError(f"update of site {site!r} refused: {err}") from err
    return {name: now[name] - start[name] for name in start}

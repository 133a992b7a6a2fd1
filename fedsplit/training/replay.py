"""Zeroth order at the device, seen from both ends: the settings that a seed depends on, and what scalars stand for.

A site sends one number a step and direction; both sides make the directions of the run's seed, the site's name and
the round, so the server arrives at the site's very weights (training/zeroth_order.py), and a site that missed rounds at
the server's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.aggregation import Update, aggregate
from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.errors import FederationError, ProtocolError, UpdateError
from fedsplit.core.orders import Order, Shape
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec, ModuleTensors
from fedsplit.training.activation_cache import version_of
from fedsplit.training.plan import plan
from fedsplit.training.zeroth_order import ZerothOrder, replay


def zeroth_order(config: RunConfig, *, site: str, round_: int) -> ZerothOrder:
    """How a site estimates its gradients in a round."""
    return ZerothOrder(
        seed=direction_seed(config, site=site, round_=round_),
        estimator=config.train.zo_estimator,
        queries=config.train.zo_queries,
        epsilon=config.train.zo_epsilon,
        directions=config.train.zo_directions,
    )


def direction_seed(config: RunConfig, *, site: str, round_: int) -> int:
    """63 bits of the run's seed, the site and the round: no two of them share directions."""
    key = f"{config.run.seed}/{site}/{round_}/directions"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def scalars_shape(config: RunConfig, samples: int) -> Shape:
    """(steps, queries) of a site's round."""
    return config.train.local_epochs * -(
        -samples // config.train.batch_size
    ), config.train.zo_queries


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
    other = config.train.lora_learning_rate or config.train.learning_rate
    rates = {
        n: config.train.learning_rate if n.split(".", 1)[0] in classifier else other for n in start
    }
    try:
        now = replay(
            start,
            scalars,
            zeroth_order(config, site=site, round_=round_),
            rates,
            factors=[config.train.learning_rate_factor(round_)] * len(scalars),
            weight_decay=config.train.weight_decay,
        )
    except ProtocolError as err:
        raise UpdateError(f"update of site {site!r} refused: {err}") from err
    return {name: now[name] - start[name] for name in start}


def history_shapes(order: Order, config: RunConfig) -> dict[str, Shape]:
    """Names and shapes of the scalars that come with an order to replay the rounds since the one that the site holds."""
    return {
        f"{past.number}/{i}": scalars_shape(config, samples)
        for past in order.history
        for i, (_, samples, _) in enumerate(past.sites)
    }


def caught_up(
    scalars: Mapping[str, NDArray[np.float32]],
    order: Order,
    kept: ModuleTensors,
    *,
    config: RunConfig,
    backbone: Backbone,
    spec: ModuleSpec,
) -> ModuleTensors:
    """The module of this order, from what the site kept and the scalars of the rounds since, as `history_shapes` names them.

    Raises FederationError where it does not arrive at the server's module.
    """
    module = dict(kept)
    try:
        for past in order.history:
            names = plan(config, backbone, spec, Cut.parse(order.cut), past.number).trained
            start = {n: module[n] for n in names}
            updates = [
                Update(
                    site=site,
                    samples=weight,
                    delta=replayed(
                        scalars[f"{past.number}/{i}"],
                        config,
                        backbone,
                        site=site,
                        round_=past.number,
                        start=start,
                    ),
                )
                for i, (site, _, weight) in enumerate(past.sites)
            ]
            module = aggregate(module, updates)
    except (KeyError, UpdateError) as err:
        raise FederationError(
            f"the rounds since round {order.held} cannot be replayed: {err}"
        ) from err
    if version_of(module) != order.module_digest:
        raise FederationError(
            "the replayed rounds do not give the server's module on this machine's processor; the whole module "
            "is sent from now on"
        )
    return module

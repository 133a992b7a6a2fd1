"""What the server makes of a round's updates: robust rules and server optimisers, by Flower's own classes.

`ServerRule.combine` is two steps. First the sites' updates become one module: by the LoRA rule (means), or,
with a robust rule, by Flower's trimmed mean, median, Krum, Multi-Krum or Bulyan on the sites' deltas. Then the server's
optimiser (FedAvgM, FedAdam, FedYogi) takes that module's difference from the last one as its pseudo-gradient.

How the two go with a LoRA rule. A robust rule compares tensors of one site with those of another, so all must
have one rank and a common basis: plain, ffa and rolora (`Rule.factorwise`). A server optimiser steps along A's and
B's differences, so a pair must move on from where it was: all but flexlora and flora (`Rule.continuous`), which
make a new pair each round. Anything else is a ConfigError.

Mixed cuts. A robust rule works by itself on each group of tensors that the same sites trained: a group is
judged by all who know it, and a site that behaves in shared tensors but not in its own gains nothing. Every group
needs `sites_needed` sites: `check` says so before the run; in a round that misses sites, a group with too few
keeps its value (`held_back`), for a rule that cannot outvote hostile sites protects from none.

Flower's strategies are driven here without a grid, by replies made of arrays.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    Bulyan,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
)

from fedsplit.core.aggregation import Tensors, Update, in_order, sites_needed
from fedsplit.core.errors import ConfigError, FederationError
from fedsplit.core.lora_pairs import Floats
from fedsplit.core.lora_rules import Module, Rule

# Flower's own defaults of FedAdam and FedYogi (arXiv 2003.00295, table 8 and appendix D.2).
_BETA_2 = 0.99
_TAU = 1e-3


class ServerRule:
    """Combines a round's updates and steps the server's optimiser; its state lives over the rounds."""

    def __init__(
        self,
        rule: Rule,
        *,
        optimizer: str = "mean",
        learning_rate: float = 1.0,
        momentum: float = 0.9,
        robust_rule: str = "mean",
        byzantine_sites: int = 0,
    ) -> None:
        """`momentum` is FedAvgM's, and beta 1 of adam and yogi. Raises ConfigError on what cannot go together."""
        self.rule = rule
        self.robust_rule = robust_rule
        self.byzantine_sites = byzantine_sites
        self.held_back: tuple[str, ...] = ()
        """Tensors that the last round left alone because too few sites had trained them."""
        self._optimizer = ServerOptimizer(optimizer, learning_rate, momentum)
        if faults := self._faults():
            raise ConfigError("; ".join(faults))

    def _faults(self) -> list[str]:
        name, faults = self.rule.name, []
        if self.robust_rule != "mean" and not self.rule.factorwise:
            faults.append(
                f"robust-rule={self.robust_rule} compares the sites' tensors, which lora-aggregation={name} "
                f"does not average; use lora-aggregation=plain, ffa or rolora"
            )
        if self._optimizer.steps and not self.rule.continuous:
            faults.append(
                f"lora-aggregation={name} makes new pairs each round, so the server's optimiser has nothing "
                f"to step along; use server-optimizer=mean with server-learning-rate=1"
            )
        if self.robust_rule == "trimmed-mean" and not self.byzantine_sites:
            faults.append("robust-rule=trimmed-mean trims nobody at byzantine-sites=0; set it")
        return faults

    def check(self, trained: Mapping[str, Collection[str]]) -> None:
        """Raise ConfigError unless enough sites train each tensor; `trained[site]` are that site's names."""
        if self.robust_rule == "mean":
            return
        needed = sites_needed(self.robust_rule, self.byzantine_sites)
        names = {name for tensors in trained.values() for name in tensors}
        counts = {n: sum(n in tensors for tensors in trained.values()) for n in names}
        if short := sorted(n for n, count in counts.items() if count < needed):
            raise ConfigError(
                f"robust-rule={self.robust_rule} with byzantine-sites={self.byzantine_sites} needs {needed} sites "
                f"that train each tensor, {short[0]} has {counts[short[0]]} ({len(short)} of {len(names)} "
                f"tensors have too few); add sites, give all one cut or lower byzantine-sites"
            )

    def combine(
        self,
        module: Tensors,
        updates: Sequence[Update],
        received: Mapping[str, Tensors],
        round_: int,
    ) -> Module:
        """The next module; `received` as in `Rule.aggregate`.

        The order of the sites does not change the result. Raises FederationError when nothing can be
        combined.
        """
        self.held_back = ()
        if self.robust_rule == "mean":
            combined = self.rule.aggregate(module, updates, received, round_)
        else:
            combined = self._robust(module, in_order(updates))
        moved = {n for u in updates for n in u.delta if n in module} - set(self.held_back)
        return combined | self._optimizer.step(module, {n: combined[n] for n in moved}, round_)

    def state(self) -> dict[str, Floats]:
        """What the optimiser must remember, flat by name, for a checkpoint. Empty where there is nothing."""
        return self._optimizer.state()

    def restore(self, state: Mapping[str, Floats]) -> None:
        """Go on from what `state` returned."""
        self._optimizer.restore(state)

    def _robust(self, module: Tensors, updates: Sequence[Update]) -> Module:
        """module + the robust combination of the deltas, group by group of tensors with the same sites."""
        needed = sites_needed(self.robust_rule, self.byzantine_sites)
        groups = _groups(module, updates)
        judged = [(names, sites) for names, sites in groups if len(sites) >= needed]
        if groups and not judged:
            raise FederationError(
                f"robust-rule={self.robust_rule} with byzantine-sites={self.byzantine_sites} needs {needed} sites "
                f"that trained the same tensors, {len(updates)} useful updates came in; add sites, wait "
                f"longer (deadline-s) or lower byzantine-sites"
            )
        self.held_back = tuple(n for names, sites in groups if len(sites) < needed for n in names)
        combined = dict(module)
        for names, sites in judged:
            _check_shapes(module, sites, names)
            # One vector a site: no rule sees a tensor's shape, and Bulyan collects garbage for each array.
            replies = [_reply({"all": _flat(u.delta, names)}, u.samples) for u in sites]
            moved = _aggregated(self._strategy(len(sites)), replies)["all"]
            combined |= _unflat(_flat(module, names) + moved, module, names)
        return combined

    def _strategy(self, sites: int) -> FedAvg:
        """Flower's class of the robust rule, for so many sites."""
        hostile = self.byzantine_sites
        match self.robust_rule:
            case "trimmed-mean":
                # Flower trims int(beta * sites) at each end; the quarter keeps rounding from making it one less.
                return FedTrimmedAvg(beta=(hostile + 0.25) / sites)
            case "median":
                return FedMedian()
            case "krum":
                return Krum(num_malicious_nodes=hostile)
            case "multi-krum":
                # As many as can be honest for sure.
                return MultiKrum(num_malicious_nodes=hostile, num_nodes_to_select=sites - hostile)
            case _:
                return Bulyan(num_malicious_nodes=hostile)


class ServerOptimizer:
    """FedAvgM, FedAdam or FedYogi on the tensors that a round trained; the others, and their state, rest.

    Flower steps every tensor each round. Here momentum must not move a tensor that nobody trained: with rolora
    one factor rests each round, and with mixed cuts a block may have no site.
    """

    def __init__(self, name: str, learning_rate: float, momentum: float) -> None:
        self.name = name
        self.learning_rate = learning_rate
        self.momentum = momentum if name != "mean" else 0.0
        self.steps = name != "mean" or learning_rate != 1.0
        """False: the module is the mean itself."""
        self._first: Module = {}
        self._second: Module = {}

    def step(self, old: Tensors, new: Tensors, round_: int) -> Module:
        """The tensors of `new`, moved from `old` by the optimiser instead of straight there."""
        if not self.steps or not new:
            return dict(new)
        names = sorted(new)
        current = {n: old[n] for n in names}
        replies = [_reply({n: new[n] for n in names}, 1)]
        if self.name in {"mean", "momentum"}:
            return self._momentum_step(current, replies)
        return self._adaptive_step(current, replies, round_)

    def _momentum_step(self, current: Module, replies: list[Message]) -> Module:
        strategy = FedAvgM(server_learning_rate=self.learning_rate, server_momentum=self.momentum)
        strategy.current_arrays = _record(current)
        if self.momentum:
            strategy.momentum_vector = list(_of(self._first, current).values())
        stepped = _aggregated(strategy, replies)
        if strategy.momentum_vector is not None:
            self._first |= _floats(dict(zip(current, strategy.momentum_vector, strict=True)))
        return stepped

    def _adaptive_step(self, current: Module, replies: list[Message], round_: int) -> Module:
        kind = FedAdam if self.name == "adam" else FedYogi
        strategy = kind(eta=self.learning_rate, beta_1=self.momentum, beta_2=_BETA_2, tau=_TAU)
        strategy.current_arrays = dict(current)
        strategy.m_t = dict(_of(self._first, current))
        strategy.v_t = dict(_of(self._second, current))
        stepped = _aggregated(strategy, replies, round_)
        self._first |= _floats(strategy.m_t)
        self._second |= _floats(strategy.v_t)
        return stepped

    def state(self) -> dict[str, Floats]:
        """The moments, as "first/<tensor>" and "second/<tensor>"."""
        first = {f"first/{n}": value for n, value in self._first.items()}
        return first | {f"second/{n}": value for n, value in self._second.items()}

    def restore(self, state: Mapping[str, Floats]) -> None:
        """The inverse of `state`."""
        self._first = _below("first/", state)
        self._second = _below("second/", state)


def _groups(module: Tensors, updates: Sequence[Update]) -> list[tuple[list[str], list[Update]]]:
    """The trained tensors by who trained them, in the order of the module."""
    by_sites: dict[tuple[str, ...], list[str]] = {}
    for name in module:
        if sites := tuple(u.site for u in updates if name in u.delta):
            by_sites.setdefault(sites, []).append(name)
    return [(names, [u for u in updates if u.site in sites]) for sites, names in by_sites.items()]


def _check_shapes(module: Tensors, updates: Iterable[Update], names: Iterable[str]) -> None:
    for name in names:
        for update in updates:
            if update.delta[name].shape != module[name].shape:
                raise ConfigError(
                    f"site {update.site!r} sends {name} as {update.delta[name].shape}, the module has "
                    f"{module[name].shape}; a robust rule wants one rank for all sites, leave lora-ranks out"
                )


def _flat(tensors: Tensors, names: Iterable[str]) -> Floats:
    return np.concatenate([tensors[name].ravel() for name in names])


def _unflat(flat: Floats, like: Tensors, names: Sequence[str]) -> Module:
    parts = np.split(flat, np.cumsum([like[name].size for name in names])[:-1])
    return {n: part.reshape(like[n].shape) for n, part in zip(names, parts, strict=True)}


def _record(tensors: Tensors) -> ArrayRecord:
    return ArrayRecord({n: Array(np.asarray(value)) for n, value in tensors.items()})


def _reply(tensors: Tensors, samples: int) -> Message:
    """A site's reply to a train message, as Flower's strategies read it."""
    numbers = MetricRecord({"num-examples": samples})
    content = RecordDict({"arrays": _record(tensors), "metrics": numbers})
    # With metadata of its own, for a message to be sent asks for the app's identity, and this one stays here.
    about = Metadata(
        run_id=0,
        message_id="",
        src_node_id=0,
        dst_node_id=0,
        reply_to_message_id="",
        group_id="",
        created_at=0.0,
        ttl=0.0,
        message_type="train",
    )
    return Message(metadata=about, content=content)  # type: ignore[call-overload, no-any-return]


def _aggregated(strategy: FedAvg, replies: list[Message], round_: int = 1) -> Module:
    """What Flower's strategy makes of the replies."""
    with _quiet():
        arrays, _ = strategy.aggregate_train(round_, replies)
    assert arrays is not None, "the sites were counted before"
    return _floats({name: array.numpy() for name, array in arrays.items()})


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop Flower's "received N results" of this thread: here a call is a group of tensors, not a round."""
    thread = threading.get_ident()

    def wanted(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.levelno >= logging.WARNING

    logger = logging.getLogger("flwr")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def _floats(tensors: Mapping[str, np.ndarray]) -> Module:
    return {n: np.asarray(value, dtype=np.float32) for n, value in tensors.items()}


def _of(moments: Tensors, like: Tensors) -> Module:
    """The moments of these tensors, zero where there is none yet."""
    return {n: moments.get(n, np.zeros_like(value)) for n, value in like.items()}


def _below(prefix: str, state: Mapping[str, Floats]) -> Module:
    return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}

"""Robust rules and server optimisers against Flower's own classes, run over a grid on the same arrays."""

from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
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

from fedsplit.core.aggregation import Update, aggregate, sites_needed
from fedsplit.core.errors import ConfigError, FederationError
from fedsplit.core.lora_rules import RULES, rule_of
from fedsplit.federation.engine.in_process import InProcessGrid
from fedsplit.federation.server.combine.rules import ServerRule

A, B, HEAD = "blocks.0.q.lora_A.weight", "blocks.0.q.lora_B.weight", "classifier.bias"
START = {
    A: np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    B: np.linspace(0, 2, 8, dtype=np.float32).reshape(4, 2),
    HEAD: np.array([0.5, -0.5], dtype=np.float32),
}


@pytest.fixture(autouse=True, scope="module")
def quick_garbage_collection() -> Iterator[None]:
    """Flower's Bulyan collects garbage once a site; what is there before the tests need not be searched."""
    gc.freeze()
    yield
    gc.unfreeze()


def delta(site: int, round_: int, *, hostile: int = 0) -> dict[str, np.ndarray]:
    """What a site moves its tensors by; the first `hostile` sites are far off."""
    rng = np.random.default_rng([site, round_])
    factor = 50.0 if site <= hostile else 0.1
    return {n: (factor * rng.standard_normal(v.shape)).astype(np.float32) for n, v in START.items()}


def samples(site: int) -> int:
    return 7 * site


def updates(sites: int, round_: int = 1, *, hostile: int = 0) -> list[Update]:
    return [
        Update(site=f"s{i:02}", samples=samples(i), delta=delta(i, round_, hostile=hostile))
        for i in range(1, sites + 1)
    ]


class FlowersGrid(InProcessGrid):
    """The in-process grid with what Flower's own `start` calls."""

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        waiting, replies = set(self.push_messages(messages)), []
        while len(replies) < len(waiting):
            replies += self.pull_messages(waiting)
        return replies


def flower_run(
    strategy: FedAvg, sites: int, rounds: int = 1, *, hostile: int = 0
) -> dict[str, np.ndarray]:
    """The strategy run as Flower runs it: `start` over a grid, sites that answer train messages."""

    def answer(message: Message, context: Context) -> Message:
        round_ = message.content["config"]["server-round"]
        # The first site is 1, whatever the grid's first number is.
        site = message.metadata.dst_node_id - first + 1
        moved = delta(site, int(round_), hostile=hostile)
        new = {n: a.numpy() + moved[n] for n, a in message.content["arrays"].items()}
        arrays = ArrayRecord({n: Array(v) for n, v in new.items()})
        numbers = MetricRecord({"num-examples": samples(site)})
        content = RecordDict({"arrays": arrays, "metrics": numbers})
        return Message(content, reply_to=message)

    start = ArrayRecord({n: Array(v) for n, v in START.items()})
    with FlowersGrid([{} for _ in range(sites)], answer) as grid:
        first = min(grid.get_node_ids())
        result = strategy.start(grid, start, num_rounds=rounds)
    return {n: a.numpy() for n, a in result.arrays.items()}


def server_rule(name: str = "plain", **settings: object) -> ServerRule:
    return ServerRule(rule_of(name, scale=1.0, seed=0), **settings)


def combine(
    rule: ServerRule, module: dict[str, np.ndarray], sites: Sequence[Update], round_: int = 1
) -> dict[str, np.ndarray]:
    return rule.combine(module, sites, {u.site: module for u in sites}, round_)


def assert_same(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert set(got) == set(wanted)
    for name, value in got.items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, wanted[name], rtol=2e-5, atol=2e-6, err_msg=name)


NO_EVAL = {"fraction_evaluate": 0.0}
ROBUST = {
    # Flower's beta is a share: 0.2 of 11 sites are the 2 that are trimmed at each end.
    "trimmed-mean": FedTrimmedAvg(beta=0.2, **NO_EVAL),
    "median": FedMedian(**NO_EVAL),
    "krum": Krum(num_malicious_nodes=2, **NO_EVAL),
    "multi-krum": MultiKrum(num_malicious_nodes=2, num_nodes_to_select=9, **NO_EVAL),
    "bulyan": Bulyan(num_malicious_nodes=2, **NO_EVAL),
}
HOSTILE, SITES = 2, 11


@pytest.mark.parametrize("name", ROBUST)
def test_robust_rules_give_what_flowers_classes_give(name: str) -> None:
    rule = server_rule(robust_rule=name, byzantine_sites=HOSTILE)
    got = combine(rule, START, updates(SITES, hostile=HOSTILE))
    assert_same(got, flower_run(ROBUST[name], SITES, hostile=HOSTILE))
    assert rule.held_back == ()


@pytest.mark.parametrize("name", ROBUST)
def test_robust_rules_stand_hostile_sites_where_the_mean_does_not(name: str) -> None:
    attacked = updates(SITES, hostile=HOSTILE)
    rule = server_rule(robust_rule=name, byzantine_sites=HOSTILE)
    moved = max(np.abs(v - START[n]).max() for n, v in combine(rule, START, attacked).items())
    mean = max(np.abs(v - START[n]).max() for n, v in aggregate(START, attacked).items())
    assert moved < 0.5 < 1 < mean


OPTIMIZERS = {
    "momentum": lambda: FedAvgM(server_learning_rate=0.5, server_momentum=0.8, **NO_EVAL),
    "adam": lambda: FedAdam(eta=0.5, beta_1=0.8, **NO_EVAL),
    "yogi": lambda: FedYogi(eta=0.5, beta_1=0.8, **NO_EVAL),
}


def optimised(rule: ServerRule, rounds: range, module: dict[str, np.ndarray]) -> dict:
    for round_ in rounds:
        module = combine(rule, module, updates(3, round_), round_)
    return module


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_server_optimisers_give_what_flowers_classes_give_over_rounds(name: str) -> None:
    rule = server_rule(optimizer=name, learning_rate=0.5, momentum=0.8)
    assert_same(optimised(rule, range(1, 5), START), flower_run(OPTIMIZERS[name](), 3, 4))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_optimiser_goes_on_to_the_bit(name: str) -> None:
    settings = {"optimizer": name, "learning_rate": 0.5, "momentum": 0.8}
    straight = optimised(server_rule(**settings), range(1, 6), START)
    first = server_rule(**settings)
    half = optimised(first, range(1, 3), START)
    state = first.state()
    assert state
    assert all(v.dtype == np.float32 for v in state.values())
    second = server_rule(**settings)
    second.restore(state)
    resumed = optimised(second, range(3, 6), half)
    assert all(np.array_equal(v, resumed[n]) for n, v in straight.items())
    forgetful = optimised(server_rule(**settings), range(3, 6), half)
    assert not all(np.array_equal(v, forgetful[n]) for n, v in straight.items())


def test_a_robust_rule_and_an_optimiser_work_one_after_the_other() -> None:
    both = server_rule(robust_rule="median", optimizer="momentum", learning_rate=0.5, momentum=0.0)
    median = combine(server_rule(robust_rule="median"), START, updates(3))
    got = combine(both, START, updates(3))
    for name, value in START.items():
        np.testing.assert_allclose(got[name], value + 0.5 * (median[name] - value), rtol=1e-5)


def test_without_rule_and_optimiser_it_is_the_lora_rule_to_the_bit() -> None:
    rule, got = server_rule(), combine(server_rule(), START, updates(3))
    wanted = aggregate(START, updates(3))
    assert all(np.array_equal(v, wanted[n]) for n, v in got.items())
    assert rule.state() == {}


def test_mean_with_a_learning_rate_steps_so_far() -> None:
    got = combine(server_rule(learning_rate=0.5), START, updates(3))
    wanted = aggregate(START, updates(3))
    for name, value in START.items():
        np.testing.assert_allclose(got[name], (value + wanted[name]) / 2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", RULES)
def test_every_lora_rule_combines_alone(name: str) -> None:
    rule = rule_of(name, scale=1.0, seed=0)
    wanted = rule.aggregate(START, updates(3), dict.fromkeys(("s01", "s02", "s03"), START), 1)
    got = combine(server_rule(name), START, updates(3))
    assert set(got) == set(wanted)
    assert all(np.array_equal(v, wanted[n]) for n, v in got.items())


# Mixed cuts and factors that rest.


def without(update: Update, *names: str) -> Update:
    rest = {n: v for n, v in update.delta.items() if n not in names}
    return Update(site=update.site, samples=update.samples, delta=rest)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_does_not_move_a_tensor_that_nobody_trained(name: str) -> None:
    rule = server_rule("rolora", optimizer=name, learning_rate=0.5)
    module = START
    for round_ in range(1, 5):
        rests = A if round_ % 2 else B
        moved = combine(rule, module, [without(u, rests) for u in updates(3, round_)], round_)
        assert np.array_equal(moved[rests], module[rests])
        assert not np.array_equal(moved[HEAD], module[HEAD])
        module = moved
    assert {n.split("/")[1] for n in rule.state()} == {A, B, HEAD}


@pytest.mark.parametrize("name", ROBUST)
def test_each_group_of_tensors_is_judged_by_the_sites_that_trained_it(name: str) -> None:
    deep = updates(14, hostile=1)
    # Sites 1..7 train all, 8..14 not A: each group has enough sites for one hostile one.
    mixed = [u if i < 7 else without(u, A) for i, u in enumerate(deep)]
    rule = server_rule(robust_rule=name, byzantine_sites=1)
    rule.check({u.site: set(u.delta) for u in mixed})
    got = combine(rule, START, mixed)
    only_a = {A: START[A]}
    first = [Update(site=u.site, samples=u.samples, delta={A: u.delta[A]}) for u in mixed[:7]]
    assert np.array_equal(got[A], combine(rule, only_a, first)[A])
    rest = {B: START[B], HEAD: START[HEAD]}
    others = combine(rule, rest, [without(u, A) for u in mixed])
    assert all(np.array_equal(got[n], others[n]) for n in rest)


def test_a_group_with_too_few_sites_keeps_its_value_and_is_named() -> None:
    rule = server_rule(robust_rule="krum", byzantine_sites=1, optimizer="momentum")
    mixed = [u if i < 4 else without(u, A) for i, u in enumerate(updates(5))]
    got = combine(rule, START, mixed)
    assert rule.held_back == (A,)
    assert np.array_equal(got[A], START[A])
    assert not np.array_equal(got[B], START[B])
    combine(rule, START, updates(5), 2)
    assert rule.held_back == ()


def test_sites_that_keep_all_to_themselves_move_nothing() -> None:
    alone = [Update(site=u.site, samples=u.samples, delta={}) for u in updates(3)]
    for rule in (server_rule(robust_rule="median"), server_rule(optimizer="adam")):
        assert all(np.array_equal(v, START[n]) for n, v in combine(rule, START, alone).items())


# What is refused.


@pytest.mark.parametrize("name", ROBUST)
def test_too_few_sites_are_refused_before_the_run_and_in_a_round(name: str) -> None:
    rule = server_rule(robust_rule=name, byzantine_sites=2)
    needed = sites_needed(name, 2)
    assert needed == {"krum": 7, "multi-krum": 7, "bulyan": 11}.get(name, 5)
    rule.check({f"s{i}": START for i in range(needed)})
    with pytest.raises(
        ConfigError, match=rf"robust-rule={name} .*needs {needed} sites .* lower byz"
    ):
        rule.check({f"s{i}": START for i in range(needed - 1)})
    combine(rule, START, updates(needed))
    with pytest.raises(FederationError, match=rf"needs {needed} sites .*, {needed - 1} useful"):
        combine(rule, START, updates(needed - 1))
    with pytest.raises(FederationError, match="no useful update"):
        combine(rule, START, [])


def test_check_counts_the_sites_of_each_tensor() -> None:
    rule = server_rule(robust_rule="median", byzantine_sites=1)
    with pytest.raises(
        ConfigError, match=r"classifier\.bias has 2 \(1 of 3 tensors have too few\)"
    ):
        rule.check({"a": {A, B}, "b": START, "c": START})
    server_rule().check({"a": START})


@pytest.mark.parametrize("name", ["flexlora", "flora", "lora-fair", "hetlora"])
def test_rules_on_products_refuse_robust_rules(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"robust-rule=median .*lora-aggregation={name} .*use "):
        server_rule(name, robust_rule="median")


@pytest.mark.parametrize("name", ["flexlora", "flora"])
def test_rules_that_make_new_pairs_refuse_an_optimiser(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"lora-aggregation={name} makes new pairs each round"):
        server_rule(name, optimizer="adam")
    with pytest.raises(ConfigError, match="nothing to step along"):
        server_rule(name, learning_rate=0.5)


def test_a_trimmed_mean_that_trims_nobody_is_refused() -> None:
    with pytest.raises(ConfigError, match="trims nobody at byzantine-sites=0"):
        server_rule(robust_rule="trimmed-mean")


def test_a_robust_rule_refuses_sites_of_another_rank() -> None:
    odd = updates(3)
    odd[1] = Update(site="s02", samples=1, delta=odd[1].delta | {A: np.zeros((1, 3), np.float32)})
    with pytest.raises(
        ConfigError, match=r"site 's02' sends .*lora_A\.weight as \(1, 3\).*one rank"
    ):
        combine(server_rule(robust_rule="median"), START, odd)


# And all of them.


@pytest.mark.parametrize("name", ["mean", *ROBUST])
def test_the_order_of_the_sites_changes_no_bit(name: str) -> None:
    sites = updates(7)
    byzantine = 1 if name != "mean" else 0
    results = set()
    for order in itertools.islice(itertools.permutations(sites), 0, None, 1300):
        rule = server_rule(robust_rule=name, byzantine_sites=byzantine, optimizer="adam")
        got = combine(rule, START, order)
        results.add(b"".join(got[n].tobytes() for n in sorted(got)))
    assert len(results) == 1


def test_flowers_log_is_spared_and_left_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("flwr")
    before = (logger.level, list(logger.filters))
    with caplog.at_level(logging.DEBUG, logger="flwr"):
        combine(server_rule(robust_rule="median", optimizer="adam"), START, updates(3))
    assert not [r for r in caplog.records if r.name == "flwr"]
    assert (logger.level, list(logger.filters)) == before

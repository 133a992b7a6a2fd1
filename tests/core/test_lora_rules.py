"""Aggregation of LoRA: exactness by products, mixed ranks and cuts, and what is wrong with the plain rule."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.core.aggregation import Tensors, Update, aggregate
from fedsplit.core.errors import ConfigError, FederationError
from fedsplit.core.lora_pairs import LORA_A, LORA_B, LORA_MERGED, layers, product
from fedsplit.core.lora_rules import RULES, FlexLoraRule, Rule, rule_of

SCALE, SEED, RANK = 2.0, 3, 4
LOW, HIGH = "blocks.0.q", "blocks.1.q"
EXACT = [name for name, rule in RULES.items() if rule.exact]


def module_of(
    rng: np.random.Generator, *, rank: int = RANK, out: int = 9, wide: int = 7, names=(LOW, HIGH)
) -> dict[str, np.ndarray]:
    """A module in the middle of a run: neither factor is zero."""
    module = {"classifier.weight": rng.standard_normal((3, 5))}
    for layer in names:
        module[layer + LORA_A] = rng.standard_normal((rank, wide))
        module[layer + LORA_B] = rng.standard_normal((out, rank))
    return {name: value.astype(np.float32) for name, value in module.items()}


def rule(name: str) -> Rule:
    return rule_of(name, scale=SCALE, seed=SEED)


class Round:
    """Sites of some ranks train some layers in one round; `after` is the module that each ends with."""

    def __init__(
        self,
        name: str,
        ranks: Mapping[str, int],
        *,
        module: Tensors | None = None,
        layers_of: Mapping[str, tuple[str, ...]] | None = None,
        samples: Mapping[str, int] | None = None,
        round_: int = 1,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.rule, self.round = rule(name), round_
        self.module = module_of(rng) if module is None else module
        self.received = {s: self.rule.for_site(self.module, r) for s, r in ranks.items()}
        self.updates, self.after = [], {}
        for i, site in enumerate(ranks):
            mine = layers_of[site] if layers_of else tuple(layers(self.module))
            delta = {
                n: (rng.standard_normal(v.shape) * (1 + i)).astype(np.float32)
                for n, v in self.received[site].items()
                if self.rule.trains(n, round_) and (".lora_" not in n or n.startswith(mine))
            }
            count = samples[site] if samples else 10 * (i + 1)
            self.updates.append(Update(site=site, samples=count, delta=delta))
            self.after[site] = {
                n: v + delta[n] if n in delta else v for n, v in self.received[site].items()
            }

    def aggregate(self) -> dict[str, np.ndarray]:
        return self.rule.aggregate(self.module, self.updates, self.received, self.round)

    def mean_product(self, layer: str) -> np.ndarray:
        """What exactness is measured against: sample-weighted, over the sites that trained the layer."""
        mine = [u for u in self.updates if any(n.startswith(layer) for n in u.delta)]
        total = sum(u.samples for u in mine)
        return sum(
            u.samples / total * product(self.after[u.site], layer, scale=SCALE) for u in mine
        )

    def error(self, layer: str = LOW) -> float:
        """Distance of the aggregated product from the mean product, relative to it."""
        wanted = self.mean_product(layer)
        got = product(self.aggregate(), layer, scale=SCALE)
        return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


SAME = {"a": RANK, "b": RANK, "c": RANK}
MIXED = {"a": 1, "b": 2, "c": RANK}


@pytest.mark.parametrize("ranks", [SAME, MIXED], ids=["same ranks", "mixed ranks"])
@pytest.mark.parametrize("round_", [1, 2])
@pytest.mark.parametrize("name", EXACT)
def test_exact_rules_give_the_mean_of_the_sites_products(
    name: str, round_: int, ranks: dict[str, int]
) -> None:
    one = Round(name, ranks, round_=round_)
    assert max(one.error(LOW), one.error(HIGH)) < 1e-6


def test_the_exact_rules_are_those() -> None:
    assert EXACT == ["ffa", "rolora", "flora"]


@pytest.mark.parametrize("ranks", [SAME, MIXED], ids=["same ranks", "mixed ranks"])
def test_plain_is_not_exact_and_lora_fair_is_nearer(ranks: dict[str, int]) -> None:
    plain, fair = Round("plain", ranks).error(), Round("lora-fair", ranks).error()
    assert plain > 0.3
    assert 1e-3 < fair < 0.9 * plain


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from([*EXACT, "flexlora", "lora-fair"]),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    counts=st.lists(st.integers(1, 10**6), min_size=4, max_size=4),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    round_=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_ranks_weights_and_shapes(
    name: str,
    ranks: list[int],
    counts: list[int],
    shape: tuple[int, int],
    round_: int,
    seed: int,
) -> None:
    # The module is as wide as its widest site; flexlora may then need a higher rank to be exact.
    rank = max(ranks) if name != "flexlora" else max(sum(ranks), 1)
    out, wide = shape
    module = module_of(np.random.default_rng(seed), rank=rank, out=out, wide=wide)
    sites = {f"site-{i}": r for i, r in enumerate(ranks)}
    samples = dict(zip(sites, counts, strict=False))
    one = Round(name, sites, module=module, samples=samples, round_=round_, seed=seed)
    result = one.aggregate()
    assert {n: v.shape for n, v in result.items() if not n.endswith(LORA_MERGED)} == {
        n: v.shape for n, v in module.items()
    }
    assert all(v.dtype == np.float32 for v in result.values())
    wanted = one.mean_product(LOW)
    error = np.linalg.norm(product(result, LOW, scale=SCALE) - wanted)
    scale = sum(np.linalg.norm(product(after, LOW, scale=SCALE)) for after in one.after.values())
    if name == "lora-fair":
        plain = Round("plain", sites, module=module, samples=samples, round_=round_, seed=seed)
        distance = np.linalg.norm(product(plain.aggregate(), LOW, scale=SCALE) - wanted)
        assert error <= distance + 1e-4 * scale
    else:
        assert error <= 1e-5 * scale


def test_plain_with_one_rank_is_aggregate_to_the_bit() -> None:
    one = Round("plain", SAME)
    wanted, got = aggregate(one.module, one.updates), one.aggregate()
    assert {n: v.tobytes() for n, v in got.items()} == {n: v.tobytes() for n, v in wanted.items()}


def test_other_tensors_are_averaged_by_samples_whatever_the_rule() -> None:
    for name in RULES:
        one = Round(name, MIXED)
        classifier = {"classifier.weight": one.module["classifier.weight"]}
        wanted = aggregate(classifier, one.updates)["classifier.weight"]
        assert np.array_equal(one.aggregate()["classifier.weight"], wanted)


# Mixed cuts and absent sites.

CUTS = {"a": (LOW,), "b": (LOW, HIGH), "c": (LOW,)}


@pytest.mark.parametrize("name", EXACT)
def test_a_layer_is_averaged_over_the_sites_that_trained_it(name: str) -> None:
    one = Round(name, {"a": 2, "b": RANK, "c": 1}, layers_of=CUTS)
    assert max(one.error(LOW), one.error(HIGH)) < 1e-6
    # HIGH has one site, so its product is that site's own.
    got = product(one.aggregate(), HIGH, scale=SCALE)
    np.testing.assert_allclose(got, product(one.after["b"], HIGH, scale=SCALE), atol=1e-4)


@pytest.mark.parametrize("name", RULES)
def test_a_layer_that_nobody_trained_stays(name: str) -> None:
    one = Round(name, SAME, layers_of=dict.fromkeys(SAME, (LOW,)))
    result = one.aggregate()
    assert all(np.array_equal(result[n], v) for n, v in one.module.items() if n.startswith(HIGH))
    assert HIGH + LORA_MERGED not in result


@pytest.mark.parametrize("name", sorted(set(RULES) - {"lora-fair"}))
def test_one_site_of_full_rank_is_followed(name: str) -> None:
    one = Round(name, {"a": RANK})
    assert one.error() < 1e-6


def test_lora_fair_follows_one_site_too() -> None:
    # The residual is zero then, so there is nothing to correct.
    assert Round("lora-fair", {"a": RANK}).error() < 1e-6


@pytest.mark.parametrize("name", ["plain", "ffa", "rolora", "lora-fair", "hetlora"])
def test_components_that_no_site_held_stay(name: str) -> None:
    one = Round(name, {"a": 1, "b": 2})
    result = one.aggregate()
    assert np.array_equal(result[LOW + LORA_A][2:], one.module[LOW + LORA_A][2:])
    assert np.array_equal(result[LOW + LORA_B][:, 2:], one.module[LOW + LORA_B][:, 2:])


def test_flexlora_leaves_spare_components_able_to_train() -> None:
    one = Round("flexlora", {"a": 1})
    result = one.aggregate()
    assert one.error() < 1e-6
    assert np.linalg.norm(result[LOW + LORA_A], axis=1).min() > 0.1
    assert not result[LOW + LORA_B][:, 1:].any()


# By hand.

ONE = "blocks.0.v"


def pair(a: list[list[float]], b: list[list[float]]) -> dict[str, np.ndarray]:
    return {ONE + LORA_A: np.array(a, np.float32), ONE + LORA_B: np.array(b, np.float32)}


def trained(site: str, samples: int, before: Tensors, after: Tensors) -> Update:
    return Update(site=site, samples=samples, delta={n: after[n] - v for n, v in before.items()})


def test_hetlora_pads_with_zeros_and_weighs_by_norm_not_by_samples() -> None:
    one = rule("hetlora")
    module = pair([[1, 0], [0, 1]], [[0, 0], [0, 0]])
    received = {"narrow": one.for_site(module, 1), "wide": one.for_site(module, 2)}
    assert received["narrow"][ONE + LORA_A].tolist() == [[1, 0]]
    assert received["narrow"][ONE + LORA_B].shape == (2, 1)
    # |B A| is 3 for the narrow site and sqrt(1 + 0) = 1 for the wide one: weights 3/4 and 1/4.
    updates = [
        trained("narrow", 1, received["narrow"], pair([[1, 0]], [[3], [0]])),
        trained("wide", 10**6, received["wide"], pair([[1, 0], [0, 4]], [[1, 0], [0, 0]])),
    ]
    result = one.aggregate(module, updates, received, 1)
    np.testing.assert_allclose(result[ONE + LORA_A], [[1, 0], [0, 1]], rtol=1e-6)
    np.testing.assert_allclose(result[ONE + LORA_B], [[2.5, 0], [0, 0]], rtol=1e-6)


def test_hetlora_goes_by_samples_while_all_products_are_zero() -> None:
    one = rule("hetlora")
    module = pair([[1, 1]], [[0], [0]])
    received = {"a": one.for_site(module, 1), "b": one.for_site(module, 1)}
    updates = [
        trained("a", 1, received["a"], pair([[5, 1]], [[0], [0]])),
        trained("b", 3, received["b"], pair([[1, 1]], [[0], [0]])),
    ]
    assert one.aggregate(module, updates, received, 1)[ONE + LORA_A].tolist() == [[2, 1]]


def test_plain_mean_of_factors_is_not_the_mean_of_products() -> None:
    module = pair([[0, 0]], [[0], [0]])
    received = {"a": module, "b": module}
    updates = [
        trained("a", 1, module, pair([[1, 0]], [[1], [0]])),
        trained("b", 1, module, pair([[0, 1]], [[0], [1]])),
    ]
    # The products' mean is half the identity; each factor's mean makes all four entries a quarter.
    got = product(rule("plain").aggregate(module, updates, received, 1), ONE, scale=1.0)
    assert got.tolist() == [[0.25, 0.25], [0.25, 0.25]]
    merged = rule("flora").aggregate(module, updates, received, 1)[ONE + LORA_MERGED]
    assert merged.tolist() == [[SCALE / 2, 0], [0, SCALE / 2]]


# What trains when.


@pytest.mark.parametrize("name", RULES)
def test_merged_products_never_train_and_the_classifier_always_does(name: str) -> None:
    for round_ in (1, 2):
        assert not RULES[name].trains(LOW + LORA_MERGED, round_)
        assert RULES[name].trains("classifier.weight", round_)
        assert RULES[name].trains("prompt.tokens", round_)


def test_ffa_trains_b_alone_and_rolora_takes_turns_from_b() -> None:
    ffa, rolora = RULES["ffa"], RULES["rolora"]
    assert [ffa.trains(LOW + LORA_A, r) for r in (1, 2)] == [False, False]
    assert [ffa.trains(LOW + LORA_B, r) for r in (1, 2)] == [True, True]
    assert [rolora.trains(LOW + LORA_A, r) for r in (1, 2, 3)] == [False, True, False]
    assert [rolora.trains(LOW + LORA_B, r) for r in (1, 2, 3)] == [True, False, True]


@pytest.mark.parametrize(("name", "kept"), [("ffa", LORA_A), ("rolora", LORA_A)])
def test_a_factor_that_rests_is_left_alone(name: str, kept: str) -> None:
    one = Round(name, MIXED, round_=1)
    assert np.array_equal(one.aggregate()[LOW + kept], one.module[LOW + kept])


# FLoRA over rounds.


def test_flora_restarts_the_pair_and_keeps_every_product() -> None:
    one = Round("flora", MIXED)
    first = one.aggregate()
    assert not first[LOW + LORA_B].any()
    limit = first[LOW + LORA_A].shape[1] ** -0.5
    assert 0 < np.abs(first[LOW + LORA_A]).max() <= limit
    before = product(first, LOW, scale=SCALE)
    again = Round("flora", MIXED, module=first, round_=2, seed=5)
    assert again.error() < 1e-6
    assert np.array_equal(again.received["a"][LOW + LORA_MERGED], first[LOW + LORA_MERGED])
    moved = product(again.aggregate(), LOW, scale=SCALE) - before
    own = again.mean_product(LOW) - before
    np.testing.assert_allclose(moved, own, atol=1e-4)


def test_floras_restart_depends_on_seed_round_and_name_alone() -> None:
    def fresh(seed: int, round_: int, ranks: dict[str, int], layer: str) -> bytes:
        one = Round("flora", ranks, round_=round_, seed=len(ranks))
        one.rule.seed = seed
        return one.aggregate()[layer + LORA_A].tobytes()

    assert fresh(1, 1, SAME, LOW) == fresh(1, 1, MIXED | {"d": 2}, LOW)
    starts = {fresh(s, r, SAME, n) for s in (1, 2) for r in (1, 2) for n in (LOW, HIGH)}
    assert len(starts) == 8


# FlexLoRA.


def test_flexlora_is_the_nearest_pair_of_its_rank_and_sites_get_the_nearest_of_theirs() -> None:
    one = Round("flexlora", SAME)
    result = one.aggregate()
    mean = one.mean_product(LOW)
    values = np.linalg.svd(mean, compute_uv=False)
    for rank in (1, 2, RANK):
        site = one.rule.for_site(result, rank)
        error = np.linalg.norm(mean - product(site, LOW, scale=SCALE))
        # Eckart-Young: no pair of this rank is nearer.
        assert error == pytest.approx(np.linalg.norm(values[rank:]), rel=1e-5)


# All rules.


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_the_sites_changes_no_bit(name: str) -> None:
    one = Round(name, MIXED)
    results = set()
    for order in itertools.permutations(one.updates):
        result = one.rule.aggregate(one.module, order, one.received, 1)
        results.add(b"".join(result[n].tobytes() for n in sorted(result)))
    assert len(results) == 1


@pytest.mark.parametrize("name", RULES)
def test_inputs_are_left_alone(name: str) -> None:
    one = Round(name, MIXED)
    held = [one.module, *one.received.values(), *(u.delta for u in one.updates)]
    before = [{n: v.copy() for n, v in tensors.items()} for tensors in held]
    one.aggregate()
    for tensors, old in zip(held, before, strict=True):
        assert all(np.array_equal(tensors[n], v) for n, v in old.items())


@pytest.mark.parametrize("name", RULES)
def test_nothing_to_aggregate_and_no_samples_are_errors(name: str) -> None:
    one = Round(name, SAME)
    with pytest.raises(FederationError, match="no useful update"):
        one.rule.aggregate(one.module, [], {}, 1)
    one = Round(name, SAME, samples={"a": 1, "b": 0, "c": 2})
    with pytest.raises(FederationError, match="site 'b' counts for no sample"):
        one.aggregate()


@pytest.mark.parametrize("name", RULES)
def test_a_zero_module_survives(name: str) -> None:
    module = {n: np.zeros_like(v) for n, v in module_of(np.random.default_rng(0)).items()}
    one = Round(name, MIXED, module=module)
    for update in one.updates:
        for value in update.delta.values():
            value[...] = 0
    assert all(np.isfinite(v).all() for v in one.aggregate().values())


def test_lora_fair_corrects_b_and_leaves_the_mean_a() -> None:
    one = Round("lora-fair", SAME)
    plain, fair = aggregate(one.module, one.updates), one.aggregate()
    for name in fair:
        assert np.array_equal(fair[name], plain[name]) == (not name.endswith(LORA_B))


def test_an_unknown_rule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="lora-aggregation='fedit' is not known; use plain, ffa"):
        rule_of("fedit", scale=1, seed=0)


def test_what_goes_with_robust_rules_and_server_optimisers() -> None:
    assert [n for n, r in RULES.items() if r.factorwise] == ["plain", "ffa", "rolora"]
    assert [n for n, r in RULES.items() if not r.continuous] == ["flexlora", "flora"]
    assert all(r.mixed_ranks for r in RULES.values())
    assert not FlexLoraRule.exact

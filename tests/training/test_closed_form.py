"""Classifiers from sums: any dealing of samples to sites gives what one place would have found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from scipy.special import log_softmax
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid

from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.errors import ConfigError, FederationError, UpdateError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.families import FAMILIES
from fedsplit.model.module import ModuleSpec
from fedsplit.training import closed_form
from fedsplit.training.closed_form import (
    GRAM,
    MOMENT,
    TEMPERATURES,
    FeatureStatistics,
    best_temperature,
    calibration,
    class_means,
    collect,
    nll_at,
    ridge,
    scaled_alpha,
)
from fedsplit.training.closed_form_start import check_start
from fedsplit.training.last_linear import last_linear
from fedsplit.training.round import evaluate
from tests.training.small import BARE, BATCHES, local, text_batches

CLASSES, FEATURES = 4, 9


def samples(count: int, *, seed: int = 0, offset: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    centres = np.random.default_rng(99).normal(size=(CLASSES, FEATURES))
    features = centres[labels] + rng.normal(size=(count, FEATURES)) + offset
    return features.astype(np.float32), labels


def summed(features: np.ndarray, labels: np.ndarray) -> FeatureStatistics:
    return FeatureStatistics.empty(features.shape[1], CLASSES).add(features, labels)


@examples(max_examples=40, deadline=None)
@given(
    owner=st.lists(st.integers(0, 6), min_size=60, max_size=60),
    alpha=st.floats(0.01, 100),
    seed=st.integers(0, 100),
)
def test_any_partition_is_the_centralised_solution(
    owner: list[int], alpha: float, seed: int
) -> None:
    """Within 1e-5 of a logit, though sites lack classes or samples and sums come in any order."""
    features, labels = samples(60, seed=seed)
    of = np.array(owner)
    sites = [summed(features[of == s], labels[of == s]) for s in range(7)]
    together = sum(sites[1:], start=sites[0])
    central = summed(features, labels)
    for one, other in (
        (ridge(together, alpha), ridge(central, alpha)),
        (class_means(together), class_means(central)),
    ):
        np.testing.assert_allclose(
            one.logits(features), other.logits(features), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("alpha", [0.1, 1.0, 50.0])
@pytest.mark.parametrize("count", [5, 200])
def test_ridge_is_scikit_learns(alpha: float, count: int, *, bias: bool) -> None:
    """With fewer samples than features too."""
    features, labels = samples(count)
    found = ridge(summed(features, labels), alpha, bias=bias)
    known = Ridge(alpha=alpha, fit_intercept=bias).fit(
        features.astype("f8"), np.eye(CLASSES)[labels]
    )
    np.testing.assert_allclose(found.weight, known.coef_, atol=1e-5)
    np.testing.assert_allclose(found.bias, known.intercept_, atol=1e-5)
    assert (found.weight.dtype, found.bias.dtype) == (np.float32, np.float32)


def test_class_means_are_scikit_learns() -> None:
    features, labels = samples(200)
    found = class_means(summed(features, labels))
    known = NearestCentroid().fit(features, labels)
    others, _ = samples(500, seed=1)
    assert np.array_equal(found.logits(others).argmax(axis=1), known.predict(others))


def test_a_class_that_one_site_lacks_is_the_others() -> None:
    features, labels = samples(200)
    here = labels != 2
    together = summed(features[here], labels[here]) + summed(features[~here], labels[~here])
    assert list(together.counts) == list(np.bincount(labels, minlength=CLASSES))
    assert together.samples == 200
    np.testing.assert_allclose(together.class_sums[2], features[labels == 2].sum(0), rtol=1e-6)
    assert 2 in ridge(together, 1.0).logits(features).argmax(axis=1)


@pytest.mark.parametrize("offset", [0.0, 3.0, -30.0])
def test_a_class_that_nobody_has_is_never_the_answer(offset: float) -> None:
    features, labels = samples(300, offset=offset)
    here = labels != 1
    statistics = summed(features[here], labels[here])
    for found in (ridge(statistics, 1.0), class_means(statistics)):
        assert np.isfinite(found.weight).all()
        assert np.isfinite(found.bias).all()
        assert 1 not in found.logits(features).argmax(axis=1)


def test_ridge_without_a_solution_says_so() -> None:
    features, labels = samples(4)
    with pytest.raises(ConfigError, match=r"ridge-lambda=0 .* 9 features of 4 samples .* raise it"):
        ridge(summed(features, labels), 0.0)


def test_no_samples_at_all() -> None:
    nothing = FeatureStatistics.empty(FEATURES, CLASSES)
    for solve in (lambda: ridge(nothing, 1.0), lambda: class_means(nothing)):
        with pytest.raises(FederationError, match="no sample"):
            solve()


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_the_scaled_penalty_does_not_mind_the_features_size(scale: float) -> None:
    features, labels = samples(100)
    found = []
    for times in (1.0, scale):
        statistics = summed(features * times, labels)
        solution = ridge(statistics, scaled_alpha(statistics, 1.0))
        found.append(solution.logits(features * times))
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    alone = summed(features[:1], labels[:1])
    assert scaled_alpha(alone, 2.0) == 2.0


# On the wire.


def test_float64_arrays_are_the_statistics() -> None:
    statistics = summed(*samples(50))
    again = FeatureStatistics.of(statistics.arrays(np.float64), features=FEATURES, classes=CLASSES)
    assert np.array_equal(again.gram, np.triu(statistics.gram) + np.triu(statistics.gram, 1).T)
    assert np.array_equal(again.moment, statistics.moment)


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_float32_transport_costs_less_than_a_thousandth_of_a_logit(offset: float) -> None:
    features, labels = samples(2000, offset=offset)
    exact = summed(features, labels)
    parts = [summed(features[i::20], labels[i::20]).arrays(np.float32) for i in range(20)]
    sites = [FeatureStatistics.of(p, features=FEATURES, classes=CLASSES) for p in parts]
    sent = sum(sites[1:], start=sites[0])
    assert sent.samples == 2000
    near, wanted = (ridge(s, 1.0).logits(features) for s in (sent, exact))
    assert np.abs(near - wanted).max() < 1e-3
    assert all(a.dtype == np.float32 for a in parts[0].values())
    # The symmetric half stays at home.
    assert parts[0][GRAM].size == (FEATURES + 1) * (FEATURES + 2) // 2


def test_what_is_no_statistics_is_refused() -> None:
    good = summed(*samples(50)).arrays()
    bad = {
        "have arrays": {GRAM: good[GRAM]},
        "another backbone": {**good, MOMENT: good[MOMENT][:-1]},
        "not finite": {**good, GRAM: good[GRAM] * np.float32(np.nan)},
        "must be of the same samples": {**good, MOMENT: good[MOMENT] * 2},
        "count": {**good, MOMENT: -good[MOMENT]},
    }
    for fault, arrays in bad.items():
        with pytest.raises(UpdateError, match=fault):
            FeatureStatistics.of(arrays, features=FEATURES, classes=CLASSES)
    with pytest.raises(UpdateError, match="not finite"):
        summed(np.full((2, FEATURES), np.inf), np.zeros(2, int))


# Temperature.


def test_nll_is_that_of_the_softmax() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(30, 4)) * 50, rng.integers(0, 4, 30)
    for t, found in zip(
        TEMPERATURES[::30], nll_at(logits, labels, TEMPERATURES[::30]), strict=True
    ):
        wanted = -log_softmax(logits / t, axis=1)[np.arange(30), labels].sum()
        assert found == pytest.approx(wanted, rel=1e-9)
    assert not nll_at(np.zeros((0, 4)), np.zeros(0, int), TEMPERATURES).any()


def test_the_sum_over_sites_finds_the_true_temperature() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=(6000, 4)) * 2
    gumbel = rng.gumbel(size=true.shape)
    labels = (true + gumbel).argmax(axis=1)
    sites = [nll_at(true[i::3] * 25, labels[i::3], TEMPERATURES) for i in range(3)]
    found = best_temperature(np.sum(sites, axis=0), TEMPERATURES)
    assert found == pytest.approx(25, rel=0.1)
    assert found in TEMPERATURES
    with pytest.raises(UpdateError, match="not finite"):
        best_temperature(np.full(3, np.nan), TEMPERATURES[:3])


def test_cooling_divides_the_logits() -> None:
    features, labels = samples(50)
    plain = ridge(summed(features, labels), 1.0)
    np.testing.assert_allclose(
        plain.cooled(0.25).logits(features), plain.logits(features) * 4, rtol=1e-5
    )


# Through the model.


@pytest.mark.parametrize("cut", ["0,4", "1,3", "2,2"])
def test_collected_statistics_solve_the_task(cut: str, vit: Backbone) -> None:
    model, _ = local(vit, BARE, Cut.parse(cut))
    statistics = collect(model, BATCHES)
    assert statistics.samples == 27
    assert list(statistics.counts) == [14, 13]
    with torch.no_grad():
        wanted = []
        for b in BATCHES:
            h = model.part.ends.embed(b.inputs)
            z = model.encode(model.head(b.inputs, None), None)
            wanted.append(
                z
                if z.ndim == 2
                else model.part.ends.pool(model.part.trunk.run(z, None, model.cut.b, 4), None)
            )
            assert h.ndim == 3
    np.testing.assert_allclose(
        statistics.class_sums.sum(axis=0), torch.cat(wanted).sum(0), rtol=1e-4, atol=1e-4
    )
    found = ridge(statistics, scaled_alpha(statistics, 1.0))
    before = calibration(model, BATCHES)
    assert before == pytest.approx(27 * np.log(2))
    names = module.final_linear(vit, BARE)
    module.load(
        model.part,
        module.read(model.part) | dict(zip(names, (found.weight, found.bias), strict=True)),
    )
    assert evaluate(model, BATCHES).sums["correct"] == 27
    nll = calibration(model, BATCHES)
    cooled = found.cooled(best_temperature(nll, TEMPERATURES))
    module.load(
        model.part,
        module.read(model.part) | dict(zip(names, (cooled.weight, cooled.bias), strict=True)),
    )
    # The warmest that the likelihood ratio does not reject.
    assert nll.min() <= calibration(model, BATCHES, np.ones(1))[0] <= nll.min() + 1.93


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_features_are_what_enters_the_last_linear_layer(
    family: str, tiny: dict[str, object]
) -> None:
    backbone = Backbone.find(str(tiny[family]))
    spec = ModuleSpec(classes=("a", "b", "c"), kind="classifier")
    model, _ = local(backbone, spec)
    start = module.initial(backbone, spec, seed=0)
    weight, bias = module.final_linear(backbone, spec)
    rng = np.random.default_rng(0)
    last = [n for n in (weight, bias) if n in start]
    start |= {n: rng.normal(size=start[n].shape).astype("f4") for n in last}
    module.load(model.part, start)
    assert tuple(last_linear(model.part).weight.shape) == start[weight].shape
    batches = BATCHES[:2] if FAMILIES[family].kind == "image" else text_batches((4, 3))
    with torch.no_grad():
        logits = torch.cat([model(b.inputs, b.mask) for b in batches]).numpy()
    got = [f @ start[weight].T + start.get(bias, 0) for f, _, _ in _passes(model, batches)]
    np.testing.assert_allclose(np.concatenate(got), logits, rtol=1e-4, atol=1e-4)


def test_class_means_need_a_bias(tiny: dict[str, Path]) -> None:
    config = RunConfig.from_flat({"classifier-init": "class-means"})
    check_start(config, Backbone.find(str(tiny["bert"])))
    llama = Backbone.find(str(tiny["llama"]))
    check_start(RunConfig(), llama)
    with pytest.raises(ConfigError, match="needs a classifier with a bias; that of family 'llama'"):
        check_start(config, llama)


def _passes(model: object, batches: object) -> object:
    return closed_form._passes(model, batches, closed_form.Flow())  # type: ignore[arg-type]


@pytest.mark.parametrize("features", [FEATURES, 300])
def test_sums_of_samples_are_possible_and_others_are_refused(features: int) -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, CLASSES, 50)
    found = summed(1e3 * rng.normal(size=(50, features)) + 1e4, labels)
    sizes = {"features": features, "classes": CLASSES}
    arrays = found.arrays()
    assert FeatureStatistics.of(arrays, **sizes).possible
    assert FeatureStatistics.empty(features, CLASSES).possible
    first = np.zeros_like(arrays[GRAM])
    first[0] = 1.0
    for bad in (
        {GRAM: arrays[GRAM] * (1 - 2 * first), MOMENT: arrays[MOMENT]},
        {GRAM: arrays[GRAM], MOMENT: arrays[MOMENT] * np.float32([[30]] * features + [[1]])},
    ):
        with pytest.raises(UpdateError, match="sums of no samples that can be"):
            FeatureStatistics.of(bad, **sizes)

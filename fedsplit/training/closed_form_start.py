"""A closed-form classifier from statistics: add up those of the sites, or of one, solve, calibrate.

The mathematics is training/closed_form.py's. A classifier of two layers keeps its first one as it
started and has its last one solved.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.config import RunConfig
from fedsplit.core.errors import ConfigError, UpdateError
from fedsplit.core.orders import FIT, HELD_OUT
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec, ModuleTensors, final_linear
from fedsplit.training.closed_form import (
    TEMPERATURES,
    FeatureStatistics,
    Linear,
    best_temperature,
    class_means,
    ridge,
    scaled_alpha,
)

# Fewer sites than this have no majority.
QUORUM = 3
# Far above what all samples of a site can lose, and small enough to be added up.
MAX_LOSS = 1e15


def check_start(config: RunConfig, backbone: Backbone) -> None:
    """Raise ConfigError where the backbone's classifier cannot hold the start that the run asks for."""
    if config.module.classifier_start != "class-means":
        return
    last = backbone.skeleton(1).get_submodule(backbone.family.final_linear)
    if last.bias is None:
        raise ConfigError(
            f"classifier-init=class-means needs a classifier with a bias; that of family "
            f"{backbone.family.model_type!r} has none: use classifier-init=ridge"
        )


class ClosedFormStart:
    """Sums of the sites that answered, and what they make."""

    def __init__(
        self, config: RunConfig, backbone: Backbone, spec: ModuleSpec, module: ModuleTensors
    ) -> None:
        """`module` is what the sites were sent. Raises BackboneError where it has no last linear layer."""
        self._config = config
        self._weight, self._bias = final_linear(backbone, spec)
        self._has_bias = self._bias in module
        self._features = module[self._weight].shape[1]
        self._classes = len(spec.classes)
        self._numbers = spec.numbers is not None
        self._fit: dict[str, FeatureStatistics] = {}
        self._held_out: dict[str, FeatureStatistics] = {}
        self._nll = np.zeros(len(TEMPERATURES))

    @property
    def sites(self) -> frozenset[str]:
        """Who is in the sums."""
        return frozenset(self._fit)

    @property
    def wanted(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the arrays that each site is asked for."""
        one = FeatureStatistics.shapes(features=self._features, classes=self._classes)
        return {f"{part}/{n}": shape for part in (FIT, HELD_OUT) for n, shape in one.items()}

    def add(
        self, site: str, arrays: Mapping[str, NDArray[Any]], *, samples: int, weight: int
    ) -> None:
        """Take in one site's sums, of at most `samples` samples that count for `weight`. Raises UpdateError when they cannot be right."""
        fit, held_out = (
            FeatureStatistics.of(
                {n.removeprefix(f"{part}/"): a for n, a in arrays.items() if n.startswith(part)},
                features=self._features,
                classes=self._classes,
                numbers=self._numbers,
            )
            for part in (FIT, HELD_OUT)
        )
        told = fit.samples + held_out.samples
        if not 1 <= told <= samples:
            raise UpdateError(
                f"feature statistics of {told} samples, at roll call there were {samples}; look at that site"
            )
        if weight < samples:
            fit, held_out = fit.scaled(weight / samples), held_out.scaled(weight / samples)
        self._fit[site], self._held_out[site] = fit, held_out

    def without_the_far(self, ratio: float) -> dict[str, str]:
        """Take out the sites whose features are more than `ratio` times as large as the median's; site -> why.

        One frozen backbone makes them all. Fewer than three sites have no majority, and 0 is no bound.
        """
        if not ratio or len(self._fit) < QUORUM:
            return {}
        lengths = {site: (self._fit[site] + self._held_out[site]).length for site in self._fit}
        usual = statistics.median(lengths.values())
        why = {
            site: f"its features are {length / usual:.3g} times as large as is usual in this run (the median of its "
            f"sites), max-update-ratio={ratio:g}; look at that site's data and backbone"
            for site, length in sorted(lengths.items())
            if length > ratio * usual > 0
        }
        for site in why:
            del self._fit[site], self._held_out[site]
        return why

    def provisional(self) -> ModuleTensors:
        """The classifier's last layer without the held-out samples, to be calibrated on them."""
        return self._tensors(self._solved(self._fit))

    def final(self) -> ModuleTensors:
        """The classifier's last layer from all samples, at the temperature with the least loss if there is one."""
        found = self._solved(self._fit, self._held_out)
        if self._nll.any():
            found = found.cooled(best_temperature(self._nll, TEMPERATURES))
        return self._tensors(found)

    def _solved(self, *parts: Mapping[str, FeatureStatistics]) -> Linear:
        total = FeatureStatistics.empty(self._features, self._classes)
        for part in parts:
            # In the order of the names, so that who answered first changes no bit.
            for site in sorted(part):
                total += part[site]
        if self._config.module.classifier_start == "ridge":
            alpha = scaled_alpha(total, self._config.module.ridge_lambda)
            return ridge(total, alpha, bias=self._has_bias)
        return class_means(total)

    def _tensors(self, found: Linear) -> ModuleTensors:
        own = {self._weight: found.weight}
        return own | {self._bias: found.bias} if self._has_bias else own

    def add_nll(self, nll: Sequence[float]) -> None:
        """Take in one site's losses over the temperatures. Raises UpdateError when they cannot be right."""
        values = np.asarray(nll, dtype=np.float64)
        # `not` and `<=`, so that NaN is none of them either.
        if values.shape != self._nll.shape or not (np.abs(values) <= MAX_LOSS).all():
            raise UpdateError(
                f"calibration wants {len(self._nll)} losses of at most {MAX_LOSS:g}, {len(values)} numbers came; "
                f"install the same fedsplit version on both ends"
            )
        self._nll += values

"""How the sites' LoRA pairs become one: seven rules by name, numpy only.

A pair is `<layer>.lora_A.weight` [r, in] and `<layer>.lora_B.weight` [out, r]; the layer's weight moves by
scale * B A. Averaging A and B each for itself is not averaging the products, and that is what the rules
differ in. A rule says what trains in a round (`trains`, asked at the site too), what a site of some rank
receives (`for_site`) and what a round's updates make of the module (`aggregate`). Per layer only the sites
that trained it count; all other tensors are averaged by samples, as `aggregation.aggregate` does.

    rule       product exact?            ranks    what it does
    plain      no                        padded   averages A and B each for itself (FedIT, arXiv 2305.05644)
    ffa        yes                       padded   A stays at its start (FFA-LoRA, arXiv 2403.12313)
    rolora     yes                       padded   B in odd rounds, A in even ones (RoLoRA, arXiv 2409.02346)
    flexlora   but for the truncation    own      SVD of the mean product (FlexLoRA, arXiv 2402.11505)
    flora      yes                       own      products go into the base, pairs restart (FLoRA, arXiv 2409.05976)
    lora-fair  nearer than plain         padded   corrects B after averaging (LoRA-FAIR, arXiv 2411.14961)
    hetlora    no                        padded   plain, weighted by the products' norms (HetLoRA, arXiv 2401.06432)

A site's rank may be lower than the module's: it receives the first components of a pair. "padded" rules read
what comes back as the wide pair with zeros in the other components. A component that no site of the round held
stays as it was, for zeros in A and B alike would never train again.

Shapes: o = out, i = in, r = the module's rank, s = a site's rank, k = all sites' ranks of a layer together.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from fedsplit.core.aggregation import Tensors, Update, aggregate, in_order
from fedsplit.core.errors import ConfigError
from fedsplit.core.lora_pairs import (
    LORA_A,
    LORA_B,
    LORA_MERGED,
    Floats,
    first_components,
    layers,
    moved_components,
    pair_of,
    rank_of,
    stack,
    svd_of_product,
    widened,
    without_pairs,
)

Module = dict[str, Floats]


class Rule:
    """The plain rule, and what all rules share. `scale` is lora-alpha / lora-rank of the run."""

    name: ClassVar[str] = "plain"
    exact: ClassVar[bool] = False
    """The product after `aggregate` is the sample-weighted mean of the sites' products, within rounding.

    With mixed ranks: in every round that has a site of the full rank.
    """
    mixed_ranks: ClassVar[bool] = True
    """Sites may have ranks below the module's."""
    factorwise: ClassVar[bool] = True
    """A and B are averaged as any other tensor, so a robust rule may take the mean's place."""
    continuous: ClassVar[bool] = True
    """A and B move on from where they were, so a server optimiser can step along their difference."""

    def __init__(self, *, scale: float, seed: int) -> None:
        self.scale = scale
        self.seed = seed

    @classmethod
    def trains(cls, tensor: str, round_: int) -> bool:
        """False: every site keeps this tensor as it received it in this round. Rounds count from 1."""
        del round_
        return not tensor.endswith(LORA_MERGED)

    def for_site(self, module: Tensors, rank: int) -> Module:
        """What a site of this rank receives: the first `rank` components of each pair, all else whole."""
        return {name: first_components(name, value, rank) for name, value in module.items()}

    def aggregate(
        self,
        module: Tensors,
        updates: Sequence[Update],
        received: Mapping[str, Tensors],
        round_: int,
    ) -> Module:
        """The next module. `received[site]` is what `for_site` gave that site, as far as it holds it.

        The order of the sites does not change the result. Raises FederationError without a useful update.
        """
        ordered = in_order(updates)
        merged = aggregate(module, [without_pairs(update) for update in ordered])
        for layer in layers(module):
            trained = [u for u in ordered if layer + LORA_A in u.delta or layer + LORA_B in u.delta]
            if trained:
                merged |= self._layer(layer, module, trained, received, round_)
        return merged

    def _layer(
        self,
        layer: str,
        module: Tensors,
        updates: Sequence[Update],
        received: Mapping[str, Tensors],
        round_: int,
    ) -> Module:
        """The new tensors of one layer, from the sites that trained it."""
        del round_
        weights = self._weights(layer, updates, received)
        new: Module = {}
        for name in (layer + LORA_A, layer + LORA_B):
            parts = [
                (weight, widened(name, module[name], received[u.site][name], u.delta[name]))
                for weight, u in zip(weights, updates, strict=True)
                if name in u.delta
            ]
            if parts:
                held = max(
                    rank_of(name, received[u.site][name]) for u in updates if name in u.delta
                )
                new[name] = moved_components(name, module[name], parts, held)
        return new

    def _weights(
        self, layer: str, updates: Sequence[Update], received: Mapping[str, Tensors]
    ) -> list[float]:
        """How much each site counts for a layer."""
        del layer, received
        return [float(update.samples) for update in updates]


class FfaRule(Rule):
    """FFA-LoRA: A stays at its random start, so that mean(B) A is the mean of B A; half the traffic."""

    name = "ffa"
    exact = True

    @classmethod
    def trains(cls, tensor: str, round_: int) -> bool:
        """All but A."""
        return super().trains(tensor, round_) and not tensor.endswith(LORA_A)


class RoLoraRule(Rule):
    """RoLoRA: B in odd rounds and A in even ones, so that one factor is common to all; half the traffic.

    B comes first, for A has no gradient while B is zero.
    """

    name = "rolora"
    exact = True

    @classmethod
    def trains(cls, tensor: str, round_: int) -> bool:
        """A rests in odd rounds, B in even ones."""
        rests = LORA_A if round_ % 2 else LORA_B
        return super().trains(tensor, round_) and not tensor.endswith(rests)


class HetLoraRule(Rule):
    """HetLoRA: pairs padded with zeros, weighted by the Frobenius norms of their products, not by samples.

    The paper's pruning of a site's own rank happens at the site (training/rank_pruning.py). Tensors outside of pairs
    are weighted by samples.
    """

    name = "hetlora"
    factorwise = False

    def _weights(
        self, layer: str, updates: Sequence[Update], received: Mapping[str, Tensors]
    ) -> list[float]:
        norms = [pair_of(layer, update, received[update.site]).norm() for update in updates]
        # B is zero everywhere when nobody has learnt a thing yet; then the samples decide.
        return norms if any(norms) else super()._weights(layer, updates, received)


class LoraFairRule(Rule):
    """LoRA-FAIR: the plain means, then B moved so that B A comes near the mean product.

    The paper asks for the dB that brings (B + dB) A near the mean product, held small by lambda |dB|, and searches
    it by gradient on a cosine similarity. Here nearness is the Frobenius norm, which has a closed form:
    dB = (P - B A) A^T (A A^T + lambda I)^-1, with P the mean product and lambda relative to A A^T's mean
    diagonal. It is never farther from P than plain.
    """

    name = "lora-fair"
    factorwise = False
    ridge: ClassVar[float] = 0.01

    def _layer(
        self,
        layer: str,
        module: Tensors,
        updates: Sequence[Update],
        received: Mapping[str, Tensors],
        round_: int,
    ) -> Module:
        new = super()._layer(layer, module, updates, received, round_)
        pairs = [pair_of(layer, update, received[update.site]) for update in updates]
        held = max(len(pair.A_si) for pair in pairs)
        A_ri = new.get(layer + LORA_A, module[layer + LORA_A])[:held].astype(np.float64)
        B_or = new.get(layer + LORA_B, module[layer + LORA_B]).astype(np.float64)
        gram_rr = A_ri @ A_ri.T
        damping = self.ridge * float(np.trace(gram_rr)) / held
        if damping == 0:
            return new  # A is zero, so no B changes the product.
        total = sum(pair.samples for pair in pairs)
        wanted_or = np.zeros_like(B_or[:, :held])
        for pair in pairs:
            wanted_or += pair.samples / total * (pair.B_os @ (pair.A_si @ A_ri.T))
        residual_or = wanted_or - B_or[:, :held] @ gram_rr
        B_or[:, :held] += np.linalg.solve(gram_rr + damping * np.eye(held), residual_or.T).T
        return new | {layer + LORA_B: B_or.astype(np.float32)}


class FlexLoraRule(Rule):
    """FlexLoRA: the sample-weighted mean of the products, brought back to the module's rank by an SVD.

    Exact where the mean product's rank is at most the module's; otherwise the nearest pair of that rank. A site
    of a lower rank receives the first singular components: the nearest pair of its rank.
    """

    name = "flexlora"
    factorwise = False
    continuous = False

    def _layer(
        self,
        layer: str,
        module: Tensors,
        updates: Sequence[Update],
        received: Mapping[str, Tensors],
        round_: int,
    ) -> Module:
        del round_
        left_ok, right_ki = stack([pair_of(layer, u, received[u.site]) for u in updates])
        values_k, B_ok, A_ki = svd_of_product(left_ok, right_ki)
        A_ri = module[layer + LORA_A].copy()
        B_or = np.zeros_like(module[layer + LORA_B])
        # The singular values go into B: A's rows keep length 1, near that of their Kaiming start, however
        # small the product still is, so that B's gradients do not fade. Components beyond the product's rank
        # keep the A they had.
        kept = min(len(A_ri), len(values_k))
        A_ri[:kept] = A_ki[:kept]
        B_or[:, :kept] = (B_ok * values_k)[:, :kept]
        return {layer + LORA_A: A_ri, layer + LORA_B: B_or}


class FloraRule(Rule):
    """FLoRA: the mean of the products joins the layer's weight as a dense matrix, and the pair starts anew.

    The dense `<layer>.lora_merged.weight` has the scale applied: the layer's weight is base + merged + scale * B A.
    It travels to the sites whole. Stacking the sites' pairs and multiplying is summing their products.
    """

    name = "flora"
    exact = True
    factorwise = False
    continuous = False

    def _layer(
        self,
        layer: str,
        module: Tensors,
        updates: Sequence[Update],
        received: Mapping[str, Tensors],
        round_: int,
    ) -> Module:
        left_ok, right_ki = stack([pair_of(layer, u, received[u.site]) for u in updates])
        product_oi = self.scale * (left_ok @ right_ki)
        if (merged := module.get(layer + LORA_MERGED)) is not None:
            product_oi += merged
        return {
            layer + LORA_MERGED: product_oi.astype(np.float32),
            layer + LORA_A: self._fresh(layer + LORA_A, module[layer + LORA_A].shape, round_),
            layer + LORA_B: np.zeros_like(module[layer + LORA_B]),
        }

    def _fresh(self, name: str, shape: tuple[int, ...], round_: int) -> Floats:
        """Uniform in +-1/sqrt(in): what torch's kaiming_uniform_(a=sqrt(5)) draws, and PEFT starts with."""
        bound = shape[1] ** -0.5
        generator = np.random.default_rng([self.seed, round_, zlib.crc32(name.encode())])
        return generator.uniform(-bound, bound, shape).astype(np.float32)


RULES: Mapping[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        Rule,
        FfaRule,
        RoLoraRule,
        FlexLoraRule,
        FloraRule,
        LoraFairRule,
        HetLoraRule,
    )
}


def rule_of(name: str, *, scale: float, seed: int) -> Rule:
    """The rule by its name. Raises ConfigError when there is none."""
    if name not in RULES:
        raise ConfigError(f"lora-aggregation={name[:100]!r} is not known; use {', '.join(RULES)}")
    return RULES[name](scale=scale, seed=seed)

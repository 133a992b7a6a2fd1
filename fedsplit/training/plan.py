"""What of a module one site trains in a round, what of it it sends, and what it keeps. Asked at both ends.

The strategy checks a reply against the same plan that the site worked by, so the two cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.lora_rules import RULES
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec


@dataclass(frozen=True)
class Plan:
    """Names of module tensors."""

    trained: frozenset[str]
    """What the device trains."""
    sent: frozenset[str]
    """What of it goes to the server after the round."""
    kept: frozenset[str]
    """What of it the site goes on from in its next round, whatever the server sends."""
    own: frozenset[str]
    """What of it never leaves the site."""


def plan(config: RunConfig, backbone: Backbone, spec: ModuleSpec, cut: Cut, round_: int) -> Plan:
    """The plan of a site at `cut` for a round, which counts from 1."""
    names = module.trained_names(
        backbone,
        spec,
        cut,
        head=config.placement.trains_head(cut),
        classifier=config.module.classifier_training == "trained",
    )
    rule = RULES[config.module.lora_aggregation]
    trained = frozenset(name for name in names if rule.trains(name, round_))
    own = _site_local(config, backbone, trained)
    syncs = config.train.syncs(round_)
    sent = trained - own if syncs else frozenset()
    # After a round without an average the site goes on from where it is.
    return Plan(trained, sent, own if syncs else trained, own)


def _site_local(config: RunConfig, backbone: Backbone, trained: frozenset[str]) -> frozenset[str]:
    if config.train.site_local == "none":
        return frozenset()
    if config.train.site_local == "all":
        return trained
    return frozenset(n for n in trained if n.split(".", 1)[0] in backbone.family.classifier)

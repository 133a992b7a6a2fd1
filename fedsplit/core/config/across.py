"""Settings of several sections that cannot go together, each as a sentence that says what to do.

Those of one section stand in its own file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsplit.core.config.section import Check

if TYPE_CHECKING:
    from fedsplit.core.config.run_config import RunConfig


def across(c: RunConfig, *, start_known: bool = True) -> list[Check]:
    """Every pair of settings of two sections that cannot go together.

    A site does not know what the run starts from, `start_known`; the server has checked it.
    """
    return [
        *_method(c),
        *_tasks(c),
        *_target(c),
        *_rules(c),
        *(_start(c) if start_known else ()),
        *_module(c),
        *_encoder(c),
        *_local(c),
    ]


def _method(c: RunConfig) -> list[Check]:
    placement = c.run.method_description.placement
    cut = c.placement.cut
    return [
        (
            placement == "split" and c.placement.local,
            f"cut={cut} leaves nothing on the server, method={c.run.method} is a split; use e.g. cut=1,5",
        ),
    ]


def _tasks(c: RunConfig) -> list[Check]:
    several, holders = bool(c.task.tasks), c.task.holders
    few = sorted(name for name, who in holders.items() if len(who) < c.server.min_sites)
    far = max((max(who) for who in holders.values()), default=0)
    letters = len(c.run.run_name) + max(map(len, c.task.sources))
    return [
        (
            bool(few),
            f"task-holders gives {', '.join(few)} to fewer than min-sites={c.server.min_sites} sites; give it to "
            f"more, or lower min-sites",
        ),
        (
            bool(c.server.sites) and far >= c.server.sites,
            f"task-holders names site {far}, sites={c.server.sites} are numbered from 0 to {c.server.sites - 1}; "
            f"raise sites",
        ),
        (
            several and bool(c.run.start_module),
            f"start-module={c.run.start_module} is of one task; with tasks leave it out",
        ),
        (
            # The encoder takes names of 128 characters: run/task/round.
            several and letters > 118,
            f"run-name and a task's name have {letters} characters together, at most 118 are wanted; use shorter "
            f"ones",
        ),
    ]


def _target(c: RunConfig) -> list[Check]:
    """What is for classes where the target is a number, and the other way round."""
    number, loss, losses = c.task.target == "number", c.train.loss, ("squared", "huber")
    fixed = "loss" in c.run.method_description.fixes
    means = f"method={c.run.method} means loss={loss}" if fixed else f"loss={loss}"
    instead = ", and method=fedv with module=classifier for a linear model" if fixed else ""
    return [
        (
            number and loss not in ("auto", *losses),
            f"{means}, which is for classes; with target=number use loss=squared or huber{instead}",
        ),
        (
            not number and loss in losses,
            f"loss={loss} is for numbers; set target=number, or leave loss out",
        ),
        (
            number and c.train.label_smoothing > 0,
            f"label-smoothing={c.train.label_smoothing:g} spreads a label over classes; leave it out with target=number",
        ),
        (
            number and c.train.personalisation == "fed-rod",
            f"{'recipe=personal' if c.run.recipe == 'personal' else 'personalisation=fed-rod'} is made for classes; with "
            f"target=number use method=ditto",
        ),
        (
            number and c.module.calibrate,
            "calibrate=true scales a classifier; leave it out with target=number",
        ),
        (
            number and c.module.classifier_init == "class-means",
            "classifier-init=class-means is for classes; with target=number use ridge or zero",
        ),
    ]


def _rules(c: RunConfig) -> list[Check]:
    """The server's rules and what sites send."""
    aggregation, rule, step = (
        c.module.lora_aggregation,
        c.server.robust_rule,
        c.server.server_optimizer,
    )
    return [
        (
            rule != "mean" and aggregation not in ("plain", "ffa", "rolora"),
            f"robust-rule={rule} judges tensors, lora-aggregation={aggregation} products; use plain",
        ),
        (
            rule != "mean" and len(set(c.module.ranks)) > 1,
            f"robust-rule={rule} wants one rank for all; drop lora-ranks",
        ),
        (
            (step != "mean" or c.server.server_learning_rate != 1)
            and aggregation in ("flexlora", "flora"),
            f"server-optimizer={step} has nothing to step along, for lora-aggregation={aggregation} makes new pairs "
            f"each round; use plain",
        ),
        (
            c.train.keeps and aggregation not in ("plain", "ffa"),
            f"site-local and sync-every keep tensors at the sites, lora-aggregation={aggregation} makes them "
            f"anew each round; use plain",
        ),
    ]


def _start(c: RunConfig) -> list[Check]:
    fixed = c.module.classifier_training == "fixed"
    zero = c.module.classifier_init == "zero" and not c.run.start_module
    return [
        (
            c.train.rounds == 0 and zero,
            "rounds=0 trains nothing; set rounds, classifier-init or start-module",
        ),
        (
            fixed and zero,
            "classifier-training=fixed with classifier-init=zero never tells classes apart; use "
            "classifier-init=ridge",
        ),
        (
            fixed and c.module.kind == "classifier" and c.train.rounds > 0,
            "classifier-training=fixed with module=classifier trains nothing; use method=closed-form",
        ),
    ]


def _module(c: RunConfig) -> list[Check]:
    module, train, serves = c.module, c.train, c.placement.encoder_training
    one = not train.keeps and train.personalisation == "none" and train.gradient == "exact"
    below = module.kind == "prompt" and module.prompt_depth == "first"
    return [
        (
            module.rank_pruning < 1 and not one,
            f"rank-pruning={module.rank_pruning:g} wants one model a site, sent in every round and trained by "
            f"gradients; leave it out",
        ),
        (
            train.rank_penalty > 0 and module.rank_pruning == 1,
            f"rank-penalty={train.rank_penalty:g} with rank-pruning=1 presses on nothing; set rank-pruning, e.g. 0.99",
        ),
        (
            serves != "frozen" and (module.kind == "classifier" or below),
            f"encoder-training={serves} with module={module.kind}: none of it is on the server; use module=lora",
        ),
        (
            serves != "frozen" and module.lora_aggregation not in ("plain", "ffa"),
            f"encoder-training={serves} with lora-aggregation={module.lora_aggregation} is not offered; use plain",
        ),
    ]


def _encoder(c: RunConfig) -> list[Check]:
    """What trains at the encoder, and how sites train."""
    serves, train = c.placement.encoder_training, c.train
    return [
        (
            serves != "frozen" and train.gradient == "zeroth-order",
            f"gradient=zeroth-order is for a frozen encoder, not encoder-training={serves}; set one of them",
        ),
        (
            serves != "frozen" and train.accumulate > 1,
            f"accumulate={train.accumulate}: encoder-training={serves} steps at every batch; leave accumulate out",
        ),
        (
            train.personalisation == "ditto" and serves != "frozen",
            f"personalisation=ditto trains a second copy, which encoder-training={serves} has no place for; use "
            f"encoder-training=frozen",
        ),
        (
            c.link.cache_activations and train.augmentation != "none",
            f"cache-activations keeps what one image gave, augmentation={train.augmentation} changes it each time; "
            f"use one of them",
        ),
    ]


def _local(c: RunConfig) -> list[Check]:
    """Local-loss epochs, which leave the encoder out."""
    epochs, train = c.train.local_loss_epochs, c.train
    device = c.run.method_description.placement == "device" or c.placement.local
    one = train.personalisation == "none" and train.proximal_mu == 0
    plain = c.placement.encoder_training == "frozen" and train.gradient == "exact"
    return [
        (
            epochs > 0 and device,
            f"local-loss-epochs={epochs}: every block is the device's, so there is no encoder to leave out; use "
            f"local-epochs",
        ),
        (
            epochs > 0 and not (plain and one),
            f"local-loss-epochs={epochs} is for a frozen encoder, gradient=exact, one model a site and no "
            f"proximal-mu; leave it out",
        ),
    ]

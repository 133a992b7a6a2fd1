"""Settings that cannot go together, each as a sentence that says what to do. Called by config.py alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsplit.core.aggregation import sites_needed

if TYPE_CHECKING:
    from fedsplit.core.config import RunConfig

_Check = tuple[bool, str]


def contradictions(c: RunConfig) -> list[str]:
    """Every pair of settings that cannot go together, in words."""
    return [
        text for wrong, text in (*_federation(c), *_tasks(c), *_module(c), *_gradients(c)) if wrong
    ]


def _federation(c: RunConfig) -> list[_Check]:
    device = c.method_description.placement == "device"
    split = c.method_description.placement == "split"
    local = all(cut.a == cut.b for cut in c.cuts)
    default_cut = c.cut == type(c).model_fields["cut"].default
    expected = c.expected_sites
    sites = f"roster, which names {expected}" if c.roster_names else f"sites={expected}"
    return [
        (
            bool(c.sites) and c.sites < len(c.roster_names),
            f"roster names {len(c.roster_names)} sites, sites={c.sites}; leave sites out",
        ),
        (
            bool(expected) and c.min_sites > expected,
            f"min-sites={c.min_sites} is more than {sites}; lower min-sites",
        ),
        (
            bool(expected) and c.selected(expected) < 1,
            f"participation={c.participation:g} of {sites} selects nobody; raise one of them",
        ),
        (
            c.min_sites <= expected and 1 <= c.selected(expected) < c.min_sites,
            f"participation={c.participation:g} of {sites} selects {c.selected(expected)} a round, "
            f"min-sites={c.min_sites} are wanted; raise participation or lower min-sites",
        ),
        (
            c.robust_rule == "trimmed-mean" and not c.byzantine_sites,
            "robust-rule=trimmed-mean with byzantine-sites=0 trims nobody; set byzantine-sites",
        ),
        (
            bool(expected)
            and 1 <= c.selected(expected) < sites_needed(c.robust_rule, c.byzantine_sites),
            f"robust-rule={c.robust_rule} with byzantine-sites={c.byzantine_sites} needs "
            f"{sites_needed(c.robust_rule, c.byzantine_sites)} sites a round, {c.selected(expected)} train; add "
            f"sites or lower byzantine-sites",
        ),
        (
            bool(c.encoder_tls_cert) != bool(c.encoder_tls_key),
            "encoder-tls-cert and encoder-tls-key go together; set both or neither",
        ),
        (
            device and not local and not default_cut,
            f"cut={c.cut}: method={c.method} runs the whole model on the device; leave cut out",
        ),
        (
            split and local,
            f"cut={c.cut} leaves nothing on the server, method={c.method} is a split; use e.g. cut=1,5",
        ),
        (
            c.rounds == 0 and c.method != "closed-form" and not c.start_module
            and c.classifier_init == "zero",
            "rounds=0 trains nothing; set rounds, classifier-init or start-module",
        ),
        (
            c.warmup_rounds >= max(c.rounds, 1),
            f"warmup-rounds={c.warmup_rounds} leaves none of rounds={c.rounds}; lower it",
        ),
    ]  # fmt: skip


def _tasks(c: RunConfig) -> list[_Check]:
    several, names, holders = bool(c.tasks), c.sources, c.holders
    strange = sorted(holders.keys() - names.keys())
    few = sorted(name for name, who in holders.items() if len(who) < c.min_sites)
    far = max((max(who) for who in holders.values()), default=0)
    longest = max(map(len, names))
    return [
        (
            bool(strange),
            f"task-holders names {', '.join(strange)}, the run's tasks are {', '.join(names)}; name those",
        ),
        (
            bool(few),
            f"task-holders gives {', '.join(few)} to fewer than min-sites={c.min_sites} sites; give it to more, or "
            f"lower min-sites",
        ),
        (
            bool(c.sites) and far >= c.sites,
            f"task-holders names site {far}, sites={c.sites} are numbered from 0 to {c.sites - 1}; raise sites",
        ),
        (
            several and bool(c.classes),
            f"classes={c.classes[:100]} are those of one task; with tasks leave them out, each has its sites' own",
        ),
        (
            several and bool(c.start_module),
            f"start-module={c.start_module} is of one task; with tasks leave it out",
        ),
        (
            # The encoder takes names of 128 characters: run/task/round.
            several and len(c.run_name) + longest > 118,
            f"run-name and a task's name have {len(c.run_name) + longest} characters together, at most 118 are "
            f"wanted; use shorter ones",
        ),
    ]  # fmt: skip


def _module(c: RunConfig) -> list[_Check]:
    lora, aggregation = c.module == "lora", c.lora_aggregation
    mixed = len(set(c.ranks)) > 1
    keeps = c.site_local != "none" or c.sync_every > 1
    return [
        (
            max(c.ranks) > c.lora_rank,
            f"lora-ranks={c.lora_ranks}: {max(c.ranks)} is more than lora-rank={c.lora_rank}, the largest; "
            f"raise lora-rank",
        ),
        (
            bool(c.lora_ranks) and not lora,
            f"lora-ranks={c.lora_ranks} are for module=lora, not module={c.module}",
        ),
        (
            aggregation != "plain" and not lora,
            f"lora-aggregation={aggregation} is for module=lora, not module={c.module}",
        ),
        (
            c.rank_pruning < 1 and aggregation != "hetlora",
            f"rank-pruning={c.rank_pruning:g} is for lora-aggregation=hetlora, not {aggregation}",
        ),
        (
            c.rank_pruning < 1 and (keeps or c.personalisation != "none" or c.gradient != "exact"),
            f"rank-pruning={c.rank_pruning:g} wants one model a site, sent in every round and trained by gradients; leave "
            f"it out",
        ),
        (
            c.rank_penalty > 0 and c.rank_pruning == 1,
            f"rank-penalty={c.rank_penalty:g} with rank-pruning=1 presses on nothing; set rank-pruning, e.g. 0.99",
        ),
        (
            c.robust_rule != "mean" and aggregation not in ("plain", "ffa", "rolora"),
            f"robust-rule={c.robust_rule} judges tensors, lora-aggregation={aggregation} products; use plain",
        ),
        (
            c.robust_rule != "mean" and mixed,
            f"robust-rule={c.robust_rule} wants one rank for all; drop lora-ranks",
        ),
        (
            (c.server_optimizer != "mean" or c.server_learning_rate != 1)
            and aggregation in ("flexlora", "flora"),
            f"server-optimizer={c.server_optimizer} has nothing to step along, for "
            f"lora-aggregation={aggregation} makes new pairs each round; use plain",
        ),
        (
            keeps and aggregation not in ("plain", "ffa"),
            f"site-local and sync-every keep tensors at the sites, lora-aggregation={aggregation} makes them "
            f"anew each round; use plain",
        ),
        (
            c.classifier_training == "fixed" and c.classifier_init == "zero" and not c.start_module,
            "classifier-training=fixed with classifier-init=zero never tells classes apart; use "
            "classifier-init=ridge",
        ),
        (
            c.classifier_training == "fixed" and c.module == "classifier" and c.rounds > 0,
            "classifier-training=fixed with module=classifier trains nothing; use method=closed-form",
        ),
        (
            c.cache_activations and c.augmentation != "none",
            f"cache-activations keeps what one image gave, augmentation={c.augmentation} changes it each time; "
            f"use one of them",
        ),
        (
            c.prompt_depth != "first" and c.module != "prompt",
            f"prompt-depth={c.prompt_depth} is for module=prompt, not module={c.module}",
        ),
        (
            c.module_blocks > 0 and c.module not in ("lora", "adapter", "full"),
            f"module-blocks={c.module_blocks} is for module=lora, adapter or full, not module={c.module}",
        ),
    ]


def _gradients(c: RunConfig) -> list[_Check]:
    serves, zeroth = c.encoder_training, c.gradient == "zeroth-order"
    return [
        (
            serves != "frozen" and all(cut.a == cut.b for cut in c.cuts),
            f"encoder-training={serves} with cut={c.cut}: nothing runs on the server; use e.g. cut=1,5",
        ),
        (
            serves != "frozen"
            and (c.module == "classifier" or (c.module == "prompt" and c.prompt_depth == "first")),
            f"encoder-training={serves} with module={c.module}: none of it is on the server; use module=lora",
        ),
        (
            serves == "zeroth-order" and c.device_training != "tail",
            "encoder-training=zeroth-order sends no gradient down, so a head cannot train; use "
            "device-training=tail",
        ),
        (
            serves != "frozen" and zeroth,
            f"gradient=zeroth-order is for a frozen encoder, not encoder-training={serves}; set one of them",
        ),
        (
            c.block_sampling > 0 and serves not in ("hosted", "shared"),
            f"block-sampling={c.block_sampling} draws blocks of an encoder that trains by gradients, not of "
            f"encoder-training={serves}; use hosted or shared",
        ),
        (
            serves == "shared" and len(set(c.cuts)) > 1,
            f"encoder-training=shared with cut={c.cut}: one copy for all wants one cut for all; use one cut, or "
            f"encoder-training=hosted",
        ),
        (
            serves != "frozen" and c.accumulate > 1,
            f"accumulate={c.accumulate}: encoder-training={serves} steps at every batch; leave accumulate out",
        ),
        (
            zeroth and c.optimizer != "sgd",
            f"gradient=zeroth-order steps by SGD, optimizer={c.optimizer}; set optimizer=sgd",
        ),
        (
            zeroth and (c.accumulate > 1 or c.clip_norm > 0 or c.proximal_mu > 0 or c.precision != "fp32"),
            "gradient=zeroth-order takes no accumulate, clip-norm, proximal-mu or precision; leave them out",
        ),
        (
            zeroth and c.keep_hardest < 1,
            f"keep-hardest={c.keep_hardest:g}: gradient=zeroth-order is replayed as steps over all of a site's "
            f"samples; leave keep-hardest out",
        ),
        (
            c.local_loss_epochs > 0
            and (
                c.method_description.placement == "device" or all(cut.a == cut.b for cut in c.cuts)
            ),
            f"local-loss-epochs={c.local_loss_epochs}: every block is the device's, so there is no encoder to leave out; use "
            f"local-epochs",
        ),
        (
            c.local_loss_epochs > 0
            and (serves != "frozen" or zeroth or c.personalisation != "none" or c.proximal_mu > 0),
            f"local-loss-epochs={c.local_loss_epochs} is for a frozen encoder, gradient=exact, one model a site and no "
            f"proximal-mu; leave it out",
        ),
        (
            zeroth and (c.site_local != "none" or c.personalisation != "none"),
            "gradient=zeroth-order sends seeds and scalars of all it trains; leave site-local and "
            "personalisation out",
        ),
        (
            c.personalisation == "ditto" and serves != "frozen",
            f"personalisation=ditto trains a second copy, which encoder-training={serves} has no place for; use "
            f"encoder-training=frozen",
        ),
        (
            c.personalisation == "fed-rod" and c.loss not in ("auto", "softmax"),
            "personalisation=fed-rod is made for loss=softmax",
        ),
        (
            serves != "frozen" and c.lora_aggregation not in ("plain", "ffa"),
            f"encoder-training={serves} with lora-aggregation={c.lora_aggregation} is not offered; use plain",
        ),
    ]  # fmt: skip

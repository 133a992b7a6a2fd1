"""How a site trains in a round: exact or zeroth-order gradients, and a personal model beside the common one.

What comes out is what the round reports and what the site keeps; the mathematics is training's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.scores import Tally
from fedsplit.model.module import ModuleTensors
from fedsplit.site.state import Saved
from fedsplit.site.work import PERSONAL, OpenModel, SiteWork
from fedsplit.training.personal import (
    PersonalClassifier,
    holding,
    train_ditto,
    train_fed_rod,
)
from fedsplit.training.pipeline import Flow
from fedsplit.training.pruning import hardest, sample_errors
from fedsplit.training.rank_pruning import kept_rank, prune
from fedsplit.training.replay import zeroth_order
from fedsplit.training.round import TrainSettings, train
from fedsplit.training.zeroth_order import train_zeroth_order


@dataclass(frozen=True)
class Learnt:
    """What a round's training came to."""

    loss: float
    test: Tally
    """On the site's own test samples, by what the site would use itself."""
    personal: ModuleTensors = field(default_factory=dict)
    scalars: NDArray[np.float32] | None = None
    """Zeroth order: the update, as one number a step and direction."""
    rank: int = 0
    """The site's LoRA rank from the next round on; 0: as it was."""


def learn(work: SiteWork, run: OpenModel, start: ModuleTensors, saved: Saved | None) -> Learnt:
    """Train for the round's epochs; the model then holds what is the server's share of it."""
    _without_encoder(work, run)
    work = _on_hardest(work, run)
    run.trained += work.config.train.local_epochs * len(work.own.train)
    settings = settings_of(work, [work.order.round])
    if work.config.train.gradient == "zeroth-order":
        zo = zeroth_order(work.config, site=work.site.name, round_=work.order.round)
        loss, scalars = train_zeroth_order(
            run.model, work.epoch, settings, zo, meter=run.meter, cache=run.cache
        )
        return Learnt(loss, work.tested(run, work.own.test), scalars=scalars)
    mine = saved.under(PERSONAL) if saved else {}
    if work.config.train.personalisation == "fed-rod":
        return _fed_rod(work, run, settings, mine)
    loss = train(run.model, work.epoch, settings, **run.training)
    rank = prune(run.model.part, start, rank=work.order.rank, share=work.config.module.rank_pruning)
    if work.config.train.personalisation == "ditto":
        return _ditto(work, run, settings, start, mine, loss)
    return Learnt(loss, work.tested(run, work.own.test), rank=rank)


def _without_encoder(work: SiteWork, run: OpenModel) -> None:
    """`local-loss-epochs` of head joined to tail, in which nothing crosses (SFPrompt, arXiv 2407.17533)."""
    epochs = work.config.train.local_loss_epochs
    if epochs == 0:
        return
    run.trained += epochs * len(work.own.train)
    settings = settings_of(work, [work.order.round])
    local = replace(
        settings,
        epochs=epochs,
        schedule=settings.schedule[:1] * epochs,
        augmentation_key=f"{settings.augmentation_key}/local-loss",
    )
    train(run.model.shortcut(), lambda epoch: work.epoch(f"local-loss/{epoch}"), local)


def _on_hardest(work: SiteWork, run: OpenModel) -> SiteWork:
    """The same work on `keep-hardest` of the training samples: those with the largest errors before the round.

    Scored as a test is, in fp32 and without augmentation, by what the model holds now; after local-loss epochs by head
    joined to tail, so that scores cost no traffic.
    """
    if work.config.train.keep_hardest == 1:
        return work
    train = work.own.train
    # A classifier that has learnt nothing scores all alike, and the stored order may go class by class.
    order = np.random.default_rng(work.seed("hardest")).permutation(len(train))
    run.tested += len(train)
    model, flow = run.model, run.flow
    if work.config.train.local_loss_epochs:
        model, flow = model.shortcut(), Flow()
    scores = sample_errors(model, work.batches(train[order]), flow, work.task)
    kept = np.sort(order[hardest(scores, work.config.train.keep_hardest)])
    return replace(work, own=replace(work.own, train=train[kept]))


def _ditto(
    work: SiteWork,
    run: OpenModel,
    settings: TrainSettings,
    start: ModuleTensors,
    mine: ModuleTensors,
    loss: float,
) -> Learnt:
    """After the global module's own training: that of the personal copy, which costs as much again."""
    run.trained += work.config.train.local_epochs * len(work.own.train)
    state = train_ditto(
        run.model,
        work.epoch,
        settings,
        received=start,
        saved=mine,
        ditto_lambda=work.config.train.ditto_lambda,
        **run.training,
    )
    with holding(run.model.part, state.tensors):
        return Learnt(loss, work.tested(run, work.own.test), state.tensors)


def _fed_rod(
    work: SiteWork, run: OpenModel, settings: TrainSettings, mine: ModuleTensors
) -> Learnt:
    # Balanced softmax keeps the generic classifier from the site's mix of classes. A fixed one needs no such care, and
    # a site of one class would teach the blocks in front of it nothing.
    fixed = work.config.module.classifier_training == "fixed"
    generic = settings if fixed else settings.having(loss="balanced-softmax")
    loss, state = train_fed_rod(run.model, work.epoch, generic, saved=mine, **run.training)
    with PersonalClassifier(run.model.part, state.tensors, None) as personal:
        test = work.tested(run, work.own.test, adjust=personal.logits)
    return Learnt(loss, test, state.tensors)


def settings_of(work: SiteWork, rounds: Sequence[int]) -> TrainSettings:
    """How to train for the local epochs of all these rounds in one go."""
    c = work.config
    factors = [c.train.learning_rate_factor(r) for r in rounds]
    return TrainSettings(
        train=c.train,
        epochs=c.train.local_epochs * len(rounds),
        task=work.task,
        in_flight=c.link.in_flight,
        schedule=tuple(f for f in factors for _ in range(c.train.local_epochs)),
        class_counts=work.class_counts(),
        rank_kept=kept_rank(c.module.rank_pruning, work.order.rank),
        augmentation_key=f"{c.run.seed}/{work.site.name}/{work.order.round}",
        server_mode=c.placement.encoder_training if work.order.stream else "frozen",
    )

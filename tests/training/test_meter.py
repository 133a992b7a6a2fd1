"""What a site's waiting for the encoder costs, counted once however many steps are in flight."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from fedsplit.core.encoder import Array, Mask, Want
from fedsplit.core.errors import UnreachableError
from fedsplit.model.backbone import Backbone
from fedsplit.model.split import SplitModel
from fedsplit.training.round import WaitMeter, evaluate, train
from tests.training.small import (
    BARE,
    LORA,
    WAIT_S,
    Failing,
    Wrapped,
    every_epoch,
    local,
    make_batches,
    rewired,
    settings,
)


class Slow(Wrapped):
    """Takes its time, without working."""

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, want: Want = "output"
    ) -> Array:
        time.sleep(0.02)
        return super().encode(step, h_BTD, mask_BT, want=want)


def metered(model: SplitModel) -> tuple[SplitModel, WaitMeter]:
    model, _ = rewired(model, Slow)
    return rewired(model, WaitMeter)


def test_waiting_in_turn_is_counted_in_full(vit: Backbone) -> None:
    model, _ = local(vit, LORA)
    model, meter = metered(model)
    start = time.perf_counter()
    train(model, every_epoch, settings(epochs=1), meter=meter)
    assert 4 * 0.02 <= meter.wait_s <= time.perf_counter() - start


def test_waiting_of_steps_in_flight_is_counted_once(vit: Backbone) -> None:
    model, _ = local(vit, BARE)
    model, meter = metered(model)
    start = time.perf_counter()
    evaluate(model, make_batches([2] * 8), in_flight=4, meter=meter)
    wall = time.perf_counter() - start
    assert 0 < meter.wait_s <= wall


def test_the_meter_counts_its_own_thread_alone(vit: Backbone) -> None:
    model, _ = local(vit, LORA)
    assert model._encoder is not None
    meter = WaitMeter(Slow(model._encoder))
    h = np.zeros((1, 17, 24), dtype="f4")
    other = threading.Thread(target=lambda: meter.encode(1, h))
    other.start()
    other.join(WAIT_S)
    assert meter.wait_s == 0.0
    meter.encode(2, h, want="gradient")
    after_encode = meter.wait_s
    assert after_encode >= 0.02
    meter.settle(2, h)
    assert meter.wait_s > after_encode
    meter.close()


def test_the_meter_counts_a_failed_wait_too(vit: Backbone) -> None:
    model, _ = local(vit, LORA)
    assert model._encoder is not None
    meter = WaitMeter(Failing(model._encoder, 1))
    with pytest.raises(UnreachableError):
        meter.encode(1, np.zeros((1, 17, 24), dtype="f4"))
    assert meter.wait_s > 0


class Learning(Slow):
    """Takes its time over a step of its own, too."""

    trains = True

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, want: Want = "output"
    ) -> Array:
        time.sleep(0.02)
        return np.stack([h_BTD, h_BTD])

    def settle(self, step: int, answer: Array, *, quiet: bool = False) -> None:
        time.sleep(0.02)


def test_the_meter_counts_what_the_encoder_learns(vit: Backbone) -> None:
    model, _ = local(vit, LORA)
    assert model._encoder is not None
    meter = WaitMeter(Learning(model._encoder))
    assert meter.trains
    h = np.zeros((1, 17, 24), dtype="f4")
    for call in (
        lambda: meter.settle(1, h, quiet=True),
        lambda: meter.encode(2, h, want="probes"),
        lambda: meter.settle(2, np.zeros(2, dtype="f4")),
    ):
        before = meter.wait_s
        call()
        assert meter.wait_s >= before + 0.02

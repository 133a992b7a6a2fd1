"""The losses, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from fedsplit.core.errors import ConfigError
from fedsplit.training.losses import balanced_softmax, class_loss, one_vs_all, softmax
from tests.training.small import settings

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.3, -0.2], [1.0, 1.0, 4.0], [-3.0, 0.0, 0.0]])
LABELS = torch.tensor([0, 2, 1, 0])


def test_softmax_is_torchs_own() -> None:
    wanted = torch.nn.functional.cross_entropy(LOGITS, LABELS)
    assert torch.equal(softmax()(LOGITS, LABELS), wanted)
    assert torch.equal(class_loss(settings())(LOGITS, LABELS), wanted)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_one_vs_all_is_a_binary_problem_a_class(smoothing: float) -> None:
    total = 0.0
    for c in range(3):
        target = (c == LABELS).float() * (1 - smoothing) + 0.5 * smoothing
        total += float(torch.nn.functional.binary_cross_entropy_with_logits(LOGITS[:, c], target))
    assert float(one_vs_all(smoothing)(LOGITS, LABELS)) == pytest.approx(total, rel=1e-6)


def test_balanced_softmax_adds_the_log_of_the_counts() -> None:
    counts = np.array([10, 3, 1])
    wanted = -log_softmax(LOGITS.numpy() + np.log(counts), axis=1)[range(4), LABELS].mean()
    assert float(balanced_softmax([10, 3, 1])(LOGITS, LABELS)) == pytest.approx(wanted, rel=1e-6)


def test_balanced_softmax_of_even_counts_is_softmax() -> None:
    for smoothing in (0.0, 0.1):
        even = balanced_softmax([5, 5, 5], smoothing)(LOGITS, LABELS)
        torch.testing.assert_close(even, softmax(smoothing)(LOGITS, LABELS))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_class_without_samples_takes_no_part(smoothing: float) -> None:
    logits = LOGITS.clone().requires_grad_()
    labels = torch.tensor([0, 2, 2, 0])
    loss = balanced_softmax([4, 0, 9], smoothing)(logits, labels)
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[:, 1].any()


def test_balanced_softmax_undoes_a_prior() -> None:
    """Trained with the prior, a linear classifier scores as one that was trained on even classes."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(-1, 1, 900), rng.normal(1, 1, 100)])[:, None].astype("f4")
    y = np.repeat([0, 1], [900, 100])
    weight = torch.zeros(2, 1, requires_grad=True)
    bias = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = balanced_softmax([900, 100])(
            torch.from_numpy(x) @ weight.T + bias, torch.from_numpy(y)
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    (left, right), ((slope_left,), (slope_right,)) = bias.tolist(), weight.tolist()
    at = (left - right) / (slope_right - slope_left)
    plain = LogisticRegression(C=1e6).fit(x, y)
    skewed = float(-plain.intercept_[0] / plain.coef_[0, 0])
    # Half way between the two means; the prior alone moves it by log(9) / 2, about 1.1.
    assert at == pytest.approx(0, abs=0.2)
    assert skewed > 0.8


def test_balanced_softmax_wants_counts() -> None:
    with pytest.raises(ConfigError, match=r"class_counts"):
        settings(loss="balanced-softmax")
    loss = class_loss(settings(loss="balanced-softmax", class_counts=(1, 2, 3)))
    assert torch.isfinite(loss(LOGITS, LABELS))

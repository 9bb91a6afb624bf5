"""The losses of pairs: the formulas of the papers, and their derivatives by automatic differentiation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tessera.errors import InvalidInput
from tessera.queue.preference import LOSS_TYPES
from trainer_worker.training.objectives.preference import Preference


def direct_loss(objective: Preference, logps: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
    """The loss as the papers write it, one pair at a time. [P]."""
    beta, smoothing, losses = objective.beta, objective.label_smoothing, []
    for (chosen, rejected), (ref_chosen, ref_rejected), (long, other) in zip(
        logps.T, reference.T, lengths.T, strict=True
    ):
        total = (chosen - ref_chosen) - (rejected - ref_rejected)
        mean = (chosen - ref_chosen) / long - (rejected - ref_rejected) / other
        losses.append(
            {
                "sigmoid": -F.logsigmoid(beta * total) * (1 - smoothing)
                - F.logsigmoid(-beta * total) * smoothing,
                "sigmoid_norm": -F.logsigmoid(beta * mean) * (1 - smoothing)
                - F.logsigmoid(-beta * mean) * smoothing,
                "hinge": torch.clamp(1 - beta * total, min=0),
                "ipo": (mean - 1 / (2 * beta)) ** 2,
            }[objective.loss_type]
        )
    return torch.stack(losses)


def pairs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    logps, reference = (-30 * torch.rand(2, 9, dtype=torch.float64, generator=generator) for _ in range(2))
    return logps, reference, torch.randint(1, 20, (2, 9), generator=generator).double()


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize(
    ("loss_type", "smoothing"),
    [(name, 0.0) for name in LOSS_TYPES] + [("sigmoid", 0.2), ("sigmoid_norm", 0.1)],
)
def test_losses_and_slopes_are_those_of_the_formula(loss_type: str, smoothing: float, beta: float) -> None:
    objective = Preference(beta=beta, loss_type=loss_type, label_smoothing=smoothing)
    logps, reference, lengths = pairs()
    judged = objective.judge(logps, reference, lengths)
    leaf = logps.clone().requires_grad_()
    loss = direct_loss(objective, leaf, reference, lengths)
    [slope] = torch.autograd.grad(loss.sum(), leaf)
    torch.testing.assert_close(judged.loss, loss.detach(), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(judged.slope, slope, atol=1e-12, rtol=1e-12)


def test_rewards_are_beta_times_what_was_gained_on_the_reference() -> None:
    logps, reference, lengths = pairs()
    judged = Preference(beta=0.3).judge(logps, reference, lengths)
    rewards = 0.3 * (logps - reference)
    torch.testing.assert_close(judged.details["chosen"], rewards[0])
    torch.testing.assert_close(judged.details["rejected"], rewards[1])
    torch.testing.assert_close(judged.details["margins"], rewards[0] - rewards[1])
    assert judged.is_correct.tolist() == (rewards[0] > rewards[1]).double().tolist()
    assert 0 < judged.is_correct.sum() < 9


def test_where_nothing_is_gained_the_loss_is_that_of_a_coin() -> None:
    logps, _, lengths = pairs()
    assert Preference().judge(logps, logps, lengths).loss.tolist() == pytest.approx([math.log(2)] * 9)


def test_extreme_margins_stay_finite() -> None:
    logps = torch.tensor([[-1e5, 0.0], [0.0, -1e5]], dtype=torch.float64)
    for name in LOSS_TYPES:
        judged = Preference(loss_type=name).judge(logps, torch.zeros_like(logps), torch.ones_like(logps))
        assert judged.loss.isfinite().all()
        assert judged.slope.isfinite().all()


def test_auto_and_absent_options_are_the_defaults() -> None:
    assert Preference.of({"beta": "auto", "loss_type": None}) == Preference.of({}) == Preference()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"beta": 0}, "beta"),
        ({"beta": float("inf")}, "beta"),
        ({"loss_type": "dpo"}, "loss_type"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "label_smoothing"),
        ({"gamma": 1}, "gamma"),
    ],
)
def test_impossible_options_are_refused_by_name(options: dict[str, object], name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Preference.of(options)
    assert caught.value.param == f"method.dpo.hyperparameters.{name}"

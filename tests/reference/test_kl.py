"""KL estimators against the exact KL of small distributions; controllers by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from dressage.algorithms.kl import band, k1, k2, k3, proportional

POLICY = tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
REFERENCE = tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


def expected(per_token: Tensor) -> Tensor:
    """Over tokens drawn from the policy."""
    return (POLICY * per_token).sum()


def test_k1_and_k3_are_unbiased() -> None:
    """KL(policy || reference) by hand: .5 ln 5 + .3 ln 1.5 - .15 ln 2 - .05 ln 8 = 0.718414."""
    for estimate in (k1, k3):
        assert expected(estimate(POLICY.log(), REFERENCE.log())).item() == pytest.approx(0.718414, abs=1e-6)


def test_k1_takes_both_signs_and_k3_does_not() -> None:
    assert k1(POLICY.log(), REFERENCE.log()).sign().tolist() == [1, 1, -1, -1]
    assert (k3(POLICY.log(), REFERENCE.log()) > 0).all()
    assert k3(tensor(-3.0), tensor(-3.0)).item() == 0.0


def test_k2s_gradient_is_the_kls() -> None:
    """Of the expectation over fixed samples, at the policy that drew them; k1's gradient there is 0 on average."""
    logits = POLICY.log().requires_grad_()
    logp = torch.log_softmax(logits, -1)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - REFERENCE.log())).sum(), logits, retain_graph=True)
    (of_k2,) = torch.autograd.grad(expected(k2(logp, REFERENCE.log())), logits, retain_graph=True)
    (of_k1,) = torch.autograd.grad(expected(k1(logp, REFERENCE.log())), logits)
    assert_close(of_k2, exact)
    assert_close(of_k1, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("kl", "coef"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 64 / 1000)),  # a tenth too far
        (60.0, 0.1 * (1 + 0.2 * 64 / 1000)),  # much too far: the error is cut at 0.2
        (0.0, 0.1 * (1 - 0.2 * 64 / 1000)),
    ],
)
def test_proportional_controller(kl: float, coef: float) -> None:
    assert proportional(0.1, kl, target=6.0, horizon=1000, n=64) == pytest.approx(coef, rel=1e-12)


@pytest.mark.parametrize(("kl", "coef"), [(0.5, 0.1), (1.0, 0.2), (5.0, 0.2), (10.0, 0.2), (10.1, 0.4)])
def test_band_controller(kl: float, coef: float) -> None:
    assert band(0.2, kl, low=1.0, high=10.0, factor=2.0) == coef

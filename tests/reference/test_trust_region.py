"""TRPO's parts against what is known without them: the exact KL's Hessian, a linear system, a bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor
from torch.testing import assert_close

from dressage.algorithms.trust_region import (
    conjugate_gradient,
    exact_kl,
    fisher_product,
    flat,
    trust_region_step,
)


def test_exact_kl_by_hand() -> None:
    """KL((1/2, 1/2) || (3/4, 1/4)) = ln 2 - (ln 3) / 2 = 0.143841, and the other way round 0.130812."""
    even, odd = tensor([[0.0, 0.0]]), tensor([[0.75, 0.25]]).log() + 5.0
    assert exact_kl(even, odd).item() == pytest.approx(0.143841, abs=1e-6)
    assert exact_kl(odd, even).item() == pytest.approx(0.130812, abs=1e-6)
    assert exact_kl(odd, odd - 3.0).item() == pytest.approx(0.0, abs=1e-7)


def test_fisher_product_of_two_tokens_by_hand() -> None:
    """A sigmoid's Fisher information is p (1 - p): here 0.75 x 0.25, on the diagonal and negated beside it."""
    logits = tensor([0.75, 0.25], dtype=torch.float64).log().requires_grad_()
    information = 0.75 * 0.25 * tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    for vector in (tensor([1.0, 0.0]).double(), tensor([2.0, -3.0]).double()):
        kl = exact_kl(logits.detach()[None], logits[None]).sum()
        assert_close(fisher_product(kl, [logits], vector), information @ vector)


@given(st.integers(0, 1000))
def test_fisher_product_is_the_hessian_of_the_kl_and_the_slopes_covariance(seed: int) -> None:
    """For a policy of two layers; weights that the KL does not see get zeros."""
    generator = torch.Generator().manual_seed(seed)
    first, second, states = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (4, 2), (5, 3))
    )
    idle = torch.zeros(2, dtype=torch.float64)
    weights = [each.requires_grad_() for each in (first, second, idle)]

    def logits(vector: Tensor) -> Tensor:
        a, b, _ = vector.split([12, 8, 2])
        return (states @ a.view(3, 4)).tanh() @ b.view(4, 2)

    here = flat(weights).detach()
    old = logits(here).detach()
    hessian = torch.autograd.functional.hessian(lambda vector: exact_kl(old, logits(vector)).mean(), here)
    # Fisher's own definition: the mean over states and actions of the slopes' outer product.
    fisher = torch.zeros(22, 22, dtype=torch.float64)
    for state in range(5):
        for action in range(2):
            slope = torch.autograd.functional.jacobian(
                lambda vector, s=state, a=action: logits(vector)[s].log_softmax(-1)[a], here
            )
            fisher += old[state].softmax(-1)[action] * torch.outer(slope, slope) / 5
    vector = torch.randn(22, generator=generator, dtype=torch.float64)
    product = fisher_product(exact_kl(old, (states @ first).tanh() @ second).mean(), weights, vector)
    assert_close(product, hessian @ vector)
    assert_close(product, fisher @ vector)
    assert (product[-2:] == 0).all() and product.abs().sum() > 0


@given(st.integers(0, 1000), st.integers(1, 8))
def test_conjugate_gradient_solves_linear_systems(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(size)
    target = torch.randn(size, generator=generator, dtype=torch.float64)
    found = conjugate_gradient(lambda vector: matrix @ vector, target, iterations=3 * size)
    assert_close(found, torch.linalg.solve(matrix, target), rtol=1e-5, atol=1e-6)
    assert not conjugate_gradient(lambda vector: matrix @ vector, 0 * target).any()
    tiny = conjugate_gradient(lambda vector: matrix @ vector, 1e-6 * target, iterations=3 * size)
    assert_close(tiny / 1e-6, found)  # the system is linear: no size of a gradient is too small


MATRIX = tensor([[4.0, 1.0], [1.0, 0.5]], dtype=torch.float64)
GRADIENT = tensor([1.0, -2.0], dtype=torch.float64)


def quadratic(step: Tensor) -> tuple[float, float]:
    """A loss that is a plane, and a KL that is what the step believes of it."""
    return -(GRADIENT @ step).item(), (0.5 * step @ MATRIX @ step).item() * (1 - 1e-9)


def test_where_the_model_is_right_the_step_is_the_natural_gradients_to_the_bound() -> None:
    """The curvature along the gradient is (4 - 4 + 2) / 5 = 0.4, of which a tenth is damping."""
    step = trust_region_step(GRADIENT, lambda vector: MATRIX @ vector, quadratic, max_kl=0.02)
    natural = -torch.linalg.solve(MATRIX + 0.1 * 0.4 * torch.eye(2, dtype=torch.float64), GRADIENT)
    assert_close(step / step.norm(), natural / natural.norm())
    assert quadratic(step)[1] == pytest.approx(0.02)


def test_the_scale_of_the_weights_changes_nothing() -> None:
    """Weights written ten times as large: the same step in them."""
    step = trust_region_step(GRADIENT, lambda vector: MATRIX @ vector, quadratic, max_kl=0.02)
    scaled = trust_region_step(
        GRADIENT / 10, lambda vector: MATRIX @ vector / 100, lambda step: quadratic(step / 10), max_kl=0.02
    )
    assert_close(scaled / 10, step)


@pytest.mark.parametrize(
    ("worse_up_to", "kl_times", "tries"),
    [(0, 1.0, 0), (0, 1.5, 1), (0, 2.0, 2), (3, 1.0, 3)],  # 0.8^2 > 1 / 2 > 0.8^4: KL falls with the square
)
def test_it_goes_back_until_both_are_good(worse_up_to: int, kl_times: float, tries: int) -> None:
    seen: list[Tensor] = []

    def trial(step: Tensor) -> tuple[float, float]:
        seen.append(step)
        gain, kl = quadratic(step)
        return (gain if len(seen) > worse_up_to else -gain), kl_times * kl

    step = trust_region_step(GRADIENT, lambda vector: MATRIX @ vector, trial, max_kl=0.02)
    assert len(seen) == tries + 1
    assert_close(step, 0.8**tries * seen[0])


def test_no_step_is_better_than_a_bad_one() -> None:
    assert not trust_region_step(GRADIENT, lambda v: MATRIX @ v, lambda step: (-1.0, 0.0), max_kl=0.02).any()
    assert not trust_region_step(GRADIENT, lambda v: MATRIX @ v, lambda step: (1.0, 1.0), max_kl=0.02).any()
    assert not trust_region_step(GRADIENT, lambda v: MATRIX @ v, lambda step: (0.0, 0.0), max_kl=0.02).any()
    assert not trust_region_step(0 * GRADIENT, lambda v: MATRIX @ v, quadratic, max_kl=0.02).any()


def test_a_step_may_go_to_the_bound_itself() -> None:
    assert trust_region_step(GRADIENT, lambda v: MATRIX @ v, lambda step: (1.0, 0.02), max_kl=0.02).any()


def test_where_the_policy_does_not_change_nothing_is_tried() -> None:
    """No curvature along the gradient: any step would be infinitely long."""

    def trial(step: Tensor) -> tuple[float, float]:
        raise AssertionError("tried")

    assert not trust_region_step(GRADIENT, lambda vector: 0 * vector, trial, max_kl=0.02).any()

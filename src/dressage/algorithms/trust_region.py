"""TRPO's step: as far along the natural gradient as a bound on the KL allows (Schulman et al. 2015, appendix C)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dressage.batches import Scalar

Vector = Tensor
Product = Callable[[Vector], Vector]
"""A vector times a symmetric matrix that is never written down."""
Trial = Callable[[Vector], tuple[float, float]]
"""Of a step: how much lower the loss is then, and how far the policy has gone, in nats a token."""

DAMPING = 0.1
"""Of the curvature along the gradient, added to the Fisher matrix's diagonal: the matrix has not full rank."""
ITERATIONS = 10
"""Of conjugate gradients."""
BACKTRACKS, SHRINK = 10, 0.8
"""How often a step is tried, and how much shorter each time."""


def exact_kl(old_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(old || new) over the whole vocabulary: [N, V] twice -> [N] nats."""
    old, new = old_logits.log_softmax(-1), logits.log_softmax(-1)
    return (old.exp() * (old - new)).sum(-1)


def fisher_product(kl: Scalar, parameters: Sequence[Tensor], vector: Vector) -> Vector:
    """Fisher matrix times vector, as the Hessian of `kl` at the policy it is measured from: by a double backward.

    Weights that `kl` does not depend on get zeros. The graph behind `kl` is used up.
    """
    slopes = torch.autograd.grad(kl, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
    along = flat(slopes) @ vector
    return flat(torch.autograd.grad(along, parameters, allow_unused=True, materialize_grads=True))


def conjugate_gradient(product: Product, target: Vector, iterations: int = ITERATIONS) -> Vector:
    """x such that product(x) is about `target` (Hestenes and Stiefel 1952); exact after as many steps as dimensions."""
    x, residual = torch.zeros_like(target), target.clone()
    direction, size = residual.clone(), residual @ residual
    for _ in range(iterations):
        if size <= 1e-12 * (target @ target):
            break
        image = product(direction)
        length = size / (direction @ image)
        x = x + length * direction
        residual = residual - length * image
        before, size = size, residual @ residual
        direction = residual + size / before * direction
    return x


def trust_region_step(gradient: Vector, product: Product, trial: Trial, *, max_kl: float) -> Vector:
    """The step against `gradient` that lowers the loss and moves the policy by at most `max_kl` nats a token.

    Backtracks from where the quadratic model meets the bound; zeros if no try will do. The damping is in the measure of
    the matrix itself: adapters have curvatures of other sizes than whole weights.
    """
    damping = DAMPING * (gradient @ product(gradient)) / (gradient @ gradient)
    if not damping > 0:  # no gradient, or NaN
        return torch.zeros_like(gradient)
    direction = conjugate_gradient(lambda vector: product(vector) + damping * vector, gradient)
    longest = -(2 * max_kl / (direction @ product(direction))).sqrt() * direction
    for tries in range(BACKTRACKS):
        step = SHRINK**tries * longest
        gain, kl = trial(step)
        if gain > 0 and kl <= max_kl:
            return step
    return torch.zeros_like(gradient)


def flat(tensors: Sequence[Tensor]) -> Vector:
    """One vector of them all."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])

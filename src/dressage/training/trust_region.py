"""TRPO's step on a real policy: the loss, the Fisher matrix and the distance that `trust_region_step` asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dressage.algorithms.aggregate import Totals
from dressage.algorithms.trust_region import Vector, exact_kl, fisher_product, flat, trust_region_step
from dressage.batches import Experience
from dressage.models.roles import Role
from dressage.models.scoring import score_logits

Answers = Callable[[], Iterator[tuple[Experience, Totals]]]
"""Micro-batches of an update's answers, each with the totals of the batch it was cut from."""


def bounded_step(
    policy: Role,
    answers: Answers,
    measured: Answers,
    loss: Callable[[], float],
    *,
    temperature: float,
    max_kl: float,
) -> dict[str, float]:
    """Moves the policy against the gradient that lies on it, at most `max_kl` nats a token, and clears the gradient.

    `loss` is what the gradient is of, at the weights as they are; `measured` are those of the `answers` whose Fisher
    matrix shapes the step, which is bounded on all of them. Returns the gradient's norm, and how far the policy
    went.
    """
    parameters = list(policy.parameters().values())
    gradient = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
    before, at_first = flat([p.detach() for p in parameters]), loss()
    reached = {0.0: 0.0}

    def trial(step: Vector) -> tuple[float, float]:
        kl = _distance(policy, parameters, answers, before, before + step, temperature)
        reached[float(step.norm())] = kl
        return at_first - loss(), kl

    def product(vector: Vector) -> Vector:
        return _fisher(policy, parameters, measured, vector, temperature)

    step = trust_region_step(gradient, product, trial, max_kl=max_kl)
    _write(parameters, before + step)
    for parameter in parameters:
        parameter.grad = None
    return {"gradient/norm": float(gradient.norm()), "trust_region/kl": reached[float(step.norm())]}


def _fisher(
    policy: Role, parameters: Sequence[Tensor], measured: Answers, vector: Vector, temperature: float
) -> Vector:
    """The Fisher matrix of an average token times a vector."""
    product = torch.zeros_like(vector)
    # The faster kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        for piece, totals in measured():
            logits = _logits(policy, piece, temperature)
            kl = exact_kl(logits.detach(), logits).sum() / max(totals.tokens, 1)
            product += fisher_product(kl, parameters, vector)
    return product


@torch.no_grad()
def _distance(
    policy: Role,
    parameters: Sequence[nn.Parameter],
    answers: Answers,
    before: Vector,
    after: Vector,
    temperature: float,
) -> float:
    """KL(before || after) in nats a token, over the whole vocabulary. Leaves the weights as `after`."""
    kl = 0.0
    _write(parameters, after)
    for piece, totals in answers():
        _write(parameters, before)
        old = _logits(policy, piece, temperature)
        _write(parameters, after)
        kl += float(exact_kl(old, _logits(policy, piece, temperature)).sum()) / max(totals.tokens, 1)
    return kl


def _logits(policy: Role, piece: Experience, temperature: float) -> Tensor:
    return score_logits(policy, piece.tokens, piece.attention_mask, piece.response_mask, temperature=temperature)


@torch.no_grad()
def _write(parameters: Sequence[nn.Parameter], vector: Vector) -> None:
    # Not vector_to_parameters: weights that share one storage cannot be saved.
    for parameter, values in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        parameter.copy_(values.view_as(parameter))

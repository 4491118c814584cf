"""Pure tensor helpers: log-probabilities in chunks, statistics over a mask or a group, padding. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    chunk: int = 128,
    with_entropy: bool = False,
    later: Later | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each row's target under softmax((hidden @ weight.T + bias) / temperature), and the entropy.

    hidden [N, H], weight [V, H], targets [N], bias [V] -> log-probs [N] and entropy [N] in nats, both at least fp32
    and both differentiable. No more than `chunk` rows of logits exist at once, forward or backward. `later`: what
    `taken_later` gave with this weight.
    """
    logprobs, entropy = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden.to(weight.dtype), weight, bias, targets, temperature, chunk, with_entropy, later
    )
    return logprobs, entropy if with_entropy else None


Later = list[Callable[[], Tensor]]
"""How a weight's gradient will be taken, once that is known."""


def taken_later(weight: Tensor) -> tuple[Tensor, Later | None]:
    """The same weight, whose gradient is taken at the end of the backward pass: not as large as it beside all that the
    layers have kept.

    To be called before the layers are: autograd goes back through what was done first at last.
    """
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return weight, None
    later: Later = []
    same: Tensor = _TakenLater.apply(weight, later)  # type: ignore[no-untyped-call]
    return same, later


class _TakenLater(torch.autograd.Function):
    """The identity; its gradient is what was left for it, whatever comes in."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, later: Later) -> Tensor:
        ctx.later = later
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.later.pop()(), None


class _TokenLogprobs(torch.autograd.Function):
    """Keeps log-normalisers instead of logits, and multiplies again on the way back for the weight's gradient.

    The states' is known up to the incoming gradient of the log-probability, a number, while the forward pass holds the
    probabilities, and is taken there: under adapters nothing is multiplied again, unless entropy is learnt from.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk: int,
        with_entropy: bool,
        later: Later | None,
    ) -> tuple[Tensor, Tensor]:
        rows = hidden.shape[0]
        normaliser = hidden.new_empty(rows, dtype=_softmax_dtype(hidden))
        logprobs, entropy = torch.empty_like(normaliser), torch.zeros_like(normaliser)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[part], weight, bias, temperature)
            normaliser[part] = logits.logsumexp(-1)
            logprobs[part] = logits.gather(-1, targets[part, None])[:, 0] - normaliser[part]
            if slope is None and not with_entropy:
                continue
            logp = logits.sub_(normaliser[part, None])
            probs = logp.exp() if with_entropy else logp.exp_()
            if with_entropy:
                entropy[part] = -torch.linalg.vecdot(probs, logp)
            if slope is not None:
                slope[part] = (weight[targets[part]] - probs.to(weight.dtype) @ weight) / temperature
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser, entropy, slope)
        ctx.temperature, ctx.chunk, ctx.later = temperature, chunk, later
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor | None, of_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normaliser, entropy, slope = ctx.saved_tensors
        hidden, weight = hidden.detach(), weight.detach()  # what is taken later holds no graph
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        exact = normaliser.dtype
        if of_logprobs is None:
            of_logprobs = torch.zeros_like(normaliser)

        def of_logits() -> Iterator[tuple[slice, Tensor]]:
            for start in range(0, hidden.shape[0], ctx.chunk):
                part = slice(start, start + ctx.chunk)
                logp = _logits(hidden[part], weight, bias, ctx.temperature).sub_(normaliser[part, None])
                # d logprob / d logits = onehot - p;  d entropy / d logits = -p (log p + entropy).
                if of_entropy is None:
                    grad = logp.exp_().mul_(-of_logprobs[part, None])
                else:
                    probs = logp.exp()
                    grad = logp.add_(entropy[part, None]).mul_(-of_entropy[part, None]).sub_(of_logprobs[part, None])
                    grad.mul_(probs)
                grad.scatter_add_(-1, targets[part, None], of_logprobs[part, None])
                yield part, grad if ctx.temperature == 1.0 else grad.div_(ctx.temperature)

        def take_weight() -> Tensor:
            taken = torch.zeros_like(weight, dtype=exact)
            for part, grad in of_logits():
                _add_product(taken, grad.to(weight.dtype).T, hidden[part])
            return taken.to(weight.dtype)

        of_hidden = of_bias = of_weight = None
        if slope is not None and of_entropy is None:
            of_hidden = (of_logprobs[:, None] * slope).to(hidden.dtype)
        elif needs_hidden:
            of_hidden = torch.empty_like(hidden)
            for part, grad in of_logits():
                of_hidden[part] = grad.to(weight.dtype) @ weight
        if needs_bias:
            of_bias = sum((grad.sum(0) for _, grad in of_logits()), torch.zeros_like(bias, dtype=exact)).to(bias.dtype)
        if needs_weight and ctx.later is None:
            of_weight = take_weight()
        elif needs_weight:
            ctx.later[:] = [take_weight]
            of_weight = weight.new_zeros(()).expand_as(weight)  # autograd wants one, and this takes no room
        return of_hidden, of_weight, of_bias, *[None] * 5


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """to += left @ right, without a matrix in between where all are of one type."""
    if to.dtype == left.dtype:
        to.addmm_(left, right)
    else:
        to += left @ right


def full_kl(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    ref_weight: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    chunk: int = 128,
) -> Tensor:
    """KL(policy || reference) [N] in nats of whole next-token distributions, from the states [N, H] they follow.

    Differentiable in the policy's; no more than `chunk` rows of logits exist at once, forward or backward.
    """

    def of(hidden: Tensor, ref_hidden: Tensor) -> Tensor:
        logp = _logits(hidden, weight, bias, temperature).log_softmax(-1)
        ref_logp = _logits(ref_hidden, ref_weight, ref_bias, temperature).log_softmax(-1)
        kl: Tensor = torch.linalg.vecdot(logp.exp(), logp - ref_logp)
        return kl

    hidden, ref_hidden = hidden.to(weight.dtype), ref_hidden.to(ref_weight.dtype)
    parts = zip(hidden.split(chunk), ref_hidden.split(chunk), strict=True)
    return torch.cat([checkpoint(of, *part, use_reentrant=False) for part in parts])


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = (hidden @ weight.T).to(_softmax_dtype(hidden))
    if bias is not None:
        logits += bias
    return logits if temperature == 1.0 else logits.div_(temperature)


def _softmax_dtype(values: Tensor) -> torch.dtype:
    """fp32, or fp64 where fp64 comes in."""
    return torch.promote_types(values.dtype, torch.float32)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values that count, in fp32 at least; 0 if none does. What does not count may be anything, NaN too."""
    kept = values.to(_softmax_dtype(values)).masked_fill(~mask, 0.0)
    return kept.sum() / mask.sum().clamp(min=1)


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Population variance of the values that count; 0 if none does."""
    return masked_mean((values - masked_mean(values, mask)).square(), mask)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Values scaled to variance 1 over the mask, and moved to mean 0 if `shift_mean`; 0 where nothing counts."""
    mean, variance = masked_mean(values, mask), masked_var(values, mask)
    white = (values - mean) * torch.rsqrt(variance + eps)
    return (white if shift_mean else white + mean).masked_fill(~mask, 0.0)


def group_mean(values: Tensor, group: Tensor) -> Tensor:
    """For every one of the [B] values the mean of its group; groups are any integers, in any order."""
    index = _group_index(group)
    # In fp64, so that the mean of equal values is that value and not a rounding away from it: divided by the group's
    # deviation the rounding would look like a difference between answers.
    means = index.bincount(values.double()) / index.bincount()
    return means[index].to(values.dtype)


def group_size(group: Tensor) -> Tensor:
    """For every one of the [B] members how many its group has."""
    index = _group_index(group)
    return index.bincount()[index]


def shared_beginning(tokens: Tensor, mask: Tensor, group: Tensor) -> Tensor:
    """With how many first tokens each of the rows [B, T], padded on the right, begins as all of its group do: [B]."""
    shared = torch.zeros(len(tokens), dtype=torch.int64)
    for member in group.unique():
        rows = (group == member).nonzero()[:, 0]
        alike = (tokens[rows] == tokens[rows[0]]).all(0) & mask[rows].bool().all(0)
        shared[rows.cpu()] = int(alike.long().cumprod(0).sum())
    return shared


def _group_index(group: Tensor) -> Tensor:
    """Groups numbered from 0 without holes."""
    index: Tensor = group.unique(return_inverse=True)[1]
    return index


def pad_right(rows: Sequence[Sequence[float]], value: float) -> Tensor:
    """Ragged rows as one [B, T] tensor; the type of `value` (bool, int, float) is the type of the tensor."""
    dtype = {bool: torch.bool, int: torch.int64, float: torch.float32}[type(value)]
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=dtype).reshape(len(rows), width)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Place of every token in its own text, whichever side is padded; padding in front gets 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)

"""Tokens to scores: the one place where logits, and values with them, are shifted."""

from __future__ import annotations

import torch
from torch import Tensor

from dressage.batches import Ints, Mask, PerSequence, PerToken, TokenScores
from dressage.models.roles import Role
from dressage.tensors import full_kl, taken_later, token_logprobs


def score_tokens(
    role: Role,
    tokens: Ints,
    attention_mask: Mask,
    wanted: Mask,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    reference: Role | None = None,
) -> TokenScores:
    """Log-probabilities of the wanted tokens given those before them, and values if the role has a head.

    All arguments and results are [B, T]; logits exist for wanted positions only, a chunk at a time. The first token of
    a row has nothing before it and cannot be wanted. With a `reference`, also the KL of its whole distributions.
    """
    head = role.backbone.model.get_output_embeddings()
    weight, later = taken_later(head.weight)
    hidden, targets = _before(role.hidden(tokens, attention_mask), wanted), tokens[:, 1:][wanted[:, 1:]]
    logprobs, entropies = token_logprobs(
        hidden,
        weight,
        targets,
        temperature=temperature,
        bias=getattr(head, "bias", None),
        with_entropy=entropy,
        later=later,
    )
    return TokenScores(
        logprobs=_placed(logprobs, wanted),
        entropy=None if entropies is None else _placed(entropies, wanted),
        values=None if role.head is None else _placed(role.head(hidden), wanted),
        full_kl=None
        if reference is None
        else _placed(_full_kl(role, hidden, reference, tokens, attention_mask, wanted, temperature), wanted),
    )


def _full_kl(
    role: Role,
    hidden: Tensor,
    reference: Role,
    tokens: Ints,
    attention_mask: Mask,
    wanted: Mask,
    temperature: float,
) -> Tensor:
    """KL(role || reference) [N] at the wanted tokens, from the role's own states [N, H] before them."""
    with torch.no_grad():
        below = _before(reference.hidden(tokens, attention_mask), wanted)
    head, other = (one.backbone.model.get_output_embeddings() for one in (role, reference))
    return full_kl(
        hidden,
        below,
        head.weight,
        other.weight.detach(),
        temperature=temperature,
        bias=getattr(head, "bias", None),
        ref_bias=getattr(other, "bias", None),
    )


def score_logits(role: Role, tokens: Ints, attention_mask: Mask, wanted: Mask, *, temperature: float = 1.0) -> Tensor:
    """Logits [N, V] of the N wanted tokens in fp32, all at once: for what needs a whole distribution twice derived."""
    head = role.backbone.model.get_output_embeddings()
    logits: Tensor = head(_before(role.hidden(tokens, attention_mask), wanted)).float()
    return logits / temperature


def score_values(role: Role, tokens: Ints, attention_mask: Mask, wanted: Mask) -> PerToken:
    """V(s_t) [B, T]: the value of the state in which token t is chosen, before it is; 0 where not wanted."""
    assert role.head is not None
    return _placed(role.head(_before(role.hidden(tokens, attention_mask), wanted)), wanted)


def score_sequences(role: Role, tokens: Ints, attention_mask: Mask, last: Ints) -> PerSequence:
    """A reward model's score [B], read at index `last` [B]: the last real token, by the collator's word.

    Where the role says so, the mean over all real tokens instead.
    """
    assert role.head is not None
    hidden = role.hidden(tokens, attention_mask)
    if role.pooling == "mean":
        per_token: PerToken = role.head(hidden).masked_fill(~attention_mask, 0.0)
        return per_token.sum(-1) / attention_mask.sum(-1)
    scores: PerSequence = role.head(hidden[torch.arange(len(last), device=last.device), last])
    return scores


def _before(hidden: Tensor, wanted: Mask) -> Tensor:
    """The states [N, H] in which the wanted tokens are chosen: those one position earlier."""
    return hidden[:, :-1][wanted[:, 1:]]


def _placed(values: Tensor, wanted: Mask) -> PerToken:
    """[N] put back at the wanted positions of [B, T]."""
    place = wanted.clone()
    place[:, 0] = False
    return values.new_zeros(wanted.shape).masked_scatter(place, values)

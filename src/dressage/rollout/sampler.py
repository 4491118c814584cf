"""Drawing tokens: seeds, random numbers that belong to a sample rather than to a batch, and the draw itself."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.nn import functional as F

from dressage.batches import Ints, PerSequence

BLOCK = 256
"""Tokens a block: sums of about sqrt(vocabulary) blocks are searched first, then one block."""


def sample_seed(seed: int, prompt_id: str, copy: int) -> int:
    """The seed of one answer, a signed 64-bit number; `copy` counts the earlier answers to this prompt in the call."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{copy}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def uniforms(seeds: Ints, position: int | Ints) -> Tensor:
    """Numbers in [0, 1), float64 [B]: output `position`, one or [B], of the generator that each of `seeds` [B] starts.

    SplitMix64 (Steele, Lea and Flood 2014, fig. 16) jumps to any output at once, so a number depends on its seed and
    position alone: not on the batch, its order, or the rows that have finished.
    """
    z = seeds + (torch.as_tensor(position) + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return _shift(z ^ _shift(z, 31), 11).double() * 2.0**-53


def length_limits(seeds: Ints, low: int, high: int) -> Ints:
    """Most tokens [B] that each answer may have, every number from low to high alike: drawn before its first token."""
    return low + (uniforms(seeds, -1) * (high - low + 1)).long()


def draw(
    logits: Tensor, uniforms: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> tuple[Ints, PerSequence]:
    """A token [B] for each row of logits [B, V] by inverting its distribution function at a uniform [B], and its
    log-probability [B].

    The log-probability is of softmax(logits / temperature) in float32, before top-k and top-p take tokens away: that
    is what a trainer recomputes. Temperature 0 takes the likeliest token, with its log-probability at temperature 1.
    """
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature not in (0.0, 1.0):
        scaled = scaled / temperature
    top = scaled.amax(-1, keepdim=True)
    weights = (scaled - top).exp_()
    # Block sums serve twice: their total normalises the log-probabilities, their running sum is searched.
    blocks = _in_blocks(weights)
    sums = blocks.sum(-1, dtype=torch.float64)
    log_total = sums.sum(-1).log()
    if temperature == 0.0:
        tokens = scaled.argmax(-1)
    else:
        if top_k or top_p < 1.0:
            blocks = _in_blocks(weights * kept_tokens(weights, top_p=top_p, top_k=top_k))
            sums = blocks.sum(-1, dtype=torch.float64)
        # NaN would be beyond the last token; clamped, it is left to show in the log-probability.
        tokens = _invert(blocks, sums, uniforms).clamp(max=scaled.shape[-1] - 1)
    chosen = scaled.gather(-1, tokens[:, None])
    return tokens, ((chosen - top).squeeze(-1) - log_total).float()


def kept_tokens(weights: Tensor, *, top_p: float, top_k: int) -> Tensor:
    """True [B, V] on the `top_k` largest weights, and of these on the fewest that hold `top_p` of their sum.

    Tokens as likely as the last one kept are kept too. 0 and 1 turn the two off.
    """
    kept = torch.ones_like(weights, dtype=torch.bool)
    if 0 < top_k < weights.shape[-1]:
        kept = weights >= weights.topk(top_k).values[:, -1:]
    if top_p < 1.0:
        ordered = (weights * kept).sort(descending=True).values.double()
        before = ordered.cumsum(-1) - ordered
        # The likeliest token has nothing before it; it stays even where top_p is 0.
        count = (before < top_p * ordered.sum(-1, keepdim=True)).sum(-1, keepdim=True).clamp(min=1)
        kept &= weights >= ordered.gather(-1, count - 1)
    return kept


def _in_blocks(weights: Tensor) -> Tensor:
    """[B, V] as [B, N, BLOCK], the last block filled up with zeros; a copy only where it has to be."""
    rest = -weights.shape[-1] % BLOCK
    padded: Tensor = F.pad(weights, (0, rest)) if rest else weights
    return padded.view(len(weights), -1, BLOCK)


def _invert(blocks: Tensor, sums: Tensor, uniforms: Tensor) -> Ints:
    """The first token [B] at which the running sum of blocks [B, N, BLOCK] passes its share `uniforms` of the total."""
    block, rest = _search(sums.cumsum(-1), uniforms * sums.sum(-1))
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block].double()
    token, _ = _search(inside.cumsum(-1), rest)
    return block * BLOCK + token


def _search(running: Tensor, target: Tensor) -> tuple[Ints, Tensor]:
    """The first entry [B] of running sums [B, N] beyond the target [B], and how far into that entry the target is."""
    # Rounding must not carry the target past the last entry that has any weight.
    target = torch.minimum(target, torch.nextafter(running[:, -1], torch.zeros_like(target)))
    index = torch.searchsorted(running, target[:, None], right=True).clamp(max=running.shape[-1] - 1)
    before = running.gather(-1, (index - 1).clamp(min=0)).masked_fill(index == 0, 0.0)
    return index.squeeze(-1), target - before.squeeze(-1)


def _signed(number: int) -> int:
    """The low 64 bits as torch's signed integers write them."""
    low = number & 0xFFFFFFFFFFFFFFFF
    return low - (1 << 64) if low >> 63 else low


def _shift(number: Ints, bits: int) -> Ints:
    """Right by `bits`, filling with zeros: torch's own shift repeats the sign."""
    return (number >> bits) & ((1 << (64 - bits)) - 1)

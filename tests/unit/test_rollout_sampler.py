"""The draw against softmax, the random numbers against the published generator."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from dressage.rollout.sampler import draw, kept_tokens, length_limits, sample_seed, uniforms

VOCABULARIES = [7, 256, 1000]  # less than a block, one block, blocks with a rest


def evenly(count: int) -> torch.Tensor:
    """Numbers that fill [0, 1): as many of them fall into an interval as it is long, to within one."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def test_seeds_are_the_same_on_every_machine() -> None:
    # printf '0/abc/0' | sha256sum begins with these 8 bytes, read as a little-endian signed number.
    assert sample_seed(0, "abc", 0) == int.from_bytes(bytes.fromhex("c58877dfbfa46e06"), "little", signed=True)


def test_seeds_tell_run_prompt_and_copy_apart() -> None:
    seeds = {sample_seed(seed, prompt, copy) for seed in range(20) for prompt in ("1", "11") for copy in range(20)}
    assert len(seeds) == 20 * 2 * 20


def test_uniforms_are_the_published_generators() -> None:
    """SplitMix64 seeded with 1234567: the vector that its implementations share."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    drawn = [float(uniforms(torch.tensor([1234567]), position)) for position in range(5)]
    assert drawn == [(number >> 11) / 2**53 for number in published]
    assert uniforms(torch.tensor([1234567] * 5), torch.arange(5)).tolist() == drawn


def test_uniforms_belong_to_the_row() -> None:
    seeds = torch.tensor([sample_seed(0, "p", copy) for copy in range(6)])
    order = torch.tensor([4, 0, 5])
    assert_close(uniforms(seeds, 3)[order], uniforms(seeds[order], 3), rtol=0, atol=0)


def test_limits_are_even_and_know_nothing_of_the_first_token() -> None:
    """Six limits over 6,000 seeds, and over each half of them that the first token's number tells apart."""
    seeds = torch.tensor([sample_seed(1, "a", copy) for copy in range(6000)])
    limits, first = length_limits(seeds, 3, 8), uniforms(seeds, 0)
    for chosen in (limits, limits[first < 0.5], limits[first >= 0.5]):
        expected = len(chosen) / 6
        counts = chosen.bincount(minlength=9)
        assert counts.sum() == counts[3:].sum() == len(chosen)
        assert ((counts[3:] - expected).square() / expected).sum() < 5 + 4 * math.sqrt(10)
    assert length_limits(seeds, 4, 4).unique().tolist() == [4]
    assert torch.equal(length_limits(seeds[10:20], 3, 8), limits[10:20])


def test_uniforms_are_uniform() -> None:
    seeds = torch.tensor([sample_seed(1, "p", copy) for copy in range(4000)])
    drawn = torch.cat([uniforms(seeds, position) for position in range(5)])
    counts = torch.histc(drawn, bins=50, min=0, max=1)
    chi_square = ((counts - 400).square() / 400).sum()
    assert chi_square < 49 + 4 * math.sqrt(2 * 49)
    neighbours = torch.stack([uniforms(seeds, 0), uniforms(seeds, 1)])
    assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 0.06


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
def test_draw_follows_softmax(vocabulary: int, temperature: float) -> None:
    """Uniforms in even steps give each token its share of them exactly, up to one at each end."""
    logits, count = torch.randn(vocabulary) * 3, 20_000
    tokens, _ = draw(logits.expand(count, -1), evenly(count), temperature=temperature)
    expected = (logits.double() / temperature).softmax(-1) * count
    assert (torch.bincount(tokens, minlength=vocabulary) - expected).abs().max() < 1.01


def test_draw_with_its_own_uniforms_follows_softmax() -> None:
    logits, count = torch.randn(20), 20_000
    seeds = torch.tensor([sample_seed(3, "p", copy) for copy in range(count)])
    tokens, _ = draw(logits.expand(count, -1), uniforms(seeds, 0))
    expected = logits.softmax(-1) * count
    chi_square = ((torch.bincount(tokens, minlength=20) - expected).square() / expected).sum()
    assert chi_square < 19 + 4 * math.sqrt(2 * 19)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_log_softmax(temperature: float) -> None:
    logits = torch.randn(50, 1000) * 4
    tokens, logprobs = draw(logits, torch.rand(50, dtype=torch.float64), temperature=temperature)
    expected = (logits.double() / temperature).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    assert_close(logprobs, expected.float(), rtol=0, atol=1e-5)


def test_logprobs_know_nothing_of_filters() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    tokens, logprobs = draw(logits, torch.tensor([0.9], dtype=torch.float64), top_k=2)
    assert tokens.tolist() == [1]
    assert_close(logprobs, logits.log_softmax(-1)[:, 1])


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.randn(30, 1000)
    tokens, logprobs = draw(logits, torch.rand(30, dtype=torch.float64), temperature=0.0, top_p=0.5, top_k=3)
    assert tokens.tolist() == logits.argmax(-1).tolist()
    assert_close(logprobs, logits.log_softmax(-1).amax(-1))


@pytest.mark.parametrize(
    ("top_p", "top_k", "support"),
    [
        (1.0, 0, {0, 1, 2, 3}),
        (1.0, 2, {0, 1}),
        (1.0, 9, {0, 1, 2, 3}),
        (0.49, 0, {0}),
        (0.6, 0, {0, 1}),
        (0.81, 0, {0, 1, 2}),
        (0.0, 0, {0}),
        (0.7, 3, {0, 1}),  # of 0.95 that three hold, 0.8 is enough
    ],
)
def test_filters_by_hand(top_p: float, top_k: int, support: set[int]) -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for order in (torch.arange(4), torch.tensor([2, 0, 3, 1])):
        logits = probabilities[order].log().expand(500, -1)
        tokens, _ = draw(logits, evenly(500), top_p=top_p, top_k=top_k)
        assert set(order[tokens].tolist()) == support


def test_filters_keep_proportions() -> None:
    logits, count = torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), 8000
    tokens, _ = draw(logits.expand(count, -1), evenly(count), top_k=2)
    assert torch.bincount(tokens).tolist() == [5000, 3000]


def test_equal_tokens_are_kept_together() -> None:
    assert kept_tokens(torch.tensor([[1.0, 2.0, 1.0, 0.5]]), top_p=1.0, top_k=2).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(uniform: float) -> None:
    logits = torch.full((1, 600), -math.inf)
    logits[0, [130, 131, 400]] = torch.tensor([0.1, 5.0, 0.3])
    tokens, logprobs = draw(logits, torch.tensor([uniform], dtype=torch.float64))
    assert tokens.tolist() == [130 if uniform == 0 else 400]
    assert logprobs.isfinite().all()

"""PPO's losses by hand; the same gradient however the batch is cut, padded or ordered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor
from torch.nn.functional import pad
from torch.testing import assert_close

from dressage.algorithms.aggregate import (
    Totals,
    Weigh,
    aggregate,
    constant_length,
    count,
    sequence_mean,
    token_mean,
)
from dressage.algorithms.kl import k2, k3
from dressage.algorithms.policy_gradient import (
    Estimator,
    PolicyGradientSettings,
    clipped_surrogate,
    clipped_value_loss,
    held_back,
    policy_loss,
    policy_statistics,
)
from dressage.batches import Experience, TokenScores, select
from dressage.errors import ConfigError
from dressage.tensors import token_logprobs

VOCABULARY, WIDTH = 7, 6
ALL_TERMS = PolicyGradientSettings(entropy_coef=0.02, kl_loss_coef=0.05, value_coef=0.3)
seeds = st.integers(0, 10_000)
weighings = st.sampled_from([token_mean, sequence_mean, constant_length])


# --- by hand


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.5, +1.0, -1.2),  # a gain is capped at 1 + clip
        (0.5, +1.0, -0.5),  # a good token made rarer: no cap, full pull back
        (1.5, -1.0, +1.5),  # a bad token made likelier: no cap, full push down
        (0.5, -1.0, +0.8),  # ... and capped at 1 - clip once it is rare
    ],
)
def test_clip_by_hand(ratio: float, advantage: float, expected: float) -> None:
    loss = clipped_surrogate(tensor([[log(ratio)]]), tensor([[advantage]]), clip_low=0.2, clip_high=0.2)
    assert_close(loss, tensor([[expected]]), rtol=0, atol=1e-6)


def test_the_clip_has_two_sides() -> None:
    log_ratio = tensor([[log(1.5), log(0.5)]])
    loss = clipped_surrogate(log_ratio, tensor([[1.0, -1.0]]), clip_low=0.4, clip_high=0.1)
    assert_close(loss, tensor([[-1.1, 0.6]]))


@pytest.mark.parametrize(
    ("value", "old", "target", "expected"),
    [
        (0.5, 0.4, 1.0, 0.5 * 0.25),  # within the clip: the plain error
        (1.0, 0.0, 2.0, 0.5 * 1.8**2),  # ran ahead towards the target: held at 0.2, and no gradient
        (1.0, 0.0, -1.0, 0.5 * 4.0),  # ran the wrong way: the full error pulls back
        (1.0, 0.0, 0.9, 0.5 * 0.7**2),  # nearly there, but held at 0.2
        (-1.0, 0.0, -2.0, 0.5 * 1.8**2),  # downwards too
        (0.5, 0.4, 0.0, 0.5 * 0.25),  # a step up within the clip, away from the target
    ],
)
def test_value_clip_by_hand(value: float, old: float, target: float, expected: float) -> None:
    loss = clipped_value_loss(tensor(value), tensor(old), tensor(target), clip=0.2)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    plain = clipped_value_loss(tensor(value), tensor(old), tensor(target), clip=None)
    assert plain.item() == pytest.approx(0.5 * (value - target) ** 2, abs=1e-6)


def by_hand() -> tuple[TokenScores, Tensor, Experience]:
    """Two tokens that count, one that does not: ratios 1.5 and 0.5, advantages +2 and -1."""
    old = tensor([[-1.0, -1.0, -1.0]])
    scores = TokenScores(
        logprobs=old + tensor([[99.0, log(1.5), log(0.5)]]),
        entropy=tensor([[9.0, 0.6, 0.4]]),
    )
    batch = Experience(
        tokens=tensor([[1, 2, 3]]),
        attention_mask=tensor([[True, True, True]]),
        response_mask=tensor([[False, True, True]]),
        engine_logprobs=old,
        old_logprobs=old,
        advantages=tensor([[0.0, 2.0, -1.0]]),
        group=tensor([0]),
        ref_logprobs=tensor([[0.0, -1.0, -1.0]]),
        values=tensor([[0.0, 0.0, 0.0]]),
        returns=tensor([[0.0, 2.0, 1.0]]),
    )
    return scores, tensor([[5.0, 1.0, 0.1]]), batch


def test_terms_are_signed_and_weighted() -> None:
    terms = {name: term[0, 1:] for name, term in policy_loss(*by_hand(), ALL_TERMS).items()}
    expected = {
        "policy": tensor([-2.4, 0.8]),
        "value": tensor([0.3 * 0.5 * 1.8**2, 0.3 * 0.5 * 0.9**2]),
        "entropy": tensor([-0.02 * 0.6, -0.02 * 0.4]),
        "kl": tensor([0.05 * 0.5 * log(1.5) ** 2, 0.05 * 0.5 * log(0.5) ** 2]),
    }
    assert_close(terms, expected)


def test_the_whole_kl_stands_in_place_of_its_estimate() -> None:
    scores, values, batch = by_hand()
    settings = replace(ALL_TERMS, full_kl=True)
    whole = replace(scores, full_kl=tensor([[9.0, 0.2, 0.6]]))
    assert_close(policy_loss(whole, values, batch, settings)["kl"][0, 1:], tensor([0.05 * 0.2, 0.05 * 0.6]))
    assert_close(policy_statistics(whole, values, batch, settings)["full_kl"][0, 1:], tensor([0.2, 0.6]))
    with pytest.raises(AssertionError, match="distributions"):
        policy_loss(scores, values, batch, settings)


@pytest.mark.parametrize("kl", [k2, k3])
def test_terms_pull_as_they_cost(kl: Estimator) -> None:
    """A value held by its clip has no slope; k2 has the log-ratio, k3 one less the ratio of the other to the policy."""
    given, at, batch = by_hand()
    assert given.entropy is not None
    leaves = [each.clone().requires_grad_() for each in (given.logprobs, given.entropy, at)]
    logprobs, entropy, values = leaves
    settings = replace(ALL_TERMS, old_kl_coef=0.4)
    terms = policy_loss(TokenScores(logprobs, entropy), values, batch, settings, kl=kl)

    def slope(name: str, leaf: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(terms[name][0, 1:].sum(), leaf, retain_graph=True)
        return found[0, 1:]

    assert_close(slope("value", values), tensor([0.0, 0.3 * (0.1 - 1.0)]))
    assert_close(slope("entropy", entropy), tensor([-0.02, -0.02]))
    by_log_ratio, by_ratio = tensor([log(1.5), log(0.5)]), tensor([1 - 1 / 1.5, 1 - 1 / 0.5])
    assert_close(slope("kl", logprobs), 0.05 * (by_log_ratio if kl is k2 else by_ratio))
    assert_close(slope("old_kl", logprobs), 0.4 * tensor([1.5 - 1, 0.5 - 1]))


def test_statistics_by_hand() -> None:
    watched = {name: value[0, 1:] for name, value in policy_statistics(*by_hand(), ALL_TERMS).items()}
    expected = {
        "ratio": tensor([1.5, 0.5]),
        "kl_update": tensor([0.5 - log(1.5), -0.5 - log(0.5)]),  # ratio - 1 - log ratio
        "value_clipped": tensor([1.0, 0.0]),
        "entropy": tensor([0.6, 0.4]),
    }
    assert_close(watched, expected)


@pytest.mark.parametrize(
    ("ratio", "advantage", "held"),
    [(1.5, 1.0, 1.0), (0.5, 1.0, 0.0), (1.5, -1.0, 0.0), (0.5, -1.0, 1.0), (1.1, 1.0, 0.0), (1.5, 0.0, 0.0)],
)
def test_what_the_clip_holds_back_by_hand(ratio: float, advantage: float, held: float) -> None:
    """A good token above 1.2, a bad one below 0.8; no others, and none that has nothing to gain."""
    log_ratio, advantages = tensor([[log(ratio)]], requires_grad=True), tensor([[advantage]])
    term = clipped_surrogate(log_ratio, advantages, clip_low=0.2, clip_high=0.2)
    assert_close(held_back(term, log_ratio, advantages), tensor([[held]]))


def test_optional_terms_need_what_they_are_made_of() -> None:
    scores, values, batch = by_hand()
    bare = replace(batch, values=None, returns=None, ref_logprobs=None)
    assert set(policy_loss(TokenScores(scores.logprobs), None, bare, PolicyGradientSettings())) == {"policy"}
    with pytest.raises(AssertionError, match="value model"):
        policy_loss(scores, None, batch, PolicyGradientSettings())
    with pytest.raises(AssertionError, match="entropy"):
        policy_loss(TokenScores(scores.logprobs), values, batch, ALL_TERMS)
    with pytest.raises(AssertionError, match="reference"):
        policy_loss(scores, None, bare, ALL_TERMS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip_low", 1.2),
        ("gamma", -0.1),
        ("gamma", 1.01),
        ("lam", 1.01),
        ("value_clip", -1.0),
        ("clip_high", -0.2),
    ],
)
def test_a_setting_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"settings\.{name}={value}"):
        PolicyGradientSettings(**{name: value})  # type: ignore[arg-type]


# --- identities, on a small model of embedding, output table and value head


class Problem:
    """A model with random weights, and experience of five answers of unequal length."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.embedding, self.output, self.value = (
            self.random(*shape).requires_grad_() for shape in ((VOCABULARY, 4), (VOCABULARY, 4), (4,))
        )
        self.weights = [self.embedding, self.output, self.value]
        rows = 5
        tokens = torch.randint(0, VOCABULARY, (rows, WIDTH), generator=self.generator)
        prompt = torch.randint(1, 3, (rows, 1), generator=self.generator)
        end = prompt + torch.randint(1, 4, (rows, 1), generator=self.generator)
        place = torch.arange(WIDTH)
        bare = self.random(rows, WIDTH) * 0
        self.experience = Experience(
            tokens=tokens,
            attention_mask=place < end,
            response_mask=(prompt <= place) & (place < end),
            engine_logprobs=bare,
            old_logprobs=bare,
            advantages=self.random(rows, WIDTH),
            group=tensor([0, 0, 1, 1, 1]),
            ref_logprobs=self.random(rows, WIDTH),
            values=self.random(rows, WIDTH),
            returns=self.random(rows, WIDTH),
        )
        now, _ = self.scores(self.experience)
        self.experience = replace(self.experience, old_logprobs=now.logprobs.detach() + 0.3 * self.random(rows, WIDTH))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def scores(self, batch: Experience) -> tuple[TokenScores, Tensor]:
        hidden = self.embedding[batch.tokens.roll(1, -1)]
        logprobs, entropy = token_logprobs(
            hidden.flatten(0, 1), self.output, batch.tokens.flatten(), chunk=4, with_entropy=True
        )
        assert entropy is not None
        shape = batch.tokens.shape
        return TokenScores(logprobs.view(shape), entropy.view(shape)), hidden @ self.value

    def gradient(self, pieces: Sequence[Experience], totals: Totals, weigh: Weigh = token_mean) -> Sequence[Tensor]:
        """Of an update learnt in these pieces, one backward for each as the loop does."""
        for weight in self.weights:
            weight.grad = None
        for piece in pieces:
            terms = policy_loss(*self.scores(piece), piece, ALL_TERMS)
            sum(aggregate(term, piece.response_mask, totals, weigh) for term in terms.values()).backward()  # type: ignore[union-attr]
        return [weight.grad for weight in self.weights if weight.grad is not None]


@given(seeds, st.lists(st.integers(0, 4), max_size=4), weighings)
def test_cutting_the_batch_changes_nothing(seed: int, cuts: list[int], weigh: Weigh) -> None:
    problem = Problem(seed)
    whole = problem.experience
    totals = count([whole.response_mask], max_length=4)
    bounds = [0, *sorted(set(cuts) - {0}), 5]
    pieces = [select(whole, torch.arange(a, b)) for a, b in pairwise(bounds)]
    assert totals == count([piece.response_mask for piece in pieces], max_length=4)
    expected = problem.gradient([whole], totals, weigh)
    assert len(expected) == 3
    assert_close(problem.gradient(pieces, totals, weigh), expected, rtol=0, atol=1e-12)


@given(seeds, weighings)
def test_the_order_of_answers_changes_nothing(seed: int, weigh: Weigh) -> None:
    problem = Problem(seed)
    totals = count([problem.experience.response_mask], max_length=4)
    shuffled = select(problem.experience, torch.randperm(5, generator=problem.generator))
    expected = problem.gradient([problem.experience], totals, weigh)
    assert_close(problem.gradient([shuffled], totals, weigh), expected, rtol=0, atol=1e-12)


@given(seeds, weighings, st.integers(0, 2), st.integers(0, 3), st.sampled_from([0.0, -5.0, 1e3, -1e3]))
def test_padding_changes_nothing(seed: int, weigh: Weigh, left: int, right: int, garbage: float) -> None:
    """More of it, on either side, with anything in it."""
    problem = Problem(seed)
    whole = problem.experience
    padded = {}
    for name, value in vars(whole).items():
        if isinstance(value, Tensor) and value.dim() == 2:
            filler = garbage if value.is_floating_point() else 0
            padded[name] = pad(value, (left, right), value=filler)
    totals = count([whole.response_mask], max_length=4)
    expected = problem.gradient([whole], totals, weigh)
    assert_close(problem.gradient([replace(whole, **padded)], totals, weigh), expected, rtol=0, atol=1e-12)


@given(seeds, weighings)
def test_first_step_equals_reinforce(seed: int, weigh: Weigh) -> None:
    """At ratio 1 the clip is inactive: the policy's gradient is that of -advantage x log-probability."""
    problem = Problem(seed)
    now, _ = problem.scores(problem.experience)
    batch = replace(problem.experience, old_logprobs=now.logprobs.detach(), values=None, returns=None)
    totals = count([batch.response_mask], max_length=4)

    def gradient(per_token: Tensor) -> Sequence[Tensor]:
        loss = aggregate(per_token, batch.response_mask, totals, weigh)
        return torch.autograd.grad(loss, [problem.embedding, problem.output], retain_graph=True)

    ppo = policy_loss(now, None, batch, PolicyGradientSettings())["policy"]
    assert_close(gradient(ppo), gradient(-batch.advantages * now.logprobs), rtol=0, atol=1e-12)


# --- averages


LOSSES = tensor([[1.0, 2.0, 3.0], [10.0, 99.0, 99.0], [99.0, 99.0, 99.0]])
COUNTED = tensor([[True, True, True], [True, False, False], [False, False, False]])


@pytest.mark.parametrize(
    ("weigh", "expected"),
    [
        (token_mean, 16 / 4),
        (sequence_mean, (2 + 10) / 2),  # the third answer has nothing that counts, and is no answer
        (constant_length, 16 / (2 * 5)),
    ],
)
def test_averages_by_hand(weigh: Callable[..., Tensor], expected: float) -> None:
    totals = count([COUNTED], max_length=5)
    assert totals == Totals(tokens=4, sequences=2, max_length=5)
    assert aggregate(LOSSES, COUNTED, totals, weigh).item() == pytest.approx(expected)


@pytest.mark.parametrize("weigh", [token_mean, sequence_mean, constant_length])
def test_what_does_not_count_may_be_anything(weigh: Weigh) -> None:
    losses = LOSSES.masked_fill(~COUNTED, float("nan")).requires_grad_()
    totals = count([COUNTED], max_length=5)
    share = aggregate(losses, COUNTED, totals, weigh)
    share.backward()
    assert share.item() == pytest.approx(aggregate(LOSSES, COUNTED, totals, weigh).item())
    assert losses.grad is not None and torch.equal(losses.grad != 0, COUNTED)


@pytest.mark.parametrize("weigh", [token_mean, sequence_mean, constant_length])
def test_an_update_in_which_nothing_counts_is_0(weigh: Weigh) -> None:
    nothing = torch.zeros_like(COUNTED)
    losses = LOSSES.clone().requires_grad_()
    share = aggregate(losses, nothing, count([nothing]), weigh)
    share.backward()
    assert share.item() == 0.0
    assert losses.grad is not None and (losses.grad == 0).all()

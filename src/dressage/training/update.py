"""One optimizer step: cut into micro-batches, score, a loss for every token, its share of the whole, backward, step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dressage.algorithms.aggregate import Totals, aggregate, aggregate_pairs, count, rankings_total
from dressage.algorithms.catalog import Algorithm
from dressage.algorithms.policy_gradient import PolicyGradientSettings, held_back, policy_statistics
from dressage.algorithms.preference import KtoSettings, log_ratio, rating_statistics, summed_over_answers
from dressage.algorithms.reward_modeling import (
    RankingSettings,
    best_answers,
    learnt_from,
    ranking_pairs,
    ranking_statistics,
)
from dressage.batches import (
    Batch,
    Experience,
    Mask,
    PerSequence,
    PerToken,
    PreferenceBatch,
    RatingBatch,
    Samples,
    SupervisedBatch,
    TokenScores,
    select,
    to_device,
    trimmed,
)
from dressage.data.order import length_sorted_chunks
from dressage.models.reading import reads_trees
from dressage.models.roles import Role
from dressage.models.scoring import score_sequences, score_tokens, score_values
from dressage.tensors import shared_beginning
from dressage.training.optimizer import Optimizer
from dressage.training.trust_region import bounded_step

AnyBatch = SupervisedBatch | PreferenceBatch | RatingBatch | Experience
Sums = dict[str, float]
"""Measures of one update by metric name: means over all it learnt from. "tokens": how many went through the model."""


@dataclass(kw_only=True)
class Learner:
    """Who learns, by which algorithm, in what pieces."""

    algorithm: Algorithm
    policy: Role
    """The model that is trained: a policy, or a reward model."""
    value: Role | None = None
    """A critic with weights of its own; none: the policy's head, if it has one."""
    reference: Role | None = None
    """From whose whole distributions the policy's KL is taken; none: it is estimated from sampled tokens."""
    optimizer: Optimizer
    rates: Callable[[int], dict[str, float]]
    """Learning rate of each optimizer group at optimizer step k; a group left out rests."""
    micro_batch_tokens: int
    temperature: float = 1.0
    max_length: int = 1
    """Longest answer the engine was allowed, in tokens."""
    updates: int = 0
    """Optimizer steps so far."""
    first: dict[str, Tensor] = field(init=False)
    """The weights to begin from again, for a row that does."""

    def __post_init__(self) -> None:
        weights = self.optimizer.weights() if self.algorithm.afresh else {}
        self.first = {name: weight.clone() for name, weight in weights.items()}

    def restart(self) -> None:
        """Back to the first weights, with nothing remembered of the way."""
        self.optimizer.restore(self.first, {})

    def update(self, batches: Sequence[AnyBatch]) -> Sums:
        """Learns from these batches in one step; or, STOPPED being 1, not: the policy has gone too far already."""
        with self.policy.backbone.dropout():
            sums = _added(piece for batch in batches for piece in self._learn(batch))
        rates = self.rates(self.updates)
        sums["learning_rate"] = next(iter(rates.values()), 0.0)
        self.updates += 1
        settings = self.algorithm.settings
        if isinstance(settings, PolicyGradientSettings):
            if settings.stop_kl is not None:
                sums[STOPPED] = float(sums["kl/update_approx"] > settings.stop_kl)
                if sums[STOPPED]:
                    self.optimizer.step({})
                    return sums
            if settings.max_kl is not None and rates.pop("policy", None) is not None:
                sums |= self._bounded_step(batches, settings.max_kl, settings.curvature_share or 1.0)
        return {"gradient/norm": self.optimizer.step(rates)} | sums

    def measure(self, batch: SupervisedBatch | PreferenceBatch | RatingBatch) -> Sums:
        """The same measures of a batch without learning from it."""
        with torch.no_grad():
            return _added(self._learn(batch))

    def _learn(self, batch: AnyBatch) -> Iterator[Sums]:
        """Backward through every micro-batch; its share of each measure."""
        if isinstance(batch, SupervisedBatch):
            totals = count([batch.loss_mask])
            yield from (self._supervised(piece, totals) for piece in self._pieces(batch))
        elif isinstance(batch, PreferenceBatch):
            better, _ = ranking_pairs(batch.group, batch.rank)
            totals = rankings_total([learnt_from(batch, self.algorithm.settings)])
            ordered = rankings_total([batch.group[better]])
            yield from (self._preference(piece, totals, ordered) for piece in self._pieces(batch, by=batch.group))
            if isinstance(self.algorithm.settings, RankingSettings) and self.algorithm.settings.lm_coef:
                yield from self._learn(best_answers(batch))
        elif isinstance(batch, RatingBatch):
            kl = self._kl_of_unrelated(select(batch, batch.rating == 0))
            batch = select(replace(batch, kl=kl.expand(len(batch.rating))), batch.rating != 0)
            sides = {side: count([batch.rating == side]) for side in (1, -1)}
            yield {"kl/unrelated_per_answer": kl.item()}
            yield from (self._rating(piece, count([batch.rating != 0]), sides) for piece in self._pieces(batch))
        else:
            totals = count([batch.response_mask], self.max_length)
            yield from (self._experience(piece, totals) for piece in self._pieces(batch))

    def _supervised(self, batch: SupervisedBatch, totals: Totals) -> Sums:
        # Nobody sampled the demonstrations that stand beside Experience.
        temperature = 1.0 if Experience in self.algorithm.losses else self.temperature
        scores = score_tokens(self.policy, batch.tokens, batch.attention_mask, batch.loss_mask, temperature=temperature)
        terms = self.algorithm.losses[SupervisedBatch](scores, batch, self.algorithm.settings)
        shares = {f"loss/{name}": aggregate(term, batch.loss_mask, totals) for name, term in terms.items()}
        return _backward(shares) | {"tokens": _size(batch.attention_mask)}

    def _preference(self, batch: PreferenceBatch, totals: Totals, ordered: Totals) -> Sums:
        """`totals` of all that teaches, `ordered` of the pairs with a better and a worse answer."""
        better, worse = ranking_pairs(batch.group, batch.rank)
        watched = {}
        if self.algorithm.implicit_reward is None:
            rewards = score_sequences(self.policy, batch.tokens, batch.attention_mask, batch.last)
        else:
            logprobs = self._answer_logprobs(batch)
            rewards = self.algorithm.implicit_reward(logprobs, batch, self.algorithm.settings)
            watched = {CHOSEN: logprobs.detach()[better], REJECTED: logprobs.detach()[worse]}
        terms = self.algorithm.losses[PreferenceBatch](rewards, batch, self.algorithm.settings)
        prompt = learnt_from(batch, self.algorithm.settings)
        shares = {f"loss/{name}": aggregate_pairs(term, prompt, totals) for name, term in terms.items()}
        watched |= ranking_statistics(rewards.detach(), batch)
        pairs = batch.group[better]
        measures = {name: float(aggregate_pairs(value, pairs, ordered)) for name, value in watched.items()}
        return _backward(shares) | measures | {"tokens": _size(batch.attention_mask)}

    def _rating(self, batch: RatingBatch, totals: Totals, sides: Mapping[int, Totals]) -> Sums:
        """`totals` of all answers, `sides` of the good (1) and the bad (-1)."""
        settings, everyone = self.algorithm.settings, batch.rating != 0
        assert isinstance(settings, KtoSettings) and self.algorithm.implicit_reward is not None
        logprobs = self._answer_logprobs(batch)
        rewards = self.algorithm.implicit_reward(logprobs, batch, settings)
        terms = self.algorithm.losses[RatingBatch](rewards, batch, settings)
        shares = {f"loss/{name}": aggregate(term, everyone, totals) for name, term in terms.items()}
        watched = rating_statistics(rewards.detach(), batch, settings)
        measures = {name: float(aggregate(value, everyone, totals)) for name, value in watched.items()}
        if all(side.tokens for side in sides.values()):

            def mean(value: PerSequence, side: int) -> float:
                return float(aggregate(value.detach(), batch.rating == side, sides[side]))

            measures |= {CHOSEN: mean(logprobs, 1), REJECTED: mean(logprobs, -1)}
            measures["margin"] = mean(rewards, 1) - mean(rewards, -1)
        return _backward(shares) | measures | {"tokens": _size(batch.attention_mask)}

    @torch.no_grad()
    def _kl_of_unrelated(self, batch: RatingBatch) -> Tensor:
        """Mean log-ratio to the reference of answers to other prompts: an estimate of the KL, nats an answer."""
        totals = count([batch.rating == 0])
        shares = [
            aggregate(log_ratio(self._answer_logprobs(piece), piece), piece.rating == 0, totals)
            for piece in self._pieces(batch)
        ]
        return torch.stack(shares).sum().cpu()

    def _answer_logprobs(self, batch: PreferenceBatch | RatingBatch) -> PerSequence:
        scores = score_tokens(
            self.policy, batch.tokens, batch.attention_mask, batch.response_mask, temperature=self.temperature
        )
        return summed_over_answers(scores.logprobs, batch.response_mask)

    def _experience(self, batch: Experience, totals: Totals) -> Sums:
        settings = self.algorithm.settings
        assert isinstance(settings, PolicyGradientSettings)
        mask = batch.response_mask
        scores = score_tokens(
            self.policy,
            batch.tokens,
            batch.attention_mask,
            mask,
            temperature=self.temperature,
            entropy=True,
            reference=self.reference,
        )
        loss = self.algorithm.losses[Experience]
        values = scores.values if self.value is None else batch.values
        terms = loss(scores, values, batch, settings)
        if self.value is not None:
            # One with weights of its own learns after the policy's backward pass, which lets go of what it kept.
            del terms["value"]
        held = held_back(terms["policy"], scores.logprobs, batch.advantages) if scores.logprobs.requires_grad else None
        losses = self._learn_from(terms, mask, totals)
        if self.value is not None:
            values = score_values(self.value, batch.tokens, batch.attention_mask, mask)
            of_value = {"value": loss(_detached(scores), values, batch, settings)["value"]}
            losses = _added([losses, self._learn_from(of_value, mask, totals)])
        watched = policy_statistics(_detached(scores), None if values is None else values.detach(), batch, settings)
        measures = {
            _MEASURES[name]: float(aggregate(value, mask, totals))
            for name, value in watched.items()
            if name in _MEASURES
        }
        if held is not None:
            measures["clip/share"] = float(aggregate(held, mask, totals))
        # Before a round's first step the ratio is 1, unless sampling and learning disagree.
        measures[WORST] = float((watched["ratio"] - 1).abs().masked_fill(~mask, 0.0).amax())
        return losses | measures | {"tokens": _size(batch.attention_mask)}

    def _learn_from(self, terms: Mapping[str, PerToken], mask: Mask, totals: Totals) -> Sums:
        weigh = self.algorithm.weigh
        return _backward({f"loss/{name}": aggregate(term, mask, totals, weigh) for name, term in terms.items()})

    def _bounded_step(self, batches: Sequence[AnyBatch], max_kl: float, curvature_share: float) -> Sums:
        """TRPO's step of the policy in the optimizer's place."""

        def answers(share: float = 1.0) -> Iterator[tuple[Experience, Totals]]:
            for batch in batches:
                if isinstance(batch, Experience):
                    rows = len(batch.tokens)
                    # Evenly over the batch, where answers to one prompt stand together.
                    batch = select(batch, torch.linspace(0, rows - 1, math.ceil(share * rows)).round().long())
                    totals = count([batch.response_mask])
                    yield from ((piece, totals) for piece in self._pieces(batch))

        @torch.no_grad()
        def loss() -> float:
            sums = _added(piece for batch in batches for piece in self._learn(batch))
            # The critic has weights of its own.
            return sums["loss"] - sums.get("loss/value", 0.0)

        return bounded_step(
            self.policy,
            answers,
            lambda: answers(curvature_share),
            loss,
            temperature=self.temperature,
            max_kl=max_kl,
        )

    def _pieces(self, batch: Batch, by: Tensor | None = None) -> Iterator[Batch]:
        """Micro-batches of at most `micro_batch_tokens`, rows of like length together, groups whole."""
        answers = batch if isinstance(batch, Experience) and reads_trees(self.policy.backbone) else None
        for rows in pieces(batch.attention_mask, self.micro_batch_tokens, by, answers):
            yield trimmed(to_device(select(batch, rows), self.policy.backbone.device))


CHOSEN, REJECTED = "logprobs/chosen", "logprobs/rejected"
WORST = "ratio/first_max_error"
STOPPED = "stopped"
_MEASURES = {
    "value_clipped": "clip/value_share",
    "kl_update": "kl/update_approx",
    "entropy": "entropy/per_token",
    "full_kl": "kl/full_per_token",
}


def _added(pieces: Iterable[Sums]) -> Sums:
    """Shares add up to means; of errors the largest counts."""
    sums: Sums = defaultdict(float)
    for piece in pieces:
        for name, value in piece.items():
            sums[name] = max(sums[name], value) if name == WORST else sums[name] + value
    return dict(sums)


def pieces(
    attention_mask: Mask, max_tokens: int, by: Tensor | None = None, answers: Experience | Samples | None = None
) -> Iterator[Tensor]:
    """Row indices of micro-batches of at most so many padded tokens.

    Rows with equal `by` stay together. `answers`, whose mask it is, are read as a tree: those to one prompt stay
    together as far as the budget goes, and what they all begin with counts once.
    """
    lengths, kinds = attention_mask.sum(-1).tolist(), None if by is None else by.tolist()
    beside = shared = None
    if answers is not None:
        beside = answers.group.tolist()
        shared = shared_beginning(answers.tokens, attention_mask, answers.group).tolist()
    for rows in length_sorted_chunks(lengths, max_tokens, kinds, beside, shared):
        yield torch.tensor(rows)


def _backward(shares: dict[str, Tensor]) -> Sums:
    """Gradients of the summed terms, unless none is being recorded; the terms as numbers."""
    loss = torch.stack([share for share in shares.values()]).sum()
    if loss.requires_grad:
        loss.backward()
    return {name: share.item() for name, share in shares.items()} | {"loss": loss.item()}


def _detached(scores: TokenScores) -> TokenScores:
    def still(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach()

    return TokenScores(scores.logprobs.detach(), entropy=still(scores.entropy), full_kl=still(scores.full_kl))


def _size(attention_mask: Mask) -> float:
    return float(attention_mask.sum())

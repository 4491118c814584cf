"""From rollouts to experience: rewards of tokens, returns, cut answers and the report, by hand; minibatches."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor
from torch.testing import assert_close

from dressage.algorithms.advantages import gae, group_centered, of_answers
from dressage.batches import Experience, Samples
from dressage.experience.buffer import minibatches
from dressage.experience.build import ExperienceReport, build_experience, tensors_of
from dressage.schema import Completion, Finish, Prompt, Rollout

END = 2
PLAIN: dict[str, Any] = {"kl_coef": 0.1, "gamma": 1.0, "lam": 0.95, "whiten_advantages": False}


def rollout(prompt: tuple[int, ...], answer: tuple[int, ...], finish: Finish, group: int) -> Rollout:
    logprobs = tuple(-0.5 - 0.1 * k for k in range(len(answer)))
    return Rollout(replace(Prompt.of("?"), tokens=prompt), Completion(answer, logprobs, finish), "!", group)


ROLLOUTS = [
    rollout((5, 8), (9, 1, END), "stop", group=3),
    rollout((7,), (4, 6), "length", group=3),  # cut: no end mark
    rollout((END, 5, 8), (END,), "stop", group=8),  # the pad token is a real token of prompt and answer
]


def case() -> tuple[Samples, Tensor, Tensor, Tensor, Tensor]:
    """The rollouts with scores, log-probs of policy and reference, and values; anything outside the answers."""
    samples = tensors_of(ROLLOUTS, pad_token=END)
    old = torch.full((3, 5), 77.0)
    ref = torch.full((3, 5), -55.0)
    values = torch.full((3, 5), 33.0)
    for row, (place, old_row, ref_row, value_row) in enumerate(
        [
            ([2, 3, 4], [-0.5, -0.6, -0.7], [-1.5, -0.6, -0.2], [0.1, 0.2, 0.3]),
            ([1, 2], [-0.5, -0.6], [-0.5, -1.6], [0.4, -0.4]),
            ([3], [-0.5], [-0.25], [0.0]),
        ]
    ):
        old[row, place], ref[row, place], values[row, place] = map(tensor, (old_row, ref_row, value_row))
    return samples, tensor([1.0, -2.0, 8.0]), old, ref, values


def build(given: tuple[Any, ...] | None = None, **changes: Any) -> tuple[Experience, ExperienceReport]:
    return build_experience(*(given or case()), **(PLAIN | changes))


def per_token_rewards(given: tuple[Any, ...] | None = None, **changes: Any) -> Tensor:
    """What build_experience hands to the estimator of advantages."""
    seen: list[Tensor] = []

    def spy(rewards: Tensor, values: Tensor | None, mask: Tensor, group: Tensor, *, gamma: float, lam: float) -> Tensor:
        seen.append(rewards)
        return torch.zeros_like(rewards)

    build(given, advantage=spy, **changes)
    return seen[0]


def test_rollouts_as_tensors() -> None:
    samples = tensors_of(ROLLOUTS, pad_token=END)
    assert samples.tokens.tolist() == [[5, 8, 9, 1, 2], [7, 4, 6, 2, 2], [2, 5, 8, 2, 2]]
    assert samples.attention_mask.long().tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert samples.response_mask.long().tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]
    expected = tensor([[0, 0, -0.5, -0.6, -0.7], [0, -0.5, -0.6, 0, 0], [0, 0, 0, -0.5, 0]])
    assert_close(samples.engine_logprobs, expected)
    assert samples.group.tolist() == [3, 3, 8]
    assert samples.finished.tolist() == [True, False, True]


def test_rewards_of_tokens_by_hand() -> None:
    """-0.1 (old - reference) everywhere, the score on the answer's last token as well."""
    expected = [
        [0, 0, -0.1 * 1.0, -0.1 * 0.0, -0.1 * -0.5 + 1.0],
        [0, -0.1 * 0.0, -0.1 * 1.0 - 2.0, 0, 0],
        [0, 0, 0, -0.1 * -0.25 + 8.0, 0],
    ]
    assert_close(per_token_rewards(), tensor(expected))


def test_a_kl_over_the_vocabulary_is_priced_in_its_place_and_only_in_the_answer() -> None:
    kl = torch.full((3, 5), 44.0)
    kl[0, 2:], kl[1, 1:3], kl[2, 3] = tensor([0.5, 0.25, 1.0]), tensor([2.0, 0.0]), 3.0
    expected = [[0, 0, -0.05, -0.025, -0.1 + 1.0], [0, -0.2, -2.0, 0, 0], [0, 0, 0, -0.3 + 8.0, 0]]
    assert_close(per_token_rewards(token_kl=kl), tensor(expected))


def test_the_score_falls_on_the_last_token_the_policy_chose() -> None:
    """Not on the last of the text: here a tool wrote on after the answers."""
    samples, *rest = case()
    written_on = replace(samples, attention_mask=torch.ones_like(samples.attention_mask))
    assert_close(per_token_rewards(given=(written_on, *rest)), per_token_rewards())


def test_the_score_is_clipped_before_the_penalty() -> None:
    rewards = per_token_rewards(kl_coef=0.0, score_clip=1.5, truncated="penalty", truncation_penalty=1.0)
    assert rewards.sum(-1).tolist() == [1.0, -1.5 - 1.0, 1.5]


def test_returns_are_of_the_advantages_before_whitening() -> None:
    samples, _, _, _, values = case()
    plain, _ = build()
    white, _ = build(whiten_advantages=True)
    counted = samples.response_mask
    assert plain.returns is not None and white.returns is not None
    rewards = per_token_rewards()
    assert_close(plain.advantages, gae(rewards, values, counted, gamma=1.0, lam=0.95))
    assert_close(plain.returns[counted], (plain.advantages + values)[counted])
    assert_close(white.returns, plain.returns)
    assert white.advantages[counted].mean().item() == pytest.approx(0.0, abs=1e-6)
    assert white.advantages[counted].std(correction=0).item() == pytest.approx(1.0, abs=1e-5)


def test_what_stands_outside_the_answers_is_0() -> None:
    experience, _ = build(whiten_advantages=True)
    outside = ~experience.response_mask
    for field in ("old_logprobs", "ref_logprobs", "values", "returns", "advantages", "engine_logprobs"):
        assert (getattr(experience, field)[outside] == 0).all(), field


def test_cut_answers_can_be_left_out_of_the_loss() -> None:
    masked, report = build(truncated="mask", whiten_advantages=True)
    assert masked.response_mask.any(-1).tolist() == [True, False, True]
    assert (masked.advantages[1] == 0).all()
    assert masked.advantages[masked.response_mask].mean().item() == pytest.approx(0.0, abs=1e-6)
    assert report.kl_per_answer == pytest.approx(build()[1].kl_per_answer)  # but not out of the report
    kept, _ = build(truncated="keep")
    assert kept.response_mask.any(-1).all()


def test_a_round_of_cut_answers_only_teaches_nothing() -> None:
    samples, *rest = case()
    none_finished = replace(samples, finished=torch.zeros(3, dtype=torch.bool))
    experience, report = build_experience(none_finished, *rest, **PLAIN | {"truncated": "mask"})
    assert not experience.response_mask.any() and (experience.advantages == 0).all()
    assert report.finished_share == 0.0 and report.explained_variance == 0.0


def test_report_by_hand() -> None:
    _, report = build(score_clip=5.0, truncated="penalty", truncation_penalty=0.5)
    kl = [1.0 + 0.0 - 0.5, 0.0 + 1.0, -0.25]
    assert report.kl_per_answer == pytest.approx(sum(kl) / 3, abs=1e-6)
    assert report.score_mean == pytest.approx((1 - 2 + 8) / 3)
    assert report.score_std == pytest.approx(tensor([1.0, -2.0, 8.0]).std(correction=0).item())
    assert report.score_clipped_share == pytest.approx(1 / 3)
    assert report.totals.mean().item() == pytest.approx((1 - 2 - 0.5 + 5 - 0.1 * sum(kl)) / 3, abs=1e-6)
    assert report.finished_share == pytest.approx(2 / 3)
    assert report.mean_tokens == pytest.approx(6 / 3)
    assert report.engine_max_difference == pytest.approx(0.0, abs=1e-6)


def test_the_largest_difference_from_the_engine_is_found() -> None:
    samples, scores, old, *rest = case()
    old[0, 3] -= 0.25
    _, report = build_experience(samples, scores, old, *rest, **PLAIN)
    assert report.engine_max_difference == pytest.approx(0.25, abs=1e-6)


def test_explained_variance_of_a_critic_that_knows_and_one_that_does_not() -> None:
    """With lambda 1 and no KL the returns are the scores: 1 for values that are the scores, 0 for their mean."""
    samples, scores, old, ref, values = case()
    monte_carlo = PLAIN | {"kl_coef": 0.0, "lam": 1.0}
    knows, guesses = values.clone(), values.clone()
    knows[:] = scores[:, None]
    guesses[:] = (3 * 1.0 + 2 * -2.0 + 1 * 8.0) / 6  # over the six tokens
    for given_values, expected in ((knows, 1.0), (guesses, 0.0)):
        _, report = build_experience(samples, scores, old, ref, given_values, **monte_carlo)
        assert report.explained_variance == pytest.approx(expected, abs=1e-6)


def test_without_reference_or_values() -> None:
    samples, scores, old, _, _ = case()
    pair = of_answers(group_centered)
    four = tensors_of([*ROLLOUTS, ROLLOUTS[2]], pad_token=END)
    experience, report = build_experience(
        four,
        tensor([1.0, -2.0, 8.0, 4.0]),
        torch.cat([old, old[2:]]),
        None,
        None,
        **PLAIN | {"kl_coef": 0.0, "advantage": pair},
    )
    assert experience.ref_logprobs is None and experience.values is None and experience.returns is None
    assert [row[mask].tolist() for row, mask in zip(experience.advantages, four.response_mask, strict=True)] == [
        [1.5] * 3,
        [-1.5] * 2,
        [2.0],
        [-2.0],
    ]
    assert report.kl_per_answer == 0.0
    with pytest.raises(AssertionError, match="reference"):
        build_experience(samples, scores, old, None, None, **PLAIN)


@given(st.permutations(range(3)), st.integers(0, 3))
def test_order_and_more_padding_change_nothing(order: list[int], more: int) -> None:
    experience, report = build(whiten_advantages=True)
    samples, scores, old, ref, values = case()

    def moved(value: Tensor) -> Tensor:
        value = value[order]
        return torch.nn.functional.pad(value, (0, more)) if value.dim() == 2 else value

    moved_samples = Samples(**{name: moved(value) for name, value in vars(samples).items()})
    other, other_report = build_experience(
        moved_samples, *map(moved, (scores, old, ref, values)), **PLAIN | {"whiten_advantages": True}
    )
    for name, value in vars(experience).items():
        assert_close(getattr(other, name), moved(value), msg=name)
    assert_close(other_report.totals, report.totals[order])
    told, other_told = ({**vars(one), "totals": 0.0} for one in (report, other_report))
    assert other_told == pytest.approx(told, abs=1e-6)


# --- minibatches


@given(n=st.integers(1, 20), size=st.integers(1, 8), epochs=st.integers(0, 3), seed=st.integers(0, 100))
def test_every_epoch_takes_every_row_once(n: int, size: int, epochs: int, seed: int) -> None:
    rows = list(minibatches(n, size, epochs, seed))
    assert Counter(row for piece in rows for row in piece) == (dict.fromkeys(range(n), epochs) if epochs else {})
    per_epoch = -(-n // size)
    for epoch in range(epochs):
        pieces = rows[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(row for piece in pieces for row in piece) == list(range(n))
        assert [len(piece) for piece in pieces[:-1]] == [size] * (per_epoch - 1)


def test_order_comes_from_the_seed_and_can_be_taken_up_again() -> None:
    whole = list(minibatches(12, 4, 3, seed=5))
    random_state = torch.get_rng_state()
    assert list(islice(minibatches(12, 4, 3, seed=5), 4, None)) == whole[4:]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert list(minibatches(12, 4, 3, seed=6)) != whole
    assert whole[:3] != whole[3:6], "epochs have orders of their own"

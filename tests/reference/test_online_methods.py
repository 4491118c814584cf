"""Each row that samples, by hand: the gradient of one step on answers small enough to work out on paper."""

from __future__ import annotations

import re
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor
from torch.testing import assert_close

from dressage.algorithms.advantages import against_batch, group_centered, of_answers, reward_to_go
from dressage.algorithms.aggregate import aggregate, count
from dressage.algorithms.catalog import ALGORITHMS, Algorithm, algorithm
from dressage.algorithms.page import page
from dressage.algorithms.policy_gradient import (
    PolicyGradientSettings,
    clipped,
    clipped_surrogate,
    held_back,
    likelihood,
    sequence_clipped,
    unclipped,
    weighted_likelihood,
)
from dressage.batches import Experience, Samples, TokenScores
from dressage.errors import ConfigError
from dressage.experience.build import build_experience, earned, unlike
from dressage.recipe import recipes

ONLINE = [name for name, row in ALGORITHMS.items() if row.advantage is not None]
PLAIN = PolicyGradientSettings()

# Two prompts with two answers each, of 2, 1, 1 and 2 tokens, the last of which carry the scores.
MASK = tensor([[True, True], [True, False], [True, False], [True, True]])
SCORES = tensor([1.0, 0.0, 2.0, -2.0])
GROUP = tensor([0, 0, 1, 1])
OLD = tensor([[-0.5, -0.25], [-1.0, 0.0], [-2.0, 0.0], [-0.75, -1.0]])
REF = OLD - tensor([[0.1, 0.0], [0.2, 0.0], [0.0, 0.0], [0.0, -0.3]])
VALUES = tensor([[0.5, 0.75], [0.25, 0.0], [1.0, 0.0], [0.0, -1.0]])


def experience(row: Algorithm, kl_coef: float = 0.0, baseline: Tensor | None = None, **settings: Any) -> Experience:
    """What the row makes of those answers. There is no prompt: the first column stands for its last token."""

    def behind_prompt(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (1, 0))

    counted = behind_prompt(MASK)
    samples = Samples(
        tokens=counted.long(),
        attention_mask=counted | (torch.arange(3) == 0),
        response_mask=counted,
        engine_logprobs=behind_prompt(OLD),
        group=GROUP,
        finished=tensor([True, True, True, False]),
    )
    own = row.with_settings(settings).settings
    assert isinstance(own, PolicyGradientSettings) and row.advantage is not None
    found, _ = build_experience(
        samples,
        SCORES,
        behind_prompt(OLD),
        behind_prompt(REF),
        behind_prompt(VALUES) if "value" in row.roles else None,
        kl_coef=kl_coef,
        gamma=own.gamma,
        lam=own.lam,
        whiten_advantages=own.whiten_advantages,
        advantage=row.advantage,
        baseline=baseline,
    )
    return found


def advantages(name: str, **given: Any) -> list[list[float]]:
    return experience(algorithm(name), **given).advantages[:, 1:].tolist()


def rows(*expected: list[float]) -> list[Any]:
    return [pytest.approx([*each, 0.0][:2], abs=1e-4) for each in expected]


def slope(name: str, batch: Experience, log_ratio: Tensor | None = None, **settings: Any) -> Tensor:
    """d loss / d log-probability [B, T] of one whole update, policy term alone."""
    row = algorithm(name).with_settings({"kl_loss_coef": 0.0, "old_kl_coef": 0.0, "entropy_coef": 0.0} | settings)
    logprobs = (batch.old_logprobs + (0.0 if log_ratio is None else log_ratio)).requires_grad_()
    entropy = torch.zeros_like(logprobs)
    terms = row.losses[Experience](TokenScores(logprobs, entropy), batch.values, batch, row.settings)
    totals = count([batch.response_mask], max_length=4)
    loss = aggregate(terms["policy"], batch.response_mask, totals, row.weigh)
    (found,) = torch.autograd.grad(loss, logprobs)
    return found[:, 1:]


# --- advantages, each row's own


def test_reinforce_centres_what_came_on_the_rounds_tokens() -> None:
    """Of six tokens: 1, 1, 0, 2, -2, -2 came after them, on average 0."""
    assert advantages("reinforce") == rows([1.0, 1.0], [0.0], [2.0], [-2.0, -2.0])
    # Discounted by a half, 0.5, 1, 0, 2, -1, -2: the mean is 1/12.
    found = experience(algorithm("reinforce"), gamma=0.5).advantages[:, 1:].tolist()
    assert found == rows(*([came - 1 / 12 for came in each] for each in ([0.5, 1.0], [0.0], [2.0], [-1.0, -2.0])))


def test_reinforce_pp_whitens_what_came_less_the_kl_to_come() -> None:
    """KL 0.1, 0 | 0.2 | 0 | 0, -0.3 at a price of 1: 0.9, 1, -0.2, 2, -1.7, -1.7 came, on average 0.05."""
    came = tensor([0.9, 1.0, -0.2, 2.0, -1.7, -1.7])
    white = ((came - 0.05) / ((came - 0.05).square().mean()).sqrt()).tolist()
    assert advantages("reinforce_pp", kl_coef=1.0) == rows(white[:2], white[2:3], white[3:4], white[4:])


def test_remax_takes_off_what_the_likeliest_answer_earns() -> None:
    found = advantages("remax", baseline=tensor([0.5, 0.5, -1.0, -1.0]))
    assert found == rows([0.5, 0.5], [-0.5], [3.0], [-1.0, -1.0])
    assert algorithm("remax").greedy_baseline and not algorithm("reinforce").greedy_baseline


def test_rloo_compares_with_the_others() -> None:
    assert advantages("rloo") == rows([1.0, 1.0], [-1.0], [4.0], [-4.0, -4.0])
    # With the whole answers' KL, 0.1, 0.2 | 0, -0.3, in their rewards: 0.9 against -0.2, 2 against -1.7.
    assert advantages("rloo", kl_coef=1.0) == rows([1.1, 1.1], [-1.1], [3.7], [-3.7, -3.7])


def test_groups_are_centred_and_scaled() -> None:
    for name in ("grpo", "dapo", "gspo", "cispo"):
        assert advantages(name) == rows([1.0, 1.0], [-1.0], [1.0], [-1.0, -1.0])
    assert advantages("dr_grpo") == rows([0.5, 0.5], [-0.5], [2.0], [-2.0, -2.0])


def test_an_answer_left_out_of_the_loss_is_still_compared_with() -> None:
    """Scores 3, 1 and -1, the last one's answer cut: +2 and 0 against the mean of all three, not of two and a 0."""
    rewards = tensor([[0.0, 3.0], [1.0, 0.0], [0.0, -1.0]])
    mask = tensor([[True, True], [True, False], [False, False]])
    centred = of_answers(group_centered)(rewards, None, mask, tensor([0, 0, 0]), gamma=1.0, lam=1.0)
    assert centred.tolist() == [[2.0, 2.0], [0.0, 0.0], [0.0, 0.0]]


def test_actor_critic_sees_one_token_ahead_and_a2c_all_that_came() -> None:
    """r + V(next) - V against the sum of rewards - V, on values 0.5, 0.75 | 0.25 | 1 | 0, -1."""
    assert advantages("actor_critic") == rows([0.25, 0.25], [-0.25], [1.0], [-1.0, -1.0])
    assert advantages("a2c") == rows([0.5, 0.25], [-0.25], [1.0], [-2.0, -1.0])
    for name in ("actor_critic", "a2c"):
        returns = experience(algorithm(name)).returns
        assert returns is not None
        came = {"actor_critic": [0.75, 1.0], "a2c": [1.0, 1.0]}[name]
        assert returns[0, 1:].tolist() == pytest.approx(came)


@given(st.integers(0, 1000), st.floats(0.1, 1.0))
def test_estimators_without_critic_by_a_slow_oracle(seed: int, gamma: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(4, 6, generator=generator)
    mask = torch.rand(4, 6, generator=generator) < 0.6
    mask[0, 0] = True
    came = torch.zeros(4, 6)
    for row in range(4):
        chosen = mask[row].nonzero()[:, 0].tolist()
        for number, t in enumerate(chosen):
            came[row, t] = sum(gamma**later * rewards[row, at] for later, at in enumerate(chosen[number:]))
    given = (rewards, None, mask, torch.zeros(4).long())
    assert_close(reward_to_go(*given, gamma=gamma, lam=0.3), came, atol=1e-5, rtol=1e-5)
    centred = torch.where(mask, came - came[mask].mean(), 0.0)
    assert_close(against_batch(*given, gamma=gamma, lam=0.3), centred, atol=1e-5, rtol=1e-5)


# --- surrogates


def per_token(surrogate: Any, ratios: list[list[float]], adv: list[list[float]], mask: Any = None, **s: Any) -> Tensor:
    log_ratio = tensor(ratios).log()
    counted = torch.ones_like(log_ratio, dtype=torch.bool) if mask is None else tensor(mask)
    loss: Tensor = surrogate(log_ratio, tensor(adv), counted, replace(PLAIN, **s))
    return loss


def test_dual_clip_by_hand() -> None:
    """A bad token made five times as likely costs 3 and pulls no more; good tokens and mild ratios are as in PPO."""
    found = per_token(clipped, [[5.0, 2.0, 0.5, 5.0]], [[-1.0, -1.0, -1.0, 1.0]], dual_clip=3.0)
    assert_close(found, tensor([[3.0, 2.0, 0.8, -1.2]]))
    assert_close(per_token(clipped, [[5.0]], [[0.5]], dual_clip=3.0), tensor([[-0.6]]))
    assert_close(per_token(clipped, [[5.0]], [[-2.0]], dual_clip=3.0), tensor([[6.0]]))
    assert_close(per_token(clipped, [[5.0]], [[-1.0]]), tensor([[5.0]]))
    log_ratio = tensor([[log(5.0)]], requires_grad=True)
    term = clipped_surrogate(log_ratio, tensor([[-1.0]]), clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    assert held_back(term, log_ratio, tensor([[-1.0]])).tolist() == [[1.0]]


def test_unclipped_and_likelihood_by_hand() -> None:
    assert_close(per_token(unclipped, [[1.5, 0.5]], [[2.0, -1.0]]), tensor([[-3.0, 0.5]]))
    assert_close(per_token(likelihood, [[exp(1.5), exp(-0.5)]], [[2.0, -1.0]]), tensor([[-3.0, -0.5]]))


def test_cispo_weighs_and_lets_no_token_go() -> None:
    """Ratios 0.01, 2 and 50 weigh 0.01, 2 and 5; each keeps the gradient of its log-probability."""
    row = algorithm("cispo")
    log_ratio = tensor([[0.01, 2.0, 50.0]]).log().requires_grad_()
    adv = tensor([[1.0, -3.0, 1.0]])
    loss = weighted_likelihood(log_ratio, adv, torch.ones(1, 3).bool(), row.settings)  # type: ignore[arg-type]
    (found,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert_close(found, tensor([[-0.01, 6.0, -5.0]]))
    # With a lower bound of 1/2 the rarest one weighs that.
    assert_close(per_token(weighted_likelihood, [[0.01]], [[1.0]], clip_low=0.5), tensor([[-0.5 * log(0.01)]]))


def test_gspo_clips_whole_answers() -> None:
    """Ratios 4 and 1 make an answer's 2, its length's root; padding has no say. All tokens are held back, or none."""
    found = per_token(
        sequence_clipped, [[4.0, 1.0, 9.0]] * 2, [[1.0] * 3, [-1.0] * 3], [[True, True, False]] * 2, clip_high=0.5
    )
    assert_close(found[:, :2], tensor([[-1.5, -1.5], [2.0, 2.0]]))
    log_ratio = tensor([[4.0, 0.5], [1.1, 1.0]]).log().requires_grad_()
    term = sequence_clipped(log_ratio, torch.ones(2, 2), torch.ones(2, 2).bool(), replace(PLAIN, clip_high=0.1))
    assert held_back(term, log_ratio, torch.ones(2, 2)).tolist() == [[1.0, 1.0], [0.0, 0.0]]
    # Inside the clip an answer's gradient is A s / length for each of its tokens, s the ratio of the answer.
    (found,) = torch.autograd.grad(term.sum(), log_ratio)
    assert_close(found[1], torch.full((2,), -(1.1**0.5)))  # 2 tokens x 1/2


@given(st.floats(0.2, 3.0), st.floats(-2.0, 2.0))
def test_gspo_of_one_token_is_ppo(ratio: float, advantage: float) -> None:
    mask = [[True, False]]
    sequence = per_token(sequence_clipped, [[ratio, 7.0]], [[advantage, 0.0]], mask)
    assert_close(sequence[0, 0], per_token(clipped, [[ratio, 7.0]], [[advantage, 0.0]], mask)[0, 0])


# --- gradients of the real rows


@pytest.mark.parametrize("name", ONLINE)
def test_at_the_old_policy_every_row_is_reinforce_with_its_own_advantages_and_weights(name: str) -> None:
    row = algorithm(name)
    batch = experience(row)
    mask = batch.response_mask
    weights = row.weigh(mask, count([mask], max_length=4))
    assert_close(slope(name, batch), -(weights * batch.advantages)[:, 1:], atol=1e-6, rtol=1e-5)


def test_how_tokens_share_the_loss_by_hand() -> None:
    """Advantages 1 on answers of 2, 1, 1, 2 tokens, of which at most 4 were allowed."""
    batch = replace(experience(algorithm("grpo")), advantages=torch.nn.functional.pad(MASK.float(), (1, 0)))
    assert (-slope("grpo", batch)).tolist() == rows([1 / 8, 1 / 8], [1 / 4], [1 / 4], [1 / 8, 1 / 8])
    assert (-slope("dr_grpo", batch)).tolist() == rows([1 / 16, 1 / 16], [1 / 16], [1 / 16], [1 / 16, 1 / 16])
    for name in ("dapo", "cispo", "rloo", "reinforce", "ppo"):
        assert (-slope(name, batch)).tolist() == rows([1 / 6, 1 / 6], [1 / 6], [1 / 6], [1 / 6, 1 / 6])


def test_away_from_the_old_policy_by_hand() -> None:
    """All ratios 1.25: good tokens are past PPO's and GRPO's clip at 1.2, within DAPO's at 1.28; bad ones never are."""
    up = torch.full((4, 3), log(1.25))
    good, bad = (0, 0), (1, 0)
    for name, of_good, of_bad in [
        ("grpo", 0.0, 1.25 / 4),
        ("dapo", -1.25 / 6, 1.25 / 6),
        ("cispo", -1.25 / 6, 1.25 / 6),
        ("gspo", 0.0, 1.25 / 4),
        ("rloo", -1.0 / 6, 1.0 / 6),  # no ratio
    ]:
        found = slope(name, experience(algorithm(name)), up)
        assert found[good].item() == pytest.approx(of_good, abs=1e-6), name
        assert found[bad].item() == pytest.approx(of_bad, abs=1e-6), name
    far = torch.full((4, 3), log(6.0))
    assert slope("cispo", experience(algorithm("cispo")), far)[good].item() == pytest.approx(-5.0 / 6, abs=1e-5)
    trpo = experience(algorithm("trpo"), whiten_advantages=False)
    assert slope("trpo", trpo, far)[good].item() == pytest.approx(-6.0 / 6 * trpo.advantages[0, 1].item(), abs=1e-5)


def test_gspo_sees_the_answer_where_ppo_sees_its_tokens() -> None:
    """Ratios 5/4 and 4/5 make an answer's 1, inside any clip: both tokens get a fourth of A s / length = 1/2."""
    apart = torch.zeros(4, 3)
    apart[0, 1:] = tensor([log(1.25), -log(1.25)])
    assert slope("gspo", experience(algorithm("gspo")), apart)[0].tolist() == pytest.approx([-1 / 8, -1 / 8], abs=1e-5)
    assert slope("grpo", experience(algorithm("grpo")), apart)[0].tolist() == pytest.approx([0.0, -0.8 / 8], abs=1e-5)


def test_logits_gradient_by_hand() -> None:
    """Logits 1, 2, 1, 1, the second token taken, advantage 1: every row climbs along its one-hot less the policy."""
    for name in ONLINE:
        row = algorithm(name).with_settings({"kl_loss_coef": 0.0, "entropy_coef": 0.0})
        logits = tensor([1.0, 2.0, 1.0, 1.0], requires_grad=True)
        logprob = logits.log_softmax(-1)[1].reshape(1, 1)
        yes = tensor([[True]])
        batch = Experience(
            yes.long(), yes, yes, logprob.detach(), logprob.detach(), tensor([[1.0]]), tensor([0]), logprob.detach()
        )
        loss = aggregate(
            row.losses[Experience](TokenScores(logprob, 0 * logprob), None, batch, row.settings)["policy"],
            yes,
            count([yes]),
            row.weigh,
        )
        loss.backward()
        assert logits.grad is not None
        assert (-logits.grad).tolist() == pytest.approx([-0.1749, 0.5246, -0.1749, -0.1749], abs=1e-4), name


def test_the_price_of_leaving_the_old_policy() -> None:
    """old_kl_coef x (ratio - 1 - log ratio); its gradient is the KL's, exactly so on average over the old policy."""
    row = algorithm("ppo_penalty").with_settings({"old_kl_coef": 0.5})
    batch = experience(row)
    scores = TokenScores(batch.old_logprobs + log(1.5))
    terms = row.losses[Experience](scores, batch.values, batch, row.settings)
    assert_close(terms["old_kl"][batch.response_mask], torch.full((6,), 0.5 * (0.5 - log(1.5))))
    assert "old_kl" not in algorithm("ppo").losses[Experience](scores, batch.values, batch, algorithm("ppo").settings)

    old, logits = tensor([0.2, 0.5, 0.3]).double(), tensor([0.1, -0.4, 0.7]).double().requires_grad_()
    new = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((old * (old.log() - new)).sum(), logits, retain_graph=True)
    log_ratio = new - old.log()
    (sampled,) = torch.autograd.grad((old * (log_ratio.expm1() - log_ratio)).sum(), logits)
    assert_close(sampled, exact)


def test_grpo_prices_the_reference_by_k3_and_the_others_by_k2() -> None:
    for name, expected in {"grpo": exp(-0.5) - 1 + 0.5, "dapo": 0.5 * 0.5**2, "ppo": 0.5 * 0.5**2}.items():
        row = algorithm(name).with_settings({"kl_loss_coef": 0.04})
        batch = experience(row)
        assert batch.ref_logprobs is not None
        terms = row.losses[Experience](TokenScores(batch.ref_logprobs + 0.5), batch.values, batch, row.settings)
        assert_close(terms["kl"][batch.response_mask], torch.full((6,), 0.04 * expected))


def test_what_each_row_is() -> None:
    """The table against the papers, where a slip would still learn."""
    critics = {name for name in ONLINE if "value" in ALGORITHMS[name].roles}
    assert critics == {"ppo", "ppo_penalty", "trpo", "a2c", "actor_critic"}
    groups = {name for name in ONLINE if ALGORITHMS[name].fewest_answers > 1}
    assert groups == {"rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo"}
    told = {name: ALGORITHMS[name].settings for name in ONLINE}
    assert {name for name in ONLINE if told[name].kl_loss_coef} == {"grpo"}  # type: ignore[union-attr]
    assert {name for name in ONLINE if told[name].max_kl} == {"trpo"}  # type: ignore[union-attr]
    assert {name for name in ONLINE if told[name].old_kl_coef} == {"ppo_penalty"}  # type: ignore[union-attr]
    assert {name for name in ONLINE if told[name].redraws} == {"dapo"}  # type: ignore[union-attr]
    whitened = {name for name in ONLINE if told[name].whiten_advantages}  # type: ignore[union-attr]
    assert whitened == {"ppo", "ppo_penalty", "trpo", "reinforce_pp"}


def test_the_page_and_the_recipes_show_every_row() -> None:
    written = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    assert written == page(), "write docs/algorithms.md again with `make docs`"
    assert set(re.findall(r"^\| \[`(\w+)`\]", written, re.MULTILINE)) == ALGORITHMS.keys()
    assert {name for name, row in ALGORITHMS.items() if row.samples} <= recipes().keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dual_clip", 1.0),
        ("stop_kl", 0.0),
        ("max_kl", -0.1),
        ("redraws", -1),
        ("redraws", 1.5),
        ("old_kl_coef", -1.0),
        ("curvature_share", 0.0),
        ("curvature_share", 1.5),
    ],
)
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"settings\.{name}={value}"):
        replace(PLAIN, **{name: value})  # type: ignore[arg-type]


def test_only_what_can_be_off_can_be_none() -> None:
    off = replace(PLAIN, value_clip=None, dual_clip=None, stop_kl=None, max_kl=None)
    assert off.value_clip is None
    on = replace(PLAIN, clip_low=1.0, value_clip=0.0, dual_clip=1.1, stop_kl=0.01, max_kl=0.01, gamma=1.0, lam=0.0)
    assert on.dual_clip == 1.1
    with pytest.raises(ConfigError, match=r"settings\.gamma must be set"):
        replace(PLAIN, gamma=None)  # type: ignore[arg-type]


# --- being too long, and being alike


def test_the_soft_penalty_by_hand() -> None:
    """Limit 10, the last 4 tokens cost: nothing up to 6, a quarter of the penalty each, all of it at the limit."""
    length = tensor([1, 6, 7, 8, 10, 10])
    finished = tensor([True, True, True, True, True, False])
    found = earned(
        torch.ones(6), finished, length, truncated="soft", truncation_penalty=2.0, soft_tokens=4, max_length=10
    )
    assert found.tolist() == [1.0, 1.0, 0.5, 0.0, -1.0, -1.0]
    hard = earned(torch.ones(6), finished, length, truncated="penalty", truncation_penalty=2.0)
    assert hard.tolist() == [1.0] * 5 + [-1.0]
    assert earned(tensor([9.0]), finished[:1], length[:1], score_clip=5.0).tolist() == [5.0]


def test_groups_alike_are_found() -> None:
    scores = tensor([0.1, 0.1, 0.1, 0.3, 0.1, 2.0, -1.0])
    group = tensor([4, 4, 4, 7, 7, 9, 9])
    assert unlike(scores, group).tolist() == [False] * 3 + [True] * 4

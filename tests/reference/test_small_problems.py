"""Whole algorithms on problems whose answer is known: one-token language models, in tables.

The probes climb: when one fails and the one before passes, the fault is in what it added. The bandit's optimum under a
price on KL has a closed form, pi*(a) ~ pi_ref(a) exp(r(a) / beta).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, tensor

from dressage.algorithms.aggregate import aggregate, count
from dressage.algorithms.catalog import ALGORITHMS, Algorithm, algorithm
from dressage.algorithms.policy_gradient import PolicyGradientSettings
from dressage.algorithms.trust_region import exact_kl, fisher_product, trust_region_step
from dressage.batches import Experience, TokenScores, select
from dressage.experience.buffer import minibatches
from dressage.experience.build import build_experience, tensors_of
from dressage.schema import Completion, Prompt, Rollout
from dressage.tensors import token_logprobs

Score = Callable[[tuple[int, ...], tuple[int, ...]], float]
"""What an answer to a prompt is worth."""


@dataclass
class Table:
    """A language model whose next token depends on the last one alone: a table of logits and a table of values."""

    states: int
    actions: int
    logits: Tensor = field(init=False)
    values: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.logits = torch.zeros(self.states, self.actions, requires_grad=True)
        self.values = torch.zeros(self.states, requires_grad=True)

    def scores(self, tokens: Tensor) -> tuple[TokenScores, Tensor]:
        """Log-probs and values [B, T]; position t speaks about token t, so state t - 1 is looked up."""
        state, chosen = tokens[:, :-1], tokens[:, 1:].clamp(max=self.actions - 1)
        logprobs, entropy = token_logprobs(
            self.logits[state].flatten(0, 1), torch.eye(self.actions), chosen.flatten(), with_entropy=True
        )
        assert entropy is not None
        first = torch.zeros(len(tokens), 1)
        of_tokens = [torch.cat([first, each.view(state.shape)], 1) for each in (logprobs, entropy)]
        return TokenScores(*of_tokens), torch.cat([first, self.values[state]], 1)

    def with_full_kl(self, scores: TokenScores, tokens: Tensor) -> TokenScores:
        """The same scores with the KL to an even reference, over all actions."""
        logp = torch.log_softmax(self.logits[tokens[:, :-1]], -1)
        kl = (logp.exp() * (logp + math.log(self.actions))).sum(-1)
        return replace(scores, full_kl=torch.cat([torch.zeros(len(tokens), 1), kl], 1))

    def likeliest(self, prompt: tuple[int, ...], length: int) -> tuple[int, ...]:
        """The greedy answer."""
        tokens = list(prompt)
        for _ in range(length):
            tokens.append(int(self.logits[tokens[-1]].argmax()))
        return tuple(tokens[len(prompt) :])

    def answer(self, prompt: tuple[int, ...], length: int, copies: int, generator: torch.Generator) -> list[Rollout]:
        """Answers of so many tokens to one prompt, which share a group: the prompt's last token."""
        tokens = torch.tensor([prompt] * copies)
        logp = torch.log_softmax(self.logits.detach(), -1)
        for _ in range(length):
            drawn = torch.multinomial(logp[tokens[:, -1]].exp(), 1, generator=generator)
            tokens = torch.cat([tokens, drawn], 1)
        answers = tokens[:, len(prompt) :].tolist()
        return [
            Rollout(
                replace(Prompt.of(str(prompt)), tokens=prompt),
                Completion(tuple(answer), (0.0,) * length, "stop"),
                "",
                group=prompt[-1],
            )
            for answer in answers
        ]


def learn(
    row: Algorithm,
    score: Score,
    *,
    prompts: list[tuple[int, ...]],
    actions: int,
    length: int = 1,
    kl_coef: float = 0.0,
    rounds: int = 60,
    copies: int = 64,
    epochs: int = 2,
    pieces: int = 2,
    rate: float = 0.05,
) -> Table:
    """The loop, naked: sample, build, learn. The rate falls to 0, and weights of the last quarter are averaged."""
    settings = row.settings
    assert isinstance(settings, PolicyGradientSettings) and row.advantage is not None
    generator = torch.Generator().manual_seed(1)
    states = max(actions, *(prompt[-1] + 1 for prompt in prompts))
    model, reference, mean = Table(states, actions), Table(states, actions), Table(states, actions)
    optimizer = torch.optim.Adam([model.logits, model.values], lr=rate)
    last = range(rounds - max(rounds // 4, 1), rounds)
    for step in range(rounds):
        left = 1 - step / rounds
        optimizer.param_groups[0]["lr"] = rate * left
        rollouts = [r for prompt in prompts for r in model.answer(prompt, length, copies, generator)]
        samples = tensors_of(rollouts, pad_token=0)
        with torch.no_grad():
            old, values = model.scores(samples.tokens)
            ref, _ = reference.scores(samples.tokens)
        greedy = [score(r.prompt.tokens, model.likeliest(r.prompt.tokens, length)) for r in rollouts]
        experience, _ = build_experience(
            samples,
            tensor([score(r.prompt.tokens, r.completion.tokens) for r in rollouts]),
            old.logprobs,
            ref.logprobs,
            values if "value" in row.roles else None,
            kl_coef=kl_coef,
            gamma=settings.gamma,
            lam=settings.lam,
            whiten_advantages=settings.whiten_advantages,
            advantage=row.advantage,
            baseline=tensor(greedy) if row.greedy_baseline else None,
        )
        for rows in minibatches(len(rollouts), len(rollouts) // pieces, epochs, seed=step):
            batch = select(experience, tensor(rows))
            optimizer.zero_grad()
            loss_of(row, model, batch, length).backward()
            if settings.max_kl is not None:
                bounded_step(row, model, batch, length, settings.max_kl * left**2)
            optimizer.step()
        if step in last:
            with torch.no_grad():
                mean.logits += model.logits / len(last)
                mean.values += model.values / len(last)
    return mean


def loss_of(row: Algorithm, model: Table, batch: Experience, length: int) -> Tensor:
    scores, values = model.scores(batch.tokens)
    scores = model.with_full_kl(scores, batch.tokens)
    terms = row.losses[Experience](scores, values if batch.returns is not None else None, batch, row.settings)
    totals = count([batch.response_mask], max_length=length)
    return torch.stack([aggregate(term, batch.response_mask, totals, row.weigh) for term in terms.values()]).sum()


def bounded_step(row: Algorithm, model: Table, batch: Experience, length: int, max_kl: float) -> None:
    """TRPO's step of the logits; the values are left to the optimizer."""
    assert model.logits.grad is not None
    states = batch.tokens.roll(1, -1)[batch.response_mask]
    before, at_first = model.logits.detach().clone(), loss_of(row, model, batch, length).item()

    def product(vector: Tensor) -> Tensor:
        kl = exact_kl(before[states], model.logits[states]).mean()
        return fisher_product(kl, [model.logits], vector)

    def trial(step: Tensor) -> tuple[float, float]:
        with torch.no_grad():
            model.logits.copy_(before + step.view_as(before))
            kl = exact_kl(before[states], model.logits[states]).mean().item()
            gain = at_first - loss_of(row, model, batch, length).item()
            model.logits.copy_(before)
        return gain, kl

    step = trust_region_step(model.logits.grad.flatten(), product, trial, max_kl=max_kl)
    with torch.no_grad():
        model.logits += step.view_as(before)
    model.logits.grad = None


# The probes are about the value model and the signs, so the value learns freely: whole coefficient, no clip.
PROBE = algorithm("ppo").with_settings({"value_clip": None, "value_coef": 1.0})


def test_probe_1_a_constant_reward_is_foreseen() -> None:
    model = learn(PROBE, lambda prompt, answer: 1.0, prompts=[(0,)], actions=1)
    assert model.values[0].item() == pytest.approx(1.0, abs=0.03)


def test_probe_2_a_reward_that_depends_on_the_prompt_is_foreseen() -> None:
    model = learn(PROBE, lambda prompt, answer: (-1.0, 1.0)[prompt[-1]], prompts=[(0,), (1,)], actions=1)
    assert model.values.tolist() == pytest.approx([-1.0, 1.0], abs=0.03)


def test_probe_3_a_delayed_reward_is_discounted() -> None:
    """State 1 (the prompt) leads to state 0, and that to a reward of 1, one token later: gamma = 0.5 of it."""
    row = PROBE.with_settings({"gamma": 0.5, "lam": 0.9})
    model = learn(row, lambda prompt, answer: 1.0, prompts=[(1,)], actions=1, length=2, rounds=100)
    assert model.values.tolist() == pytest.approx([1.0, 0.5], abs=0.03)


def test_probe_4_the_better_of_two_actions_is_taken() -> None:
    model = learn(PROBE, lambda prompt, answer: (-1.0, 1.0)[answer[0]], prompts=[(0,)], actions=2)
    assert torch.softmax(model.logits[0], -1)[1] > 0.9
    assert model.values[0] > 0.8


def test_probe_5_the_better_action_depends_on_the_prompt() -> None:
    model = learn(
        PROBE, lambda prompt, answer: 1.0 if prompt[-1] == answer[0] else -1.0, prompts=[(0,), (1,)], actions=2
    )
    assert torch.softmax(model.logits, -1).diagonal().min() > 0.9
    assert model.values.min() > 0.8


# --- the ladder for every row that samples: what it teaches the policy

ONLINE = [name for name, row in ALGORITHMS.items() if row.advantage is not None]
ON_POLICY: dict[str, Any] = {"epochs": 1, "pieces": 1}
"""Most rows take one step a round: so they are compared."""


def chances(model: Table) -> Tensor:
    return torch.softmax(model.logits, -1)


@pytest.mark.parametrize("name", ONLINE)
def test_ladder_1_a_constant_reward_teaches_no_action(name: str) -> None:
    model = learn(algorithm(name), lambda prompt, answer: 1.0, prompts=[(0,)], actions=2, **ON_POLICY)
    assert chances(model)[0, 1].item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("name", ONLINE)
def test_ladder_2_a_reward_for_the_prompt_teaches_no_action(name: str) -> None:
    row = algorithm(name)
    model = learn(row, lambda prompt, answer: (-1.0, 1.0)[prompt[-1]], prompts=[(0,), (1,)], actions=2, **ON_POLICY)
    # A baseline for all prompts alike, or none, leaves noise that one for each prompt takes away.
    tolerance = 1e-5 if row.fewest_answers > 1 or row.greedy_baseline else 0.25
    assert chances(model)[:, 1].tolist() == pytest.approx([0.5, 0.5], abs=tolerance)


@pytest.mark.parametrize("name", ONLINE)
def test_ladder_3_a_reward_at_the_end_reaches_the_first_token(name: str) -> None:
    """From state 2 to state 0 or 1, then anything: the end is worth 1 if the way led through 1."""
    row = algorithm(name)
    model = learn(
        row, lambda prompt, answer: float(answer[0]), prompts=[(2,)], actions=2, length=2, rounds=120, **ON_POLICY
    )
    assert chances(model)[2, 1] > 0.85
    if row.settings.max_kl is None:  # type: ignore[union-attr]
        # What came after did not matter. (A bounded step is as long as its bound, be there nothing left but noise.)
        assert chances(model)[:2, 1].tolist() == pytest.approx([0.5, 0.5], abs=0.3)


@pytest.mark.parametrize("name", ONLINE)
def test_ladder_4_the_better_of_two_actions_is_taken(name: str) -> None:
    model = learn(
        algorithm(name),
        lambda prompt, answer: (-1.0, 1.0)[answer[0]],
        prompts=[(0,)],
        actions=2,
        rounds=80,
        **ON_POLICY,
    )
    assert chances(model)[0, 1] > 0.9


@pytest.mark.parametrize("name", ONLINE)
def test_ladder_5_the_better_action_depends_on_the_prompt(name: str) -> None:
    model = learn(
        algorithm(name),
        lambda prompt, answer: 1.0 if prompt[-1] == answer[0] else -1.0,
        prompts=[(0,), (1,)],
        actions=2,
        rounds=80,
        **ON_POLICY,
    )
    assert chances(model).diagonal().min() > 0.9


# --- the bandit

OPTIMA = {
    0.5: ([0.002144, 0.015842, 0.117059, 0.864955], 2.844825, 0.930866, 2.379392),
    1.0: ([0.032059, 0.087144, 0.236883, 0.643914], 2.492653, 0.438757, 2.053895),
    2.0: ([0.101536, 0.167405, 0.276004, 0.455054], 2.084576, 0.141244, 1.802089),
}
# As they are, but for the critic, which learns freely: whole coefficient, no clip. No bonus for entropy, which would
# be a second price.
FREE: dict[str, Any] = {"whiten_advantages": False, "value_clip": None, "value_coef": 1.0, "entropy_coef": 0.0}


def bandit(row: Algorithm, beta: float, **changes: Any) -> Tensor:
    """The policy that a row finds: four actions, uniform reference, rewards 0 to 3, KL priced in the reward."""
    found = learn(
        row,
        lambda prompt, answer: float(answer[0]),
        prompts=[(0,)],
        actions=4,
        kl_coef=beta,
        **{"rounds": 80, "copies": 256, "rate": 0.1} | changes,
    )
    return chances(found)[0]


def of(name: str, **settings: Any) -> Algorithm:
    return algorithm(name).with_settings(FREE | settings)


@pytest.mark.parametrize(
    ("row", "beta", "changes"),
    [
        pytest.param(of("ppo"), 0.5, {}, id="ppo 0.5"),
        pytest.param(of("ppo"), 1.0, {}, id="ppo 1"),
        pytest.param(of("ppo"), 2.0, {}, id="ppo 2"),
        pytest.param(of("ppo", whiten_advantages=True), 1.0, {}, id="ppo, whitened"),
        pytest.param(of("ppo", dual_clip=3.0), 1.0, {}, id="ppo, dual clip"),
        pytest.param(of("ppo_penalty"), 1.0, {}, id="ppo_penalty"),
        pytest.param(of("trpo"), 1.0, ON_POLICY, id="trpo"),
        pytest.param(of("a2c"), 1.0, ON_POLICY, id="a2c"),
        pytest.param(of("actor_critic"), 1.0, ON_POLICY, id="actor_critic"),
        pytest.param(of("reinforce"), 1.0, ON_POLICY, id="reinforce"),
        pytest.param(of("remax"), 1.0, ON_POLICY, id="remax"),
        pytest.param(of("reinforce_pp", whiten_advantages=True), 1.0, {}, id="reinforce_pp"),
        pytest.param(of("rloo"), 1.0, ON_POLICY, id="rloo"),
        pytest.param(of("dr_grpo"), 1.0, {}, id="grpo without deviation"),
        pytest.param(of("grpo", kl_loss_coef=0.0), 1.0, {}, id="grpo"),
        pytest.param(of("dapo"), 1.0, {}, id="dapo"),
        pytest.param(of("gspo"), 1.0, {}, id="gspo"),
        pytest.param(of("cispo"), 1.0, {}, id="cispo"),
    ],
)
def test_the_kl_regularised_bandit_is_solved(row: Algorithm, beta: float, changes: dict[str, Any]) -> None:
    """The policy is the closed form's."""
    policy = bandit(row, beta, **changes)
    expected, reward, kl, objective = OPTIMA[beta]
    assert policy.tolist() == pytest.approx(expected, abs=1e-2)
    got_reward = (policy * torch.arange(4)).sum().item()
    got_kl = (policy * (policy * 4).log()).sum().item()
    assert got_reward == pytest.approx(reward, abs=2e-2)
    assert got_kl == pytest.approx(kl, abs=2e-2)
    assert objective - 1e-3 < got_reward - beta * got_kl <= objective + 1e-5  # no policy does better


REWARDS = torch.arange(4, dtype=torch.float64)


def test_the_full_kl_in_the_loss_finds_the_same_optimum() -> None:
    """No estimate, no noise: its gradient is the KL's own."""
    policy = bandit(of("dr_grpo", kl_loss_coef=1.0, full_kl=True), 0.0, **ON_POLICY)
    assert policy.tolist() == pytest.approx(OPTIMA[1.0][0], abs=1e-2)


def test_centred_groups_solve_it_with_the_kl_in_the_loss_too() -> None:
    """k2's gradient is the KL's own."""
    policy = bandit(of("dr_grpo", kl_loss_coef=1.0), 0.0, **ON_POLICY)
    assert policy.tolist() == pytest.approx(OPTIMA[1.0][0], abs=1e-2)


def test_by_how_much_the_deviation_misses() -> None:
    """With the KL in the loss, dividing by the deviation s of the rewards is as if beta were s beta.

    pi(a) ~ exp(r(a) / (s beta)) with s the deviation under pi itself: at beta 1.25 the best action gets 0.66 for 0.57.
    """
    policy = bandit(of("dapo", kl_loss_coef=1.25), 0.0, **ON_POLICY)
    expected = torch.full((4,), 0.25, dtype=torch.float64)
    for _ in range(400):
        deviation = ((expected * REWARDS**2).sum() - (expected * REWARDS).sum() ** 2).sqrt()
        expected = 0.5 * expected + 0.5 * torch.softmax(REWARDS / (1.25 * deviation), -1)
    assert policy.tolist() == pytest.approx(expected.tolist(), abs=2e-2)
    optimum = torch.softmax(REWARDS / 1.25, -1)
    assert 0.06 < policy[3].item() - optimum[3].item() < 0.11


def test_the_deviation_can_run_away() -> None:
    """At beta 1 no policy balances: the surer it is, the smaller the deviation, and the lower the price of being so."""
    assert bandit(of("dapo", kl_loss_coef=1.0), 0.0, rounds=160, **ON_POLICY)[3] > 0.9


def test_by_how_much_grpo_as_published_misses() -> None:
    """k3's gradient in the loss is that of KL(reference || policy), whose optimum is s beta ref / (s beta + E r - r).

    Its best action is close to the optimum's by luck; the second best is rarer by 0.065, the worst twice as likely.
    """
    policy = bandit(of("grpo", kl_loss_coef=1.0), 0.0, **ON_POLICY)
    mean, deviation = (policy * REWARDS).sum(), (policy * REWARDS**2).sum() - (policy * REWARDS).sum() ** 2
    price = deviation.sqrt()
    assert policy.tolist() == pytest.approx((price * 0.25 / (price + mean - REWARDS)).tolist(), abs=2e-2)
    misses = policy - tensor(OPTIMA[1.0][0])
    assert misses.tolist() == pytest.approx([0.040, 0.013, -0.065, 0.012], abs=1.5e-2)

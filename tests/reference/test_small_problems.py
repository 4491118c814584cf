"""Whole algorithms on problems whose answer is known: one-token language models, in tables.

The probes climb: when one fails and the one before passes, the fault is in what it added. The bandit's optimum under a
price on KL has a closed form, pi*(a) ~ pi_ref(a) exp(r(a) / beta).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, tensor

from dressage.algorithms.advantages import group_centered, leave_one_out, of_answers
from dressage.algorithms.aggregate import aggregate, count
from dressage.algorithms.catalog import Algorithm, algorithm
from dressage.algorithms.policy_gradient import PolicyGradientSettings
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
        logprobs, _ = token_logprobs(self.logits[state].flatten(0, 1), torch.eye(self.actions), chosen.flatten())
        first = torch.zeros(len(tokens), 1)
        return TokenScores(torch.cat([first, logprobs.view(state.shape)], 1)), torch.cat([first, self.values[state]], 1)

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
        optimizer.param_groups[0]["lr"] = rate * (1 - step / rounds)
        rollouts = [r for prompt in prompts for r in model.answer(prompt, length, copies, generator)]
        samples = tensors_of(rollouts, pad_token=0)
        with torch.no_grad():
            old, values = model.scores(samples.tokens)
            ref, _ = reference.scores(samples.tokens)
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
        )
        for rows in minibatches(len(rollouts), len(rollouts) // 2, epochs, seed=step):
            batch = select(experience, tensor(rows))
            terms = row.losses[Experience](*model.scores(batch.tokens), batch, settings)
            totals = count([batch.response_mask], max_length=length)
            optimizer.zero_grad()
            torch.stack([aggregate(t, batch.response_mask, totals, row.weigh) for t in terms.values()]).sum().backward()
            optimizer.step()
        if step in last:
            with torch.no_grad():
                mean.logits += model.logits / len(last)
                mean.values += model.values / len(last)
    return mean


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


OPTIMA = {
    0.5: ([0.002144, 0.015842, 0.117059, 0.864955], 2.844825, 0.930866, 2.379392),
    1.0: ([0.032059, 0.087144, 0.236883, 0.643914], 2.492653, 0.438757, 2.053895),
    2.0: ([0.101536, 0.167405, 0.276004, 0.455054], 2.084576, 0.141244, 1.802089),
}
PPO = algorithm("ppo").with_settings({"whiten_advantages": False, "value_clip": None, "value_coef": 1.0})
# Groups instead of a critic: later rows of the catalog, made here from the same parts.
WITHOUT_CRITIC = replace(PPO, roles=frozenset({"reference", "reward"}))


@pytest.mark.parametrize(
    ("row", "beta"),
    [
        pytest.param(PPO, 0.5, id="ppo 0.5"),
        pytest.param(PPO, 1.0, id="ppo 1"),
        pytest.param(PPO, 2.0, id="ppo 2"),
        pytest.param(PPO.with_settings({"whiten_advantages": True}), 1.0, id="ppo, whitened"),
        pytest.param(replace(WITHOUT_CRITIC, advantage=of_answers(leave_one_out)), 1.0, id="rloo"),
        pytest.param(replace(WITHOUT_CRITIC, advantage=of_answers(group_centered)), 1.0, id="grpo without deviation"),
    ],
)
def test_the_kl_regularised_bandit_is_solved(row: Algorithm, beta: float) -> None:
    """Four actions, uniform reference, rewards 0 to 3, KL priced in the reward: the policy is the closed form's."""
    model = learn(
        row,
        lambda prompt, answer: float(answer[0]),
        prompts=[(0,)],
        actions=4,
        kl_coef=beta,
        rounds=80,
        copies=256,
        rate=0.1,
    )
    policy = torch.softmax(model.logits[0], -1)
    expected, reward, kl, objective = OPTIMA[beta]
    assert policy.tolist() == pytest.approx(expected, abs=1e-2)
    got_reward = (policy * torch.arange(4)).sum().item()
    got_kl = (policy * (policy * 4).log()).sum().item()
    assert got_reward == pytest.approx(reward, abs=2e-2)
    assert got_kl == pytest.approx(kl, abs=2e-2)
    assert objective - 1e-3 < got_reward - beta * got_kl <= objective + 1e-5  # no policy does better

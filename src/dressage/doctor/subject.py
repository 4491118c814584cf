"""What is examined: stages' settings, the texts they learn from, and a small trial of the roles they train.

The trial is as a run would have it, but small: a handful of the shortest texts, answers of a few tokens, an adapter of
low rank that has been moved off its start. Everything is made when first asked for, and once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dressage import assemble, assemble_rewards
from dressage.algorithms.catalog import Algorithm, algorithm
from dressage.algorithms.policy_gradient import PolicyGradientSettings
from dressage.batches import Experience, Samples
from dressage.config import DataConfig, DpoConfig, LoraConfig, PpoConfig, RewardConfig, SftConfig
from dressage.data.prepare import (
    Prepared,
    prepare_demonstrations,
    prepare_prompts,
    prepare_rankings,
    prepare_ratings,
)
from dressage.data.sources import Loaded, read_demonstrations, read_prompts, read_rankings, read_ratings
from dressage.data.template import ChatTemplate, Encoded
from dressage.errors import ConfigError
from dressage.experience.build import build_experience, tensors_of
from dressage.models.backbone import Backbone
from dressage.models.files import add_saved_adapter, load_backbone, saved_model
from dressage.models.pretrained import ROLE_FILE, lineage
from dressage.models.roles import Role, ScalarHead
from dressage.models.scoring import score_sequences, score_tokens
from dressage.rewards.learned import LearnedReward, Scorer
from dressage.rollout.engine import evaluating
from dressage.schema import Demonstration, Message, Prompt, Rollout, Sampling
from dressage.settings import ModelConfig, Settings
from dressage.training.batch_sources import logprobs_of
from dressage.training.online import online_algorithm

READ = 1000
"""Records of each source that are looked at."""
ROWS, ROW_TOKENS = 3, 64
"""Texts that go through the model, and of how many tokens: the last ones, which hold the answer."""
PROMPTS, ANSWERS, NEW_TOKENS = 2, 2, 8
MADE_UP = (
    ("Who are you?", "A friend."),
    ("What is red?", "A ripe tomato."),
    ("Is it late?", "Yes, it is late."),
    ("Say something.", "Here is something, and a little more of it."),
)
Learning = SftConfig | RewardConfig | DpoConfig | PpoConfig


@dataclass(frozen=True)
class Text:
    """Records of one kind, read and encoded as a stage has them; row i is made of record i."""

    kind: assemble.Records
    data: DataConfig
    records: Sequence[Any]
    rows: Sequence[Any]
    read: int
    """Records there were, those left out included."""
    left_out: Sequence[str] = ()
    """A reason for each record of which no row was made."""
    cut: int = 0

    def spoken(self) -> Iterator[tuple[Prompt, str, bool, Encoded]]:
        """Every answer: to what, in words, whether it came to an end, and the row that holds it."""
        if self.kind == "prompts":
            return
        for record, row in zip(self.records, self.rows, strict=True):
            if isinstance(record, Demonstration):
                *before, last = record.messages
                answers = [(Prompt(tuple(before)), last.content, True, row)]
            elif self.kind == "ratings":
                answers = [(record.prompt, record.answer, record.finished, row.answers[0])]
            else:
                finished = record.finished or (True,) * len(record.answers)
                answers = [(record.prompt, *one) for one in zip(record.answers, finished, row.answers, strict=True)]
            for prompt, answer, ended, encoded in answers:
                was_cut = self.data.on_too_long == "cut" and len(encoded.tokens) >= self.data.max_tokens
                yield prompt, answer, ended and not was_cut, encoded


@dataclass
class Subject:
    """Settings with all that follows from them. `scratch` is a folder that may be written to and will be gone."""

    stages: Mapping[str, Settings]
    folder: Path
    """Where the stages are made."""
    template: ChatTemplate
    texts: Sequence[Text]
    scratch: Path
    model: ModelConfig = field(default_factory=ModelConfig)
    """Whose weights are there: the main stage's, or where that one begins."""

    def load(self) -> None:
        """The weights, now: a model that is not there is no finding, but an error of whoever asked. ModelError."""
        assert self.backbone and self.judge

    # --- settings -----------------------------------------------------------------------------------------------------

    @property
    def learning(self) -> Mapping[str, Learning]:
        """The stages that learn."""
        return {name: one for name, one in self.stages.items() if isinstance(one, Learning)}

    @cached_property
    def online(self) -> PpoConfig | None:
        """The last stage that learns from its own answers."""
        return next((one for one in reversed([*self.learning.values()]) if isinstance(one, PpoConfig)), None)

    @cached_property
    def ppo(self) -> PpoConfig:
        """That stage on the model that is there; if there is none, PPO as it comes."""
        own = self.online or PpoConfig(prompts=DataConfig(sources=("none",)), reward_model="none")
        return own.model_copy(update={"model": self.model})

    @cached_property
    def row(self) -> Algorithm:
        """Its method, without what makes a step of its own or ends a round early."""
        row = algorithm("ppo") if self.online is None else online_algorithm(self.online)
        if not isinstance(row.settings, PolicyGradientSettings) or row.advantage is None:
            row = algorithm("ppo")  # It selects or ranks, and weighs no token.
        return row.with_settings({"max_kl": None, "stop_kl": None})

    @property
    def main(self) -> Learning:
        """The stage that is tried out."""
        return main_stage(self.stages)

    # --- texts --------------------------------------------------------------------------------------------------------

    @cached_property
    def spoken(self) -> list[tuple[Prompt, str, bool, Encoded]]:
        """All answers in the texts, or, where there are only prompts, a few made-up ones."""
        own = [one for text in self.texts for one in text.spoken()]
        asked = [(Prompt.of(question), answer) for question, answer in MADE_UP]
        return own or [(p, answer, True, self.template.encode_answer(p, answer)) for p, answer in asked]

    @cached_property
    def rows(self) -> list[Encoded]:
        """Short texts of different lengths, the longest first."""
        by_length = {len(row.tokens): row for *_, row in self.spoken}
        chosen = [_end_of(by_length[length]) for length in sorted(by_length)[:ROWS]][::-1]
        while len(chosen) < ROWS:
            chosen.append(Encoded(chosen[-1].tokens[1:], chosen[-1].loss_mask[1:]))
        # Where all were long, all are now of one length.
        return [Encoded(row.tokens[i:], row.loss_mask[i:]) for i, row in enumerate(chosen)]

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The shortest things to be answered, encoded."""
        asked = [row for text in self.texts if text.kind == "prompts" for row in text.rows]
        asked = asked or [self.template.encode_prompt(prompt) for prompt, *_ in self.spoken]
        return sorted(dict.fromkeys(asked), key=lambda prompt: len(prompt.tokens))[:PROMPTS]

    # --- weights ------------------------------------------------------------------------------------------------------

    @cached_property
    def backbone(self) -> Backbone:
        """The model as a run finds it."""
        return load_backbone(assemble.learning_model(self.main.model_copy(update={"model": self.model})))

    @property
    def tolerance(self) -> float:
        """By how much two log-probabilities may differ that should be equal."""
        return 1e-4 if self.backbone.model.dtype == torch.float32 else 0.25

    @cached_property
    def lora(self) -> LoraConfig:
        """The main stage's adapter, of low rank; a small one too where whole weights learn."""
        own = self.main.lora or LoraConfig()
        return own.model_copy(update={"rank": min(own.rank, 4)})

    @cached_property
    def reference(self) -> Role:
        """Where training begins."""
        return Role(self.backbone)

    @cached_property
    def policy(self) -> Role:
        """An adapter that has learnt something, on the reference; with a value head if the method has a critic."""
        head = ScalarHead(self.backbone.width) if "value" in self.row.roles else None
        role = assemble.build_role(self.backbone, "doctor", self.lora, seed=self.main.seed, head=head)
        _move(self.backbone, "doctor")
        return role

    @cached_property
    def reward_folder(self) -> Path | None:
        """Of the first reward model that the settings name, if it is there."""
        named = [Path(name) for name in (self.online.reward_models if self.online is not None else ())]
        return next((folder for folder in named if (folder / ROLE_FILE).is_file()), None)

    @cached_property
    def learned(self) -> LearnedReward:
        """The reward model; if there is none yet, an adapter and a head as it would begin, moved off its start."""
        if self.reward_folder is not None:
            shared = self.backbone if self.ppo.lora is not None else None
            return assemble_rewards.build_reward_model(
                str(self.reward_folder), self.model, shared, self.template, "doctor-reward"
            )
        own = next((one for one in reversed([*self.learning.values()]) if isinstance(one, RewardConfig)), None)
        # A reward model on another base would begin there: here only its way of reading is tried.
        same = own is not None and (own is self.main or own.model == self.main.model)
        head = ScalarHead.for_reward(self.backbone.width, self.main.seed)
        head.normalise(2.0, 0.5)
        depth = own.depth if own is not None and same else None
        role = assemble.build_role(self.backbone, "doctor-reward", self.lora, seed=1, head=head, depth=depth)
        _move(self.backbone, "doctor-reward")
        return LearnedReward(replace(role, pooling=own.pooling if own is not None else "last"))

    @property
    def judge(self) -> Role:
        """Who gives the learned reward."""
        return self.learned.role

    @cached_property
    def scorer(self) -> Scorer:
        """What gives the whole reward, or the judge alone where a part of it has still to be made."""
        if self.online is None or any(not (Path(name) / ROLE_FILE).is_file() for name in self.online.reward_models):
            return self.learned
        return assemble_rewards.build_rewards(self.ppo, self.backbone, self.template)[0]

    @cached_property
    def below(self) -> tuple[Role, Role] | None:
        """Where the model is an adapter: the same with that adapter as a switch, and the model without it."""
        folders = lineage(self.model.name).adapters
        if not folders or not (folders[-1] / ROLE_FILE).is_file():
            return None
        backbone = load_backbone(saved_model(folders[-1]).model_copy(update={"dtype": self.model.dtype}))
        add_saved_adapter(backbone, folders[-1], "policy")
        return Role(backbone, "policy"), Role(backbone)

    # --- what the roles say -------------------------------------------------------------------------------------------

    @cached_property
    def alone(self) -> list[Tensor]:
        """Log-probabilities of each row's answer, read by itself without any padding."""
        return [self.logprobs(self.policy, *_alone(row))[0] for row in self.rows]

    @cached_property
    def judged(self) -> list[Encoded]:
        """The rows as the judge reads them: written anew where it has a template of its own."""
        own = self.learned.template
        if own is None:
            return self.rows
        return [_end_of(own.encode_answer(p, answer, ended)) for p, answer, ended, _ in self.spoken[:ROWS]]

    @property
    def judged_padding(self) -> int:
        """What the judge's rows are padded with."""
        return (self.learned.template or self.template).pad_token

    @cached_property
    def scores_alone(self) -> Tensor:
        """The judge's score of each row, read by itself."""
        rows = [_alone(row) for row in self.judged]
        return torch.stack([self.scores(tokens, mask, torch.tensor([len(mask[0]) - 1]))[0] for tokens, mask, _ in rows])

    def logprobs(self, role: Role, tokens: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
        """[B, T] as the trainer has them."""
        device = self.backbone.device
        with evaluating(role.backbone.model):
            return score_tokens(role, tokens.to(device), mask.to(device), wanted.to(device)).logprobs.float().cpu()

    def scores(self, tokens: Tensor, mask: Tensor, last: Tensor) -> Tensor:
        """[B] of the judge."""
        device = self.judge.backbone.device
        with evaluating(self.judge.backbone.model):
            return score_sequences(self.judge, tokens.to(device), mask.to(device), last.to(device)).float().cpu()

    def sample(
        self, temperature: float, *, tokens: int = NEW_TOKENS, max_batch: int = 64, stops: Set[int] | None = None
    ) -> list[Rollout]:
        """Answers of the policy, ANSWERS to each prompt, by the engine that the settings name; `stops` end them."""
        template = self.template if stops is None else replace(self.template, stop_tokens=frozenset(stops))
        engine = assemble.build_engine(self.ppo.rollout.engine, self.policy, template, max_batch)
        asked = [(group, prompt) for group, prompt in enumerate(self.prompts) for _ in range(ANSWERS)]
        sampling = Sampling(tokens, temperature=temperature, seed=self.main.seed)
        completions = engine.generate([prompt for _, prompt in asked], sampling)
        return [
            Rollout(prompt, completion, self.template.decode(completion.tokens), group)
            for (group, prompt), completion in zip(asked, completions, strict=True)
        ]

    @cached_property
    def rollouts(self) -> list[Rollout]:
        """Answers at the run's own temperature."""
        return self.sample(self.ppo.rollout.temperature)

    @cached_property
    def samples(self) -> Samples:
        """The same as tensors."""
        return tensors_of(self.rollouts, self.template.pad_token)

    @cached_property
    def experience(self) -> Experience:
        """The same with scores that are all different, so that there is something to learn."""
        temperature, settings = self.ppo.rollout.temperature, self.row.settings
        assert isinstance(settings, PolicyGradientSettings) and self.row.advantage is not None
        old, ref = (logprobs_of(role, self.samples, temperature) for role in (self.policy, self.reference))
        built, _ = build_experience(
            self.samples,
            torch.arange(len(self.rollouts)).float(),
            old,
            ref,
            torch.zeros_like(old) if "value" in self.row.roles else None,
            kl_coef=self.ppo.kl.coef,
            gamma=settings.gamma,
            lam=settings.lam,
            whiten_advantages=settings.whiten_advantages,
            advantage=self.row.advantage,
        )
        return built


def main_stage(stages: Mapping[str, Settings]) -> Learning:
    """The last that trains a policy, or the last that learns. ConfigError if nothing does."""
    learning = [one for one in stages.values() if isinstance(one, Learning)]
    policies = [one for one in learning if not isinstance(one, RewardConfig)]
    if not learning:
        raise ConfigError(f"{', '.join(stages)}: nothing learns here; name a recipe, a run, a model or a data file")
    return policies[-1] if policies else learning[-1]


def read_text(kind: assemble.Records, data: DataConfig, template: ChatTemplate) -> Text:
    """The first READ records of a setting's sources, encoded; DataError where a run would stop too."""
    limit = min(READ, data.limit or READ)
    readers: Mapping[assemble.Records, Callable[..., Loaded[Any]]] = {
        "demonstrations": read_demonstrations,
        "rankings": read_rankings,
        "ratings": read_ratings,
        "prompts": read_prompts,
    }
    records: list[Any] = []
    for source in data.sources:
        loaded = readers[kind](assemble.located(source), on_bad_row=data.on_bad_row, limit=limit)
        records += loaded.records
    made = prepared(kind, records, data, template)
    left_out = [dropped.reason for dropped in made.dropped]
    return Text(kind, data, [records[i] for i in made.indices], made.rows, len(records), left_out, made.cut)


def prepared(kind: assemble.Records, records: Sequence[Any], data: DataConfig, template: ChatTemplate) -> Prepared[Any]:
    """Records encoded as a stage does."""
    ways: Mapping[assemble.Records, Callable[..., Prepared[Any]]] = {
        "demonstrations": prepare_demonstrations,
        "rankings": prepare_rankings,
        "ratings": prepare_ratings,
        "prompts": prepare_prompts,
    }
    return ways[kind](records, template, max_tokens=data.max_tokens, on_too_long=data.on_too_long)


@contextmanager
def unchanged(role: Role) -> Iterator[None]:
    """Afterwards the role's weights are as they were."""
    before = {name: p.detach().clone() for name, p in role.parameters().items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in role.parameters().items():
                parameter.copy_(before[name])
                parameter.grad = None


def without_head(role: Role) -> Role:
    """The same words, no value."""
    return replace(role, head=None)


def as_demonstration(prompt: Prompt, answer: str) -> Demonstration:
    """A prompt with its answer."""
    return Demonstration((*prompt.messages, Message("assistant", answer)))


def _end_of(row: Encoded) -> Encoded:
    return Encoded(row.tokens[-ROW_TOKENS:], row.loss_mask[-ROW_TOKENS:])


def _alone(row: Encoded) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.tensor([row.tokens])
    return tokens, torch.ones_like(tokens, dtype=torch.bool), torch.tensor([row.loss_mask])


def _move(backbone: Backbone, adapter: str) -> None:
    """Off the start, at which an adapter changes nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in backbone.adapter_state(adapter).items():
            if name.endswith("lora_B.weight"):
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))

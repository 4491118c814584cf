"""Every setting: typed, bounded, explained, frozen and strict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dressage.reward_parts import EnsemblePart, JudgeConfig, ModelPart, RewardPart
from dressage.settings import (
    Above0,
    Filled,
    ModelConfig,
    Natural,
    NonNegative,
    PlainName,
    Pooling,
    Positive,
    Seed,
    Settings,
    Share,
)


class LoraConfig(Settings):
    """Low-rank adapters (Hu et al. 2021)."""

    rank: Positive = 16
    alpha: Above0 = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """For supervised learning only; preference and reinforcement learning refuse it."""
    layers: Positive | None = None
    """Adapt only the last so many layers that the role reads; none: all."""


class OptimizerConfig(Settings):
    """AdamW and its schedule."""

    learning_rate: NonNegative = 1e-4
    betas: tuple[Share, Share] = (0.9, 0.999)
    epsilon: Above0 = 1e-8
    """Added to the root of the second moment, as PyTorch does."""
    weight_decay: NonNegative = 0.0
    warmup_steps: Natural = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: stay, or fall to zero at the last step."""
    max_gradient_norm: Above0 = 1.0


class TrainingConfig(Settings):
    """How long, in what pieces, and how often to save."""

    epochs: Positive = 1
    """Passes over the data; `steps` overrules it."""
    steps: Positive | None = None
    """Optimizer steps (reinforcement learning: rounds of sampling and learning)."""
    batch_size: Positive = 16
    """Records in one update (PPO takes rollout.prompts_per_step instead)."""
    micro_batch_tokens: Positive = 1024
    """Padded tokens that go through the model at once (what answers to one prompt share counts once): less is slower
    and smaller in memory, the result is the same."""
    memory_gb: Above0 | None = None
    """Most memory the run should take, in GB: `micro_batch_tokens` then follows from it. None: it is as it is set."""
    checkpoint_every: Natural = 20
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: Positive = 2
    evaluate_every: Natural = 0
    """Steps between looks at the held-out part; 0: at the start and the end."""


class DataConfig(Settings):
    """Which records."""

    sources: Annotated[tuple[Filled, ...], Field(min_length=1)]
    """Files, hub names, or "material:NAME" for what Dressage ships. The format is recognised by its content."""
    heldout: tuple[Filled, ...] = ()
    """Sources to measure on; if there are none, `heldout_fraction` of the sources is set apart."""
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    limit: Positive | None = None
    """Read at most so many records of each source."""
    max_tokens: Positive = 512
    """Longest conversation (for prompts: longest prompt)."""
    on_too_long: Literal["error", "drop", "cut"] = "drop"
    """cut: the end of the answer is cut and gets no end mark."""
    on_bad_row: Literal["error", "drop"] = "error"
    merge: Literal["bradley_terry", "elo"] | None = None
    """Rankings: all judgements of a prompt's answers become one, with a grade for each answer, by Bradley-Terry (order
    does not matter) or Elo (later ones count more); none: each is learnt by itself."""


class RolloutConfig(Settings):
    """How answers are sampled while learning."""

    prompts_per_step: Positive = 16
    answers_per_prompt: Positive = 1
    max_new_tokens: Positive = 64
    length_range: tuple[Positive, Positive] | None = None
    """Each answer has a limit of its own, any from the first to the second number of tokens alike; none: all have
    max_new_tokens. Meeting it is no fault of the policy's: see `truncated`."""
    temperature: Above0 = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Natural = 0
    allow_filtered_sampling: bool = False
    """Let top_p or top_k be on although the trained distribution is then not the sampled one."""
    engine: Literal["native", "huggingface"] = "native"
    max_batch: Positive = 64
    """Answers decoded at once."""
    reuse_engine_logprobs: bool | None = None
    """Take the sampler's log-probs for the policy's own, where nothing else is asked of it: a reading less. In each
    round the shortest answer shows first that both agree to 1e-3, and the first update that all do; where they do not,
    true is an error. None: in float32 so, and where they do not agree, or in bfloat16, all answers are read."""

    @model_validator(mode="after")
    def _what_is_trained_is_what_is_sampled(self) -> RolloutConfig:
        if (self.top_p < 1 or self.top_k > 0) and not self.allow_filtered_sampling:
            raise ValueError(
                "top_p and top_k train another distribution than the one sampled; set allow_filtered_sampling=true"
            )
        if self.length_range is not None:
            low, high = self.length_range
            if not low <= high <= self.max_new_tokens:
                raise ValueError(
                    f"length_range=[{low}, {high}] must go up, to no more than max_new_tokens={self.max_new_tokens}"
                )
        return self


class ValueConfig(Settings):
    """The critic, for algorithms that have one."""

    start: Literal["reward", "zero", "base"] = "reward"
    """reward: adapter (or weights) and head of its own, begun from the reward model's; zero: a head of zeros on the
    policy's trunk; base: an adapter of its own and a head of zeros on the policy's base, or on `model`."""
    model: ModelConfig | None = None
    """base: another causal model with the same tokenizer, a smaller one perhaps, for the critic alone."""
    lora: LoraConfig | None = LoraConfig()
    """base: of the critic's adapter; none: all weights of `model` learn."""
    learning_rate: NonNegative | None = None
    """Of the critic; none: the policy's."""
    warmup_steps: Natural = 0
    """First steps in which only the critic learns."""

    @model_validator(mode="after")
    def _one_kind_of_critic(self) -> ValueConfig:
        if self.start != "base" and self.model is not None:
            raise ValueError(
                f'value.model with value.start="{self.start}": a model of its own needs value.start="base"'
            )
        if self.start != "base" and self.lora != LoraConfig():
            raise ValueError(
                f'value.lora with value.start="{self.start}": only a critic with value.start="base" chooses its adapter'
            )
        if self.start == "base" and self.lora is None and self.model is None:
            raise ValueError("value.lora=null without value.model: all weights of the shared base would learn")
        return self


class KlConfig(Settings):
    """The price of moving away from the reference, in the reward of every token."""

    coef: NonNegative = 0.05
    estimator: Literal["k1", "k2", "k3", "full"] = "k1"
    """How a token's KL is told. k1 alone is unbiased in the reward; full, over the whole vocabulary, does not blame the
    token that was chosen but the state it was chosen in (in the loss, settings.full_kl has no such flaw)."""
    watch_full: bool = False
    """Log the KL over the whole vocabulary beside the estimate: takes one more pass of the reference."""
    controller: Literal["fixed", "proportional", "band"] = "fixed"
    target_per_answer: Above0 = 6.0
    """proportional: nats an answer to steer to (Ziegler et al. 2019)."""
    horizon_answers: Positive = 10_000
    """proportional: answers over which the coefficient adapts."""
    low_per_answer: NonNegative = 1.0
    """band: below, the coefficient is divided by `factor`."""
    high_per_answer: Above0 = 10.0
    """band: above, the coefficient is multiplied by `factor`."""
    factor: Annotated[float, Field(gt=1)] = 1.5

    @model_validator(mode="after")
    def _band_is_a_band(self) -> KlConfig:
        if self.low_per_answer >= self.high_per_answer:
            raise ValueError("low_per_answer must be below high_per_answer")
        return self


class OldKlConfig(Settings):
    """How settings.old_kl_coef, the price of leaving the old policy, adapts to how far the last update had gone."""

    controller: Literal["fixed", "proportional", "band"] = "band"
    target_per_token: Above0 = 0.01
    """proportional: nats a token to steer to."""
    horizon_answers: Positive = 1000
    """proportional: answers over which the coefficient adapts."""
    low_per_token: NonNegative = 0.01 / 1.5
    """band: below, the coefficient is divided by `factor` (Schulman et al. 2017, sec. 4)."""
    high_per_token: Above0 = 0.01 * 1.5
    """band: above, the coefficient is multiplied by `factor`."""
    factor: Annotated[float, Field(gt=1)] = 2.0

    @model_validator(mode="after")
    def _band_is_a_band(self) -> OldKlConfig:
        if self.low_per_token >= self.high_per_token:
            raise ValueError("low_per_token must be below high_per_token")
        return self


class PtxConfig(Settings):
    """Demonstrations learnt beside the reward (Ouyang et al. 2022, eq. 2); their weight is settings.ptx_coef."""

    data: DataConfig
    batch_size: Positive = 8


class HealthConfig(Settings):
    """What is done when a number says that something is wrong."""

    on_alarm: Literal["stop", "rollback", "warn"] = "stop"
    """stop: training ends, and the last checkpoint is there to go on from. rollback: it ends with the best checkpoint
    that is kept, as its product. warn: it goes on, and says so."""
    patience_steps: Positive = 5
    """So many logged steps running a reading must be as bad; one that is no number is enough by itself."""
    best_by: str = "gold/mean"
    """rollback: of which metric the highest is the best; where it is not logged, the newest checkpoint before the
    alarm's first reading."""
    bounds: Mapping[str, tuple[float, float]] = {}
    """By metric, where to warn and where to stop, in place of the built-in: {kl/update_approx: [0.02, 0.1]}."""


class StageConfig(Settings):
    """What every stage has."""

    kind: str
    description: str = ""
    seed: Seed = 1
    model: ModelConfig = ModelConfig()


class SftConfig(StageConfig):
    """Supervised fine-tuning on demonstrations."""

    kind: Literal["sft"] = "sft"
    health: HealthConfig = HealthConfig()
    data: DataConfig
    lora: LoraConfig | None = LoraConfig()
    """None: all weights learn."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-4)
    training: TrainingConfig = TrainingConfig()


class RewardConfig(StageConfig):
    """A reward model from rankings.

    On any causal model, or an encoder (bert, roberta, deberta); its tokenizer may be another than the policy's.
    """

    kind: Literal["reward"] = "reward"
    health: HealthConfig = HealthConfig()
    data: DataConfig
    loss: Literal["log_sig", "log_exp", "regression"] = "log_sig"
    """Of every pair of a prompt's answers, under two names; regression: squared error against the answers' grades."""
    settings: Mapping[str, bool | int | float | str | None] = {}
    """What differs from the row's own settings: margin, ties, lm_coef."""
    start: str | None = None
    """Folder of a reward model on the same base to go on from: one that has learnt many public comparisons (preference
    model pretraining, Askell et al. 2021, sec. 4) learns one's own sooner; none: adapter and head begin anew."""
    normalise_on: str | None = None
    """answers.jsonl of the model to be optimised: scores get mean 0, deviation 1 there; none: on ranked answers."""
    depth: Positive | None = None
    """Read the score after so many layers (a smaller reward model on the same base); none: after all."""
    pooling: Pooling = "last"
    """Where the score is read: at the last token, or as the mean over all tokens of prompt and answer."""
    lora: LoraConfig | None = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4)
    training: TrainingConfig = TrainingConfig(batch_size=8)
    """batch_size counts prompts, each with its K answers."""

    @model_validator(mode="after")
    def _consistent(self) -> RewardConfig:
        if self.settings.get("lm_coef") and self.depth is not None:
            raise ValueError(
                f"settings.lm_coef imitates with the whole model, and depth={self.depth} reads a part of it; leave out"
                " one of them"
            )
        _refuse_dropout(self.lora)
        return self


class DpoConfig(StageConfig):
    """Straight from people's judgements to a policy, without a reward model: DPO and its relatives."""

    kind: Literal["dpo"] = "dpo"
    health: HealthConfig = HealthConfig()
    algorithm: str = "dpo"
    """A row of the catalog that learns from preferences: `dressage algorithms` lists them."""
    settings: Mapping[str, float | bool] = {}
    """What differs from the row's own settings: beta, label_smoothing, margin ..."""
    data: DataConfig
    """Rankings or comparisons; kto takes ratings too, and learns from answers one by one."""
    lora: LoraConfig | None = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-5)
    training: TrainingConfig = TrainingConfig(batch_size=8)
    """batch_size counts prompts, each with its K answers (kto: rated answers)."""

    @model_validator(mode="after")
    def _no_dropout(self) -> DpoConfig:
        _refuse_dropout(self.lora)
        return self


class PpoConfig(StageConfig):
    """Reinforcement learning against a reward model, by PPO or another row of the catalog."""

    kind: Literal["ppo"] = "ppo"
    health: HealthConfig = HealthConfig()
    algorithm: str = "ppo"
    """A row of the catalog (dressage/algorithms/catalog.py)."""
    settings: Mapping[str, bool | int | float | None] = {}
    """What differs from the row's own settings: clip_low, clip_high, value_clip, value_coef, entropy_coef, gamma ..."""
    prompts: DataConfig
    reward_model: str | None = None
    """Folder of a reward model: short for rewards with this one part."""
    rewards: Mapping[PlainName, RewardPart] = {}
    """Parts by name, of which the reward is the weighted sum (docs/rewards.md)."""
    gold: str | None = None
    """What is logged beside the score, and never trained on: "simulated", the simulated annotator's hidden preference,
    or the name of a part of `rewards` with weight 0, such as a held-out reward model or a judge."""
    lora: LoraConfig | None = LoraConfig()
    rollout: RolloutConfig = RolloutConfig()
    value: ValueConfig = ValueConfig()
    kl: KlConfig = KlConfig()
    old_kl: OldKlConfig = OldKlConfig()
    ptx: PtxConfig | None = None
    reuse: Positive = 1
    """Passes over each round's samples."""
    minibatch_size: Positive | None = None
    """Answers in one optimizer step, of those that are learnt from; none: all of the round."""
    score_clip: Above0 | None = 5.0
    """Scores (the sum of the reward's parts) are kept within plus and minus this."""
    truncated: Literal["keep", "penalty", "soft", "mask"] = "penalty"
    """Answers that met the length limit: as they are, minus `truncation_penalty`, minus a share of it that grows over
    the last `soft_tokens` before the limit, or left out of the loss."""
    truncation_penalty: NonNegative = 1.0
    soft_tokens: Positive = 8
    """soft: of rollout.max_new_tokens, so many at the end cost more and more (Yu et al. 2025, eq. 13)."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4)
    training: TrainingConfig = TrainingConfig(steps=20, checkpoint_every=5)

    @model_validator(mode="after")
    def _consistent(self) -> PpoConfig:
        if self.training.steps is None:
            raise ValueError("training.steps must be set: reinforcement learning has no epochs of data")
        answers = self.rollout.prompts_per_step * self.rollout.answers_per_prompt
        if self.minibatch_size is not None and answers % self.minibatch_size:
            raise ValueError(
                f"minibatch_size={self.minibatch_size} does not divide rollout.prompts_per_step x answers_per_prompt"
                f" = {answers}"
            )
        if self.ptx is not None and not self.settings.get("ptx_coef"):
            raise ValueError(
                "ptx without settings.ptx_coef teaches nothing; set settings.ptx_coef above 0, or leave out ptx"
            )
        if self.ptx is None and self.settings.get("ptx_coef"):
            raise ValueError("settings.ptx_coef needs ptx.data: which demonstrations to learn beside the reward")
        if self.value.start == "zero" and self.value.warmup_steps:
            raise ValueError(
                'value.warmup_steps needs a critic with weights of its own: value.start="reward" or "base"'
            )
        if self.truncated == "soft" and self.soft_tokens > self.rollout.max_new_tokens:
            raise ValueError(
                f"soft_tokens={self.soft_tokens} is more than rollout.max_new_tokens={self.rollout.max_new_tokens}"
            )
        if (self.reward_model is None) == (not self.rewards):
            raise ValueError("set either reward_model (a folder) or rewards (named parts)")
        if self.gold not in (None, "simulated") and (self.gold not in self.rewards or self.rewards[self.gold].weight):
            raise ValueError(
                f'gold="{self.gold}": give "simulated", or the name of a part of rewards with weight: 0, which watches'
                " and is not learnt from"
            )
        _refuse_dropout(self.lora)
        _refuse_dropout(self.value.lora, "value.lora")
        return self

    @property
    def parts(self) -> Mapping[str, RewardPart]:
        """The reward's parts by name, in whichever way they were written."""
        return self.rewards or {"model": ModelPart(type="model", folder=self.reward_model or "")}

    @property
    def reward_models(self) -> tuple[str, ...]:
        """Folders of the learned reward models among the parts, each once."""
        found: dict[str, None] = {}
        for part in self.parts.values():
            if isinstance(part, ModelPart):
                found[part.folder] = None
            elif isinstance(part, EnsemblePart):
                found |= dict.fromkeys(part.folders)
        return tuple(found)


class SampleConfig(StageConfig):
    """Answers of a model to prompts."""

    kind: Literal["sample"] = "sample"
    prompts: DataConfig
    answers_per_prompt: Positive = 1
    best_of: Positive = 1
    """Answers sampled for each one that is kept: the one with the reward model's highest score."""
    reward_model: str | None = None
    """Folder of a reward model; every answer then comes with its score."""
    max_new_tokens: Positive = 64
    temperature: NonNegative = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Natural = 0
    engine: Literal["native", "huggingface"] = "native"
    max_batch: Positive = 64
    measure_kl: bool = False
    """Measure how far the model is from the one its last adapter was trained on, in nats an answer."""

    @model_validator(mode="after")
    def _the_best_can_be_told(self) -> SampleConfig:
        if self.best_of == 1:
            return self
        if self.reward_model is None:
            raise ValueError(f"best_of={self.best_of} needs reward_model: who says which answer is the best")
        if self.temperature == 0:
            raise ValueError(
                f"best_of={self.best_of} with temperature=0 chooses among equal answers; raise temperature"
            )
        if self.measure_kl:
            raise ValueError(
                f"measure_kl is of the model's own answers, best_of={self.best_of} keeps others; leave out one of them"
            )
        return self


class RankConfig(Settings):
    """Answers to rankings: by the simulated annotator, or people's own file checked and taken over."""

    kind: Literal["rank"] = "rank"
    description: str = ""
    seed: Seed = 1
    answers: str | None = None
    """answers.jsonl of a sample stage, for the simulated annotator."""
    rankings: str | None = None
    """A file of human rankings; then nothing is simulated."""
    noise: Above0 = 0.12
    """Of the simulated annotator: a pair is ordered rightly with probability sigmoid(gold difference / noise)."""

    @model_validator(mode="after")
    def _one_of_two(self) -> RankConfig:
        if (self.answers is None) == (self.rankings is None):
            raise ValueError("set either answers (simulated annotator) or rankings (people's own file)")
        return self


class EvaluateConfig(Settings):
    """Two models' answers to the same held-out prompts, compared."""

    kind: Literal["evaluate"] = "evaluate"
    description: str = ""
    seed: Seed = 1
    before: str
    """answers.jsonl of the model to beat."""
    after: str
    """answers.jsonl of the model in question, to the same prompts."""
    judge: Literal["gold", "reward", "model"] = "gold"
    """gold: the simulated annotator's hidden preference; reward: the reward model's score; model: `pair_judge`."""
    pair_judge: JudgeConfig | None = None
    """The model that is shown both answers to each prompt, in both orders, and says which is better."""
    reward_model: str | None = None
    """Folder of a reward model whose score stands beside the gold."""
    rankings: tuple[str, ...] = ()
    """Held-out rankings on which the reward model's accuracy is measured."""
    model: ModelConfig = ModelConfig()
    max_tokens: Positive = 512

    @model_validator(mode="after")
    def _judge_is_there(self) -> EvaluateConfig:
        if self.judge == "reward" and self.reward_model is None:
            raise ValueError("judge=reward needs reward_model")
        if self.judge == "model" and self.pair_judge is None:
            raise ValueError("judge=model needs pair_judge: set which model is asked (pair_judge.model.name)")
        if self.judge != "model" and self.pair_judge is not None:
            raise ValueError(f"pair_judge is asked nothing with judge={self.judge}; set judge=model, or leave it out")
        return self


STAGE_KINDS: Mapping[str, type[Settings]] = {
    "sft": SftConfig,
    "reward": RewardConfig,
    "dpo": DpoConfig,
    "ppo": PpoConfig,
    "sample": SampleConfig,
    "rank": RankConfig,
    "evaluate": EvaluateConfig,
}


class PipelineConfig(Settings):
    """Stages in order; "stage:NAME/file" in a setting names an earlier stage's product."""

    description: str = ""
    folder: str = "runs/pipeline"
    seed: Seed = 1
    """Of every stage that does not set its own."""
    model: ModelConfig = ModelConfig()
    """Of every stage that does not set its own."""
    gates: Literal["stop", "warn"] = "stop"
    """stop: a stage is not begun that rests on one which failed its gate. warn: it is, and is told so."""
    stages: Mapping[PlainName, Mapping[str, Any] | None]
    """Each by name, with its kind and settings; null leaves out a stage of the recipe below."""


def _refuse_dropout(lora: LoraConfig | None, name: str = "lora") -> None:
    if lora is not None and lora.dropout > 0:
        raise ValueError(f"{name}.dropout={lora.dropout} must be 0 here: dropout breaks the ratio and the margins")

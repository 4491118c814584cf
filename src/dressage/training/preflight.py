"""What a run will take, told before it begins: the data are read, no weights are.

Time is floating-point operations, divided by the speed of a matrix product measured on the spot, times OVERHEAD. With N
weights in the layers passed, a token costs 2 N forward; backward 2 N in the layers that hold adapters, 4 N with full
weights. Logits are taken of answers alone. Attention between tokens is left out: sequences are short here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch

from dressage.algorithms.catalog import algorithm, preference_algorithm
from dressage.algorithms.trust_region import ITERATIONS
from dressage.batches import PreferenceBatch, RatingBatch
from dressage.config import (
    DataConfig,
    DpoConfig,
    EvaluateConfig,
    LoraConfig,
    PpoConfig,
    RankConfig,
    RewardConfig,
    SampleConfig,
    SftConfig,
    TrainingConfig,
)
from dressage.data.order import batch_indices, length_sorted_chunks, steps_per_epoch
from dressage.data.sources import read_rankings
from dressage.errors import DataError
from dressage.models.files import role_meta, saved_model
from dressage.monitor.writers import clock
from dressage.settings import ModelConfig, Settings
from dressage.training.cost import Reader, Shape, frozen_weights, memory_of, product_speed, shape_of, within
from dressage.training.online import learnt_answers, online_algorithm, online_settings, ranked_answers

Records = Literal["demonstrations", "rankings", "ratings", "prompts"]
Read = Callable[[Records, DataConfig, ModelConfig, int], Any]
"""Reads, splits and encodes records: an object with `train` and `heldout`."""
Check = Callable[[PpoConfig, Sequence[Any]], None]
"""Tries the reward's parts on the prompts; an error if the run would earn nothing from one."""
Said = dict[str, str]

OVERHEAD = 1.5
"""Norms, attention, copies and Python beside the products; measured on SmolLM2-135M on two cores."""
LAID_OUT = 200
"""Steps of which the batches are laid out one by one; a longer run is taken to go on like them."""


class Row(NamedTuple):
    """Tokens of each sequence of a record (a ranking has several), and how many of them are answers'."""

    lengths: tuple[int, ...]
    answers: int


class Foresight:
    """Looks at stages in order; what an earlier one will make is known to a later one by its settings."""

    def __init__(self, read: Read, check: Check) -> None:
        self.read = read
        self.check = check
        self.made: dict[Path, Settings] = {}
        self.seconds: list[float] = []
        self.memory: list[float] = []

    def of(self, settings: Settings, folder: Path) -> Said:
        """What this stage reads, does, learns and takes; the same errors as the run itself for what it reads."""
        match settings:
            case SftConfig() | RewardConfig() | DpoConfig():
                said = self._offline(settings)
            case PpoConfig():
                said = self._ppo(settings)
            case SampleConfig():
                said = self._sample(settings)
            case EvaluateConfig():
                said = self._evaluate(settings)
            case RankConfig():
                rows, known = self._rankings(settings)
                said = {"data": f"{rows} rankings{_if_known(known)}"}
            case _:
                said = {}
        self.made[folder] = settings
        return said

    def altogether(self) -> list[str]:
        """A line for a whole pipeline."""
        if len(self.made) < 2:
            return []
        return [
            f"altogether about {clock(sum(self.seconds))}, at most about {max(self.memory, default=0) / 1e9:.1f} GB"
        ]

    # --- kinds of stages ----------------------------------------------------------------------------------------------

    def _offline(self, config: SftConfig | RewardConfig | DpoConfig) -> Said:
        model = self._model(config.model)
        kind: Records = "demonstrations" if isinstance(config, SftConfig) else "rankings"
        passes = 0  # of the policy as it is found, over all answers: its own reference
        if isinstance(config, RewardConfig):
            algorithm(f"reward_{config.loss}").with_settings(config.settings)
        if isinstance(config, DpoConfig):
            row = preference_algorithm(config.algorithm).with_settings(config.settings)
            passes = int("reference" in row.roles)
            if RatingBatch in row.losses:
                kind, passes = "ratings", 2 * passes
        train, heldout, known = self._rows(kind, config.data, config.model, config.seed)
        shape = shape_of(model)
        reader = Reader(shape, config.lora, getattr(config, "depth", None))
        training = within(config.training, shape, frozen_weights(shape, 1, (), [reader]), [reader])
        steps = training.steps or training.epochs * steps_per_epoch(len(train), training.batch_size)
        laid = [
            [train[i] for i in batch_indices(len(train), training.batch_size, step, config.seed)]
            for step in range(min(steps, LAID_OUT))
        ]
        cut = [list(_cut(rows, training)) for rows in laid]
        padded = fmean(sum(sizes) for sizes in cut)
        answers = (
            fmean(sum(row.answers for row in rows) for rows in laid) if not isinstance(config, RewardConfig) else 0.0
        )
        looks = 2 + (steps // training.evaluate_every if training.evaluate_every else 0)
        flops = steps * (padded * reader.training + answers * 2 * shape.head)
        flops += (looks + passes) * sum(sum(row.lengths) for row in heldout) * reader.forward
        flops += passes * sum(sum(row.lengths) * reader.forward + row.answers * shape.head for row in train)
        if kind == "ratings":
            flops += steps * padded * reader.forward  # an unrelated answer to each, for the KL
        sequences = f" of {fmean(len(row.lengths) for row in train):.1f} answers" if kind == "rankings" else ""
        most = max(map(max, cut))
        return {
            "data": f"{len(train)} rows{sequences} to learn from, {len(heldout)} held out;"
            f" {_lengths(train)}{_if_known(known)}",
            "work": f"{steps} steps of {training.batch_size} rows, each one update, in {_pieces(cut)}"
            f" of at most {most} padded tokens; {padded:.0f} tokens a step",
            **self._taken(shape, flops, [reader], micro_batch=most, budget=training.memory_gb),
        }

    def _ppo(self, config: PpoConfig) -> Said:
        rollout, training = config.rollout, config.training
        prompts, _, known = self._rows("prompts", config.prompts, config.model, config.seed)
        shape = shape_of(self._model(config.model))
        row = online_algorithm(config)
        if known:
            self.check(config, self.read("prompts", config.prompts, self._model(config.model), config.seed).train)
        policy, judges = Reader(shape, config.lora), []
        # Models in memory beside the policy's base and its copy.
        others: list[Shape] = []
        for folder in config.reward_models:
            judged_by, depth, reward_lora = self._reward_model(folder)
            judges.append(Reader(shape_of(self._model(judged_by)), reward_lora, depth))
            if config.lora is None or not _one_base(judged_by, config.model):
                others.append(judges[-1].shape)
        judging = sum(judge.forward for judge in judges)
        settings, own_critic = online_settings(row), "value" in row.roles and config.value.start != "zero"
        learners = [policy]
        if own_critic:
            critic = Reader(shape, config.value.lora) if config.value.start == "base" else judges[0]
            if config.value.model is not None:
                critic = Reader(shape_of(self._model(config.value.model)), config.value.lora)
            if config.value.model is not None or critic.lora is None:
                others.append(critic.shape)
            learners.append(critic)
        answers, steps = rollout.prompts_per_step * rollout.answers_per_prompt, training.steps or 1
        asked = [
            Row((prompts[i].lengths[0] + rollout.max_new_tokens,), rollout.max_new_tokens)
            for i in batch_indices(len(prompts), rollout.prompts_per_step, 0, config.seed)
            for _ in range(rollout.answers_per_prompt)
        ]
        tokens, new = sum(sum(row.lengths) for row in asked), len(asked) * rollout.max_new_tokens
        # A round cannot ask more prompts than there are.
        learnt = max(1, learnt_answers(row, config) * len(asked) // answers)
        # Who learns from all rounds so far learns most in the last one.
        at_last, mean = (learnt * steps, learnt * (steps + 1) / 2) if row.afresh else (learnt, learnt)
        size = config.minibatch_size or at_last
        # What is selected lies evenly among the answers; those to one prompt are equally long here.
        taught = [asked[i % learnt * len(asked) // learnt] for i in range(at_last)]
        k = ranked_answers(row, config) if PreferenceBatch in row.losses else 1
        units = [Row(one.lengths * k, one.answers * k) for one in taught[::k]]
        # With whole weights the reference is a model of its own; so are the first weights, to begin from again.
        copies = 1 if config.lora is not None else 2 + row.afresh
        training = within(training, shape, frozen_weights(shape, copies, others, learners), learners)
        cut = [list(_cut(units[start : start + size // k], training)) for start in range(0, len(units), size // k)]
        # Sampling; then the reference's and, unless the engine's are taken, the policy's log-probs; then the reward.
        trunk_critic = "value" in row.roles and not own_critic
        reuse = shape.bytes_each == 4 if rollout.reuse_engine_logprobs is None else rollout.reuse_engine_logprobs
        scored = 1 if reuse and not trunk_critic else 2
        forward = tokens * policy.forward + new * shape.head
        flops = forward * (1 + scored) + tokens * (judging + sum(learner.forward for learner in learners[1:]))
        if row.greedy_baseline:
            flops += (forward + tokens * judging) / rollout.answers_per_prompt
        # At most: prompts are drawn again only where answers score the same.
        flops += settings.redraws * (forward + tokens * judging)
        training_flops = sum(tokens * learner.training for learner in learners) + new * 2 * shape.head
        flops += config.reuse * mean / len(asked) * training_flops
        if settings.full_kl or config.kl.watch_full:
            flops += config.reuse * (forward + new * 3 * shape.head)
        if settings.max_kl is not None:
            # A product is a forward pass and two backward ones; a trial reads the loss, and the policy twice.
            product = (settings.curvature_share or 1) * (2 * tokens * policy.training + 6 * new * shape.head)
            flops += config.reuse * ((ITERATIONS + 2) * product + 3 * forward)
        updates = config.reuse * len(cut)
        of = f" {learnt} are learnt from," if learnt < len(asked) else ""
        of += f" each time all so far from the first weights on, at last {at_last};" if row.afresh else ""
        again = f", at most {settings.redraws} draws more where answers score the same" if settings.redraws else ""
        ptx = ""
        if config.ptx is not None:
            rows, _, _ = self._rows("demonstrations", config.ptx.data, config.model, config.seed)
            length = fmean(row.lengths[0] for row in rows)
            flops += updates * config.ptx.batch_size * length * policy.training
            ptx = f", and {config.ptx.batch_size} demonstrations of {length:.0f} tokens in each update"
        cached = min(rollout.max_batch, answers) * max(row.lengths[0] for row in asked)
        merges = config.lora is not None and shape.bytes_each == 4 and training.memory_gb is None
        merged = policy.learnt * shape.layer_weights if merges else 0
        most = max(map(max, cut))
        return {
            "data": f"{len(prompts)} prompts; {_lengths(prompts)}{_if_known(known)}",
            "work": f"{steps} rounds of {rollout.prompts_per_step} prompts x {rollout.answers_per_prompt} answers ="
            f" {answers} answers of at most {rollout.max_new_tokens} tokens{again};{of}"
            f" {updates} updates a round ({config.reuse} x {at_last} / {size}), each in {_pieces(cut)} of at most"
            f" {most} padded tokens; {tokens} tokens a round{ptx}",
            **self._taken(
                shape,
                steps * flops,
                learners,
                micro_batch=most,
                budget=training.memory_gb,
                cached=cached,
                merged=merged,
                copies=copies,
                others=others,
            ),
        }

    def _sample(self, config: SampleConfig) -> Said:
        prompts, known = self._prompts(config)
        shape = shape_of(self._model(config.model))
        each = config.answers_per_prompt * config.best_of
        reader, answers = Reader(shape), len(prompts) * each
        tokens = sum(row.lengths[0] + config.max_new_tokens for row in prompts) * each
        flops = tokens * reader.forward + answers * config.max_new_tokens * shape.head
        if config.reward_model is not None:
            judged_by, depth, lora = self._reward_model(config.reward_model)
            flops += tokens * Reader(shape_of(self._model(judged_by)), lora, depth).forward
        kept = f" of which the best of every {config.best_of} is kept" if config.best_of > 1 else ""
        longest = max(row.lengths[0] for row in prompts) + config.max_new_tokens
        cached = min(config.max_batch, answers) * longest
        return {
            "data": f"{len(prompts)} prompts; {_lengths(prompts)}{_if_known(known)}",
            "work": f"{len(prompts)} prompts x {each} answers = {answers} answers{kept}, of at most"
            f" {config.max_new_tokens} tokens, {min(config.max_batch, answers)} at once",
            **self._taken(shape, flops * (2 if config.measure_kl else 1), cached=cached),
        }

    def _evaluate(self, config: EvaluateConfig) -> Said:
        (before, known), (after, also) = (self._answers(path) for path in (config.before, config.after))
        said = {"data": f"{before} answers before, {after} after{_if_known(known and also)}"}
        if config.pair_judge is not None:
            said["work"] = f"{2 * after} questions to the judge: each pair in both orders"
        if config.reward_model is None:
            return said
        shape = shape_of(self._model(config.model))
        _, depth, lora = self._reward_model(config.reward_model)
        tokens = sum(self._tokens(path) for path in (config.before, config.after))
        return said | self._taken(shape, tokens * Reader(shape, lora, depth).forward)

    def _taken(
        self,
        shape: Shape,
        flops: float,
        learners: Sequence[Reader] = (),
        *,
        micro_batch: int = 0,
        budget: float | None = None,
        cached: int = 0,
        merged: int = 0,
        copies: int = 1,
        others: Sequence[Shape] = (),
    ) -> Said:
        """Memory and time in words, remembered for the sum.

        `budget`: training.memory_gb; `cached`: tokens whose keys and values are kept; `merged`: weights copied for the
        time of sampling; `others`: models in memory beside the `copies` of this one.
        """
        learning = sum(learner.learning for learner in learners)
        frozen = frozen_weights(shape, copies, others, learners)
        activations = micro_batch * max((learner.kept_bytes for learner in learners), default=0.0)
        sampling = (cached * shape.depth * shape.cached + merged) * shape.bytes_each
        memory = memory_of(shape, frozen, learning, max(activations, sampling))
        over = ""
        if budget is not None and activations > sampling and memory > budget * 1e9:
            over = f", above training.memory_gb={budget}: no text or ranking is cut; one has {micro_batch} tokens"
        speed = product_speed(torch.bfloat16 if shape.bytes_each == 2 else torch.float32)
        seconds = OVERHEAD * flops / speed
        self.memory.append(memory)
        self.seconds.append(seconds)
        return (
            {"learns": f"{learning:,} of {shape.weights + sum(other.weights for other in others):,} weights"}
            if learners
            else {}
        ) | {
            "memory": f"about {memory / 1e9:.1f} GB{over}",
            "time": f"about {clock(seconds)} ({flops:.1e} operations, products at {speed / 1e9:.0f} GFLOP/s)",
        }

    # --- what a stage reads -------------------------------------------------------------------------------------------

    def _maker(self, path: str) -> Any:
        """The settings of the stage that will make this file or folder; None if it is there, or no stage's."""
        if Path(path).exists():
            return None
        return next((settings for folder, settings in self.made.items() if Path(path).is_relative_to(folder)), None)

    def _model(self, model: ModelConfig) -> ModelConfig:
        """A model of the same shape and tokenizer that is there: the one from which a stage to come begins."""
        maker = self._maker(model.name)
        return model if maker is None else self._model(model.model_copy(update={"name": maker.model.name}))

    def _reward_model(self, folder: str) -> tuple[ModelConfig, int | None, LoraConfig | None]:
        """What it stands on, how many layers it reads, and its adapter."""
        maker = self._maker(folder)
        if maker is not None:
            return maker.model, maker.depth, maker.lora
        meta = role_meta(Path(folder))
        return saved_model(Path(folder)), meta["depth"], LoraConfig(**meta["lora"]) if "lora" in meta else None

    def _rows(
        self, kind: Records, data: DataConfig, model: ModelConfig, seed: int
    ) -> tuple[list[Row], list[Row], bool]:
        """What is learnt from and what is held out, and whether that is known or guessed from settings."""
        data = data.model_copy(update={"sources": tuple(map(self._origin, data.sources))})
        if all(self._maker(source) is None for source in (*data.sources, *data.heldout)):
            rows = self.read(kind, data, self._model(model), seed)
            return [_row(row) for row in rows.train], [_row(row) for row in rows.heldout], True
        alone = data.model_copy(update={"heldout": (), "heldout_fraction": 0.0})

        def rows_of(path: str) -> list[Row]:
            if self._maker(path) is not None:
                rows = self._coming(path)
                return _best_and_worst(rows) if kind == "ratings" else rows
            return self._rows(kind, alone.model_copy(update={"sources": (path,)}), model, seed)[0]

        train, heldout = ([row for path in paths for row in rows_of(path)] for paths in (data.sources, data.heldout))
        if not heldout and data.heldout_fraction:
            kept = max(1, round(len(train) * (1 - data.heldout_fraction)))
            train, heldout = train[:kept], train[kept:]
        return train, heldout, False

    def _origin(self, path: str) -> str:
        """People's own rankings for the file that a stage to come takes them over into; else the path itself."""
        maker = self._maker(path)
        return maker.rankings if isinstance(maker, RankConfig) and maker.rankings is not None else path

    def _coming(self, path: str) -> list[Row]:
        """Rows of a file that a stage to come will write, at their longest."""
        maker = self._maker(path)
        if isinstance(maker, RankConfig) and maker.answers is not None:
            return self._coming(maker.answers)
        if isinstance(maker, SampleConfig):
            new = maker.max_new_tokens
            return [
                Row((row.lengths[0] + new,) * maker.answers_per_prompt, new * maker.answers_per_prompt)
                for row in self._prompts(maker)[0]
            ]
        raise DataError(f"{path}: no such file, and no stage before this one makes it")

    def _prompts(self, config: SampleConfig) -> tuple[list[Row], bool]:
        data = config.prompts.model_copy(update={"heldout_fraction": 0.0})
        rows, _, known = self._rows("prompts", data, config.model, config.seed)
        return rows, known

    def _rankings(self, config: RankConfig) -> tuple[int, bool]:
        if config.rankings is not None:
            return len(read_rankings(config.rankings).records), True
        assert config.answers is not None
        return self._answers(config.answers)

    def _tokens(self, path: str) -> float:
        """Of all first answers with their prompts; of a file that is there a guess, three letters to a token."""
        if self._maker(path) is not None:
            return sum(row.lengths[0] for row in self._coming(path))
        return Path(path).stat().st_size / 3

    def _answers(self, path: str) -> tuple[int, bool]:
        """Prompts answered in an answers.jsonl that is there or to come."""
        if self._maker(path) is not None:
            return len(self._coming(path)), False
        try:
            with Path(path).open(encoding="utf-8") as lines:
                return sum(1 for line in lines if line.strip()), True
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); make it with `dressage sample`") from error


def _one_base(one: ModelConfig, other: ModelConfig) -> bool:
    """Are these the same weights, as far as names tell? They may not be there yet."""
    return one.dtype == other.dtype and Path(one.name).resolve() == Path(other.name).resolve()


def _row(encoded: Any) -> Row:
    """Of a prompt, a demonstration, a ranking or a rating; the unrelated answer of a rating is left out."""
    if hasattr(encoded, "ranks"):
        return Row(
            tuple(len(answer.tokens) for answer in encoded.answers), sum(sum(a.loss_mask) for a in encoded.answers)
        )
    text = encoded.answers[0] if hasattr(encoded, "answers") else encoded
    return Row((len(text.tokens),), sum(getattr(text, "loss_mask", ())))


def _best_and_worst(rows: Sequence[Row]) -> list[Row]:
    """Two ratings of each ranking, as its reader makes them."""
    return [Row((length,), row.answers // len(row.lengths)) for row in rows for length in row.lengths[:2]]


def _cut(rows: Sequence[Row], training: TrainingConfig) -> Iterator[int]:
    """Padded tokens of each micro-batch of an update, cut as the update cuts them."""
    lengths = [length for row in rows for length in row.lengths]
    group = [number for number, row in enumerate(rows) for _ in row.lengths]
    for chunk in length_sorted_chunks(lengths, training.micro_batch_tokens, group):
        yield len(chunk) * max(lengths[i] for i in chunk)


def _pieces(cut: Sequence[Sequence[int]]) -> str:
    low, high = min(map(len, cut)), max(map(len, cut))
    return ("" if low == high else f"{low} to ") + (f"{high} micro-batches" if high > 1 else "1 micro-batch")


def _lengths(rows: Sequence[Row]) -> str:
    lengths = [length for row in rows for length in row.lengths]
    return f"{fmean(lengths):.0f} tokens each, {max(lengths)} the longest"


def _if_known(known: bool) -> str:
    return "" if known else " (at most: known once the stages before have run)"

"""Our losses, advantages and gradients beside TRL's on the same random inputs: equal to 1e-6, or different and why.

    python -m venv trl && trl/bin/pip install torch==2.13.0 transformers==5.23.0 peft accelerate datasets trl==1.16.0
    PYTHONPATH=src trl/bin/python benchmarks/against_trl.py

With trl==1.12.0, the last release that has it, PPO is compared; with trl==1.16.0 the rest. TRL pins other packages, so
it needs an environment of its own. Its own trainers are called, on random models of two layers. A difference has two
lines: what is found as it stands, and that nothing is left once its reason, told in docs/numerics.md, is put aside.
The exit status is 1 if what should be equal is not, or what should differ does not.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from types import MethodType, SimpleNamespace
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from torch import Tensor

from dressage.algorithms.advantages import gae, group_centered, group_normalized, leave_one_out
from dressage.algorithms.aggregate import Totals, aggregate, aggregate_pairs, count
from dressage.algorithms.catalog import Algorithm, algorithm
from dressage.algorithms.kl import k1
from dressage.algorithms.policy_gradient import PolicyGradientSettings, policy_loss
from dressage.algorithms.preference import log_ratio, summed_over_answers
from dressage.batches import Experience, PreferenceBatch, RatingBatch, TokenScores
from dressage.experience.build import earned
from dressage.tensors import masked_mean, masked_var, position_ids, token_logprobs, whiten

TOLERANCE = 1e-6
PINS = "torch==2.13.0 transformers==5.23.0 peft accelerate datasets trl=="
WORDS, PAD, END = 40, 0, 1
SHAPES = ((2, 5), (6, 9), (8, 24))  # sequences or pairs, longest answer
LIMIT = 24  # of an answer, in tokens
MICRO = 8  # rows in a micro-batch of PPO's
PPO = {"gamma": 0.9, "lam": 0.8, "kl_coef": 0.05, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1}

Found = tuple[Tensor, Sequence[Tensor]]
"""A loss with its gradients, or advantages with none."""
Both = Iterator[tuple[Found, Found]]
"""Ours and TRL's, input by input."""
Examples = list[dict[str, Any]]


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The largest differences over all inputs, and of TRL's gradients the largest, to see them beside."""

    piece: str
    peer: str
    value: float
    gradient: float | None
    largest: float | None
    differs: bool

    @property
    def good(self) -> bool:
        return (max(self.value, self.gradient or 0.0) > TOLERANCE) is self.differs


def row(piece: str, peer: str, found: Iterable[tuple[Found, Found]], *, differs: bool = False) -> Row:
    values, gradients, sizes = [], [], []
    for (ours, our_gradients), (theirs, their_gradients) in found:
        assert ours.shape == theirs.shape
        values.append(_largest(ours - theirs))
        gradients += [_largest(a - b) for a, b in zip(our_gradients, their_gradients, strict=True)]
        sizes += map(_largest, their_gradients)
    return Row(piece, peer, max(values), max(gradients, default=None), max(sizes, default=None), differs)


def _largest(values: Tensor) -> float:
    # NaN would get lost in a maximum.
    return float(values.detach().double().nan_to_num(nan=float("inf")).abs().amax())


def table(rows: Iterable[Row]) -> bool:
    """Prints the rows as they come; whether all are as they should be."""
    good = True
    print("| piece | TRL | value, differs by | gradient, differs by | largest gradient | |\n|---|---|---|---|---|---|")
    for found in rows:
        verdict = ("" if found.good else "NOT ") + ("differs, explained" if found.differs else "equal")
        numbers = ("" if x is None else f"{x:.0e}" for x in (found.value, found.gradient, found.largest))
        print(f"| {found.piece} | `{found.peer}` | {' | '.join(numbers)} | {verdict} |", flush=True)
        good &= found.good
    return good


# --- models and texts -------------------------------------------------------------------------------------------------


def words() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbered = {"<pad>": PAD, "<end>": END} | {f"w{i}": i for i in range(2, WORDS)}
    plain = Tokenizer(models.WordLevel(numbered, unk_token="w2"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<end>", padding_side="left")


def tiny(kind: str, seed: int) -> Any:
    """A random Llama of two layers; `kind` is its class in transformers."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.2,  # wide, so that gradients are of the size of real ones
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
        num_labels=1,
    )
    return getattr(transformers, kind)(config).train()


def language_model(seed: int) -> Any:
    return tiny("LlamaForCausalLM", seed)


def exact(model: Any) -> Any:
    """In float64, with a plain softmax where the trainer had put a fused one of float32."""
    plain = type(model).forward

    @functools.wraps(plain)  # it is asked for its arguments
    def forward(self: Any, *given: Any, labels: Any = None, fused_lm_head: bool = False, **named: Any) -> Any:
        result = plain(self, *given, **named)
        if not fused_lm_head:
            return result
        logits, targets = result.logits[:, :-1], labels[:, 1:]
        said = logits.log_softmax(-1)
        return SimpleNamespace(
            log_probs=said.gather(-1, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets == -100, 0.0),
            entropy=-(said.exp() * said).sum(-1),
            mean_logits=logits.mean(-1),
            is_top1=logits.argmax(-1) == targets,
        )

    model.double().forward = MethodType(forward, model)
    return model


def our_logprobs(model: Any, tokens: Tensor, attention_mask: Tensor) -> Tensor:
    """Log-probabilities [B, T] by our own chunked softmax: position t speaks about token t."""
    hidden = model.model(tokens, attention_mask=attention_mask, position_ids=position_ids(attention_mask))[0]
    said, _ = token_logprobs(hidden[:, :-1].flatten(0, 1), model.lm_head.weight, tokens[:, 1:].flatten(), chunk=16)
    return torch.nn.functional.pad(said.view(len(tokens), -1), (1, 0))


def our_answer_logprobs(model: Any, batch: PreferenceBatch | RatingBatch) -> Tensor:
    return summed_over_answers(our_logprobs(model, batch.tokens, batch.attention_mask), batch.response_mask)


def gradients(loss: Tensor, model: Any) -> Found:
    """A loss with the gradient of every parameter."""
    return loss, torch.autograd.grad(loss, list(model.parameters()))


def ids(generator: torch.Generator, low: int, high: int) -> list[int]:
    """Random tokens, between `low` and `high` of them."""
    length = int(torch.randint(low, high + 1, (), generator=generator))
    return torch.randint(2, WORDS, (length,), generator=generator).tolist()


def padded(texts: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, attention mask and response mask of prompts with their answers, padded on the right."""
    width = max(len(prompt) + len(answer) for prompt, answer in texts)
    tokens = torch.full((len(texts), width), PAD)
    attention, response = torch.zeros(2, len(texts), width, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(texts):
        end = len(prompt) + len(answer)
        tokens[i, :end] = torch.tensor(prompt + answer)
        attention[i, :end] = True
        response[i, len(prompt) : end] = True
    return tokens, attention, response


def made(kind: Any, config: Any, given: dict[str, Any], **settings: Any) -> Any:
    """A trainer of TRL's that logs and saves nothing."""
    quiet = {"report_to": "none", "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "output_dir": tempfile.gettempdir()}
    return kind(args=config(**quiet, **plain, **settings), **given)


# --- preferences ------------------------------------------------------------------------------------------------------


def preference_rows(tokenizer: Any) -> Iterator[Row]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    records = Dataset.from_list([{"prompt": "w2 w3", "chosen": " w4", "rejected": " w5"}] * 2)
    given = {"train_dataset": records, "processing_class": tokenizer}

    def dpo(**settings: Any) -> Any:
        models = {"model": language_model(1), "ref_model": language_model(2)}
        trainer = made(DPOTrainer, DPOConfig, given | models, **settings)
        exact(trainer.model), exact(trainer.ref_model)
        return trainer

    def compared(trainer: Any, name: str, at_once: int = MICRO, **settings: float) -> Both:
        row_ = algorithm(name).with_settings(settings)
        for examples in comparisons():
            for some in (examples[i : i + at_once] for i in range(0, len(examples), at_once)):
                theirs = trainer.compute_loss(trainer.model, trainer.data_collator(some))
                ours = our_preference_loss(row_, trainer.model, some, trainer.ref_model)
                yield gradients(ours, trainer.model), gradients(theirs, trainer.model)

    fused = made(DPOTrainer, DPOConfig, given | {"model": language_model(1), "ref_model": language_model(2)})

    def as_it_is() -> Both:
        for examples in comparisons():
            batch = together(examples)
            labels = batch.tokens.masked_fill(~batch.response_mask, -100)
            theirs = fused.model(batch.tokens, batch.attention_mask, labels=labels, fused_lm_head=True).log_probs
            ours = our_logprobs(fused.model, batch.tokens, batch.attention_mask)
            yield (
                gradients(masked_mean(ours.exp(), batch.response_mask), fused.model),
                gradients(masked_mean(theirs.exp(), batch.response_mask[:, 1:]), fused.model),
            )

    yield row("probabilities of tokens, float32", "add_fused_lm_head", as_it_is())
    for beta in (0.1, 0.5):
        sigmoid, ipo = dpo(loss_type="sigmoid", beta=beta), dpo(loss_type="ipo", beta=beta)
        yield row(f"DPO, beta {beta}", "DPOTrainer sigmoid", compared(sigmoid, "dpo", beta=beta))
        yield row(f"IPO, beta {beta}", "DPOTrainer ipo", compared(ipo, "ipo", beta=beta))
    smoothed = dpo(loss_type="sigmoid", label_smoothing=0.1)
    yield row("cDPO, label smoothing 0.1", "DPOTrainer sigmoid", compared(smoothed, "cdpo"), differs=True)
    yield row("... it does not smooth: DPO", "DPOTrainer sigmoid", compared(smoothed, "dpo"))
    smoothed = dpo(loss_type="aot", label_smoothing=0.1)
    yield row("... cDPO, a pair at a time", "DPOTrainer aot", compared(smoothed, "cdpo", at_once=1))

    def without_reference(name: str, trainer: Any, **kind: bool) -> Both:
        for examples in comparisons(**kind):
            theirs, _ = trainer.get_batch_loss_metrics(trainer.model, separate(examples))
            ours = our_preference_loss(algorithm(name), trainer.model, examples)
            yield gradients(ours, trainer.model), gradients(theirs, trainer.model)

    models = {"model": language_model(1).double()}
    settings = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}
    simpo = made(CPOTrainer, CPOConfig, given | models, **settings)
    yield row("SimPO, beta 2, margin 1", "CPOTrainer simpo, cpo_alpha=0", without_reference("simpo", simpo))

    orpo = made(ORPOTrainer, ORPOConfig, given | models, beta=0.1)
    yield row("ORPO", "ORPOTrainer", without_reference("orpo", orpo), differs=True)
    alike = without_reference("orpo", orpo, no_prompt=True, alike=True)
    yield row("... prompts of a token, better answers of one length", "ORPOTrainer", alike)

    def odds() -> Both:
        for examples in comparisons():
            better, worse, *_ = orpo.concatenated_forward(orpo.model, separate(examples))
            losses, *_ = orpo.odds_ratio_loss(better, worse)
            ours = our_preference_loss(algorithm("orpo"), orpo.model, examples, only="odds")
            yield gradients(ours, orpo.model), gradients(-losses.mean(), orpo.model)

    yield row("... the odds ratio alone", "ORPOTrainer.odds_ratio_loss", odds())


def comparisons(*, no_prompt: bool = False, alike: bool = False) -> Iterator[Examples]:
    """Pairs of every shape; with prompts of a single token, or better answers of one length, if asked."""
    for seed, (size, width) in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(seed)
        yield [
            {
                "prompt_ids": ids(generator, 1, 1 if no_prompt else 7),
                "chosen_ids": ids(generator, width if alike else 1, width),
                "rejected_ids": ids(generator, 1, width),
            }
            for _ in range(size)
        ]


def together(examples: Examples) -> PreferenceBatch:
    """Our batch of them: first the better answers, then the worse."""
    texts = padded([(one["prompt_ids"], one[side]) for side in ("chosen_ids", "rejected_ids") for one in examples])
    number = torch.arange(len(examples))
    rank = torch.arange(2).repeat_interleave(len(number))
    return PreferenceBatch(*texts, last=texts[1].sum(-1) - 1, group=number.repeat(2), rank=rank)


def separate(examples: Examples) -> dict[str, Tensor]:
    """What CPO's and ORPO's trainers take."""
    batch = {}
    for side in ("chosen", "rejected"):
        tokens, attention, response = padded([(one["prompt_ids"], one[f"{side}_ids"]) for one in examples])
        batch |= {f"{side}_input_ids": tokens, f"{side}_attention_mask": attention.long()}
        batch[f"{side}_labels"] = tokens.masked_fill(~response, -100)
    return batch


def our_preference_loss(
    row_: Algorithm, model: Any, examples: Examples, reference: Any = None, only: str | None = None
) -> Tensor:
    batch, number = together(examples), torch.arange(len(examples))
    if reference is not None:
        with torch.no_grad():
            batch = replace(batch, ref_answer_logprobs=our_answer_logprobs(reference, batch))
    assert row_.implicit_reward is not None
    rewards = row_.implicit_reward(our_answer_logprobs(model, batch), batch, row_.settings)
    terms = row_.losses[PreferenceBatch](rewards, batch, row_.settings)
    totals = Totals(tokens=len(number), sequences=len(number))
    return torch.stack([aggregate_pairs(terms[name], number, totals) for name in terms if only in (None, name)]).sum()


def rating_rows(tokenizer: Any) -> Iterator[Row]:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    records = Dataset.from_list([{"prompt": f"w{i}", "completion": " w3", "label": i % 2 == 0} for i in range(2, 6)])
    given = {"train_dataset": records, "processing_class": tokenizer}
    given |= {"model": language_model(1), "ref_model": language_model(2)}
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    trainer = made(KTOTrainer, KTOConfig, given, beta=0.2, per_device_train_batch_size=4, **weights)
    model, reference = exact(trainer.model), exact(trainer.ref_model)
    row_ = algorithm("kto").with_settings({"beta": 0.2, "good_weight": 1.3, "bad_weight": 0.7})
    assert row_.implicit_reward is not None

    def ours(examples: Examples) -> Found:
        rating = torch.tensor([1 if one["label"] else -1 for one in examples])
        batch, unrelated = (
            RatingBatch(*padded([(one["prompt_ids"], one[key]) for one in examples]), rating)
            for key in ("completion_ids", "KL_completion_ids")
        )
        with torch.no_grad():
            batch = replace(batch, ref_answer_logprobs=our_answer_logprobs(reference, batch))
            unrelated = replace(unrelated, ref_answer_logprobs=our_answer_logprobs(reference, unrelated))
            kl = log_ratio(our_answer_logprobs(model, unrelated), unrelated).mean()
        batch = replace(batch, kl=kl.expand(len(rating)))
        rewards = row_.implicit_reward(our_answer_logprobs(model, batch), batch, row_.settings)  # type: ignore[misc]
        (term,) = row_.losses[RatingBatch](rewards, batch, row_.settings).values()
        return gradients(aggregate(term, rating != 0, count([rating != 0])), model)

    def theirs(examples: Examples) -> Found:
        return gradients(trainer.compute_loss(model, trainer.data_collator(examples)), model)

    def in_two(examples: Examples) -> Found:
        half = len(examples) // 2
        return mean_of(theirs(examples[:half]), theirs(examples[half:]))

    def judged(seed: int, size: int, width: int) -> Examples:
        generator = torch.Generator().manual_seed(seed)
        texts = {"completion_ids": width, "KL_completion_ids": width, "prompt_ids": 7}
        return [{k: ids(generator, 1, n) for k, n in texts.items()} | {"label": i % 3 != 0} for i in range(size)]

    all_of_them = [judged(seed, *shape) for seed, shape in enumerate((*SHAPES, (6, 4)))]
    piece = "KTO, beta 0.2, weights 1.3 and 0.7"
    yield row(piece, "KTOTrainer", ((ours(some), theirs(some)) for some in all_of_them))
    yield row("KTO, two micro-batches", "KTOTrainer", ((ours(s), in_two(s)) for s in all_of_them), differs=True)


def mean_of(first: Found, second: Found) -> Found:
    """Of the gradients of two micro-batches, as an accumulating trainer adds them up."""
    return (first[0] + second[0]) / 2, [(a + b) / 2 for a, b in zip(first[1], second[1], strict=True)]


# --- groups of answers ------------------------------------------------------------------------------------------------


def sampled(
    seed: int, model: Any, size: int, width: int, *, near: float = 0.4, empty: bool = False
) -> tuple[dict[str, Tensor], Experience]:
    """Answers as GRPO's trainer takes them, and as we do: prompts are padded on the left, answers on the right.

    Old and reference log-probabilities lie about `near` nats from now's. If asked, the last answer does not count.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts, said = [ids(generator, 1, 6) for _ in range(size)], [ids(generator, 1, width) for _ in range(size)]
    said[0] = (said[0] * width)[:width]
    longest = max(map(len, prompts))
    prompt_ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
    prompt_mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    completion_ids = torch.tensor([a + [PAD] * (width - len(a)) for a in said])
    completion_mask = torch.tensor([[1] * len(a) + [0] * (width - len(a)) for a in said])
    if empty:
        completion_mask[-1] = 0
    tokens, attention = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, completion_mask], 1).bool()
    counted = torch.cat([torch.zeros_like(prompt_mask), completion_mask], 1).bool()
    with torch.no_grad():
        now = our_logprobs(model, tokens, attention)
    old, ref = now + near * torch.randn(2, *now.shape, generator=generator)
    advantages = torch.randn(size, generator=generator)
    theirs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": advantages,
        "old_per_token_logps": old[:, -width:],
        "ref_per_token_logps": ref[:, -width:],
        "old_logps": (old * counted).sum(-1),
        "num_items_in_batch": completion_mask.sum(),
    }
    given = {"tokens": tokens, "attention_mask": attention, "response_mask": counted, "group": torch.arange(size)}
    logprobs = {"engine_logprobs": old, "old_logprobs": old, "ref_logprobs": ref}
    return theirs, Experience(**given, **logprobs, advantages=advantages[:, None] * counted)


def our_experience_loss(row_: Algorithm, model: Any, batch: Experience, totals: Totals) -> Tensor:
    """As an update takes it: `totals` may be of more than this micro-batch."""
    scores = TokenScores(our_logprobs(model, batch.tokens, batch.attention_mask))
    terms = row_.losses[Experience](scores, None, batch, row_.settings)
    return torch.stack([aggregate(term, batch.response_mask, totals, row_.weigh) for term in terms.values()]).sum()


def group_rows(tokenizer: Any) -> Iterator[Row]:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    from trl.rewards import get_soft_overlong_punishment

    scores: list[Tensor] = []
    given = {
        "train_dataset": Dataset.from_list([{"prompt": f"w{i} w3"} for i in range(2, 18)]),
        "processing_class": tokenizer,
        "reward_funcs": lambda completions, **_: scores[-1].tolist(),
    }
    sizes = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": LIMIT}

    def grpo(kind: Any = GRPOTrainer, config: Any = GRPOConfig, **settings: Any) -> Any:
        # No price on the KL: with one it would look for its reference on the hub.
        trainer = made(kind, config, given | {"model": language_model(1)}, beta=0.0, **sizes, **settings)
        exact(trainer.model).train()
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    def compared(trainer: Any, row_: Algorithm, **kind: Any) -> Both:
        for seed, shape in enumerate(SHAPES):
            theirs, batch = sampled(seed, trainer.model, *shape, **kind)
            ours = our_experience_loss(row_, trainer.model, batch, count([batch.response_mask], LIMIT))
            yield gradients(ours, trainer.model), gradients(trainer.compute_loss(trainer.model, theirs), trainer.model)

    def in_two(trainer: Any, row_: Algorithm) -> Both:
        """Two micro-batches, as the trainer accumulates them: it halves by itself where it has to."""
        trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 2
        for seed, (size, width) in enumerate(SHAPES):
            theirs, batch = sampled(seed, trainer.model, size, width)
            totals, ours, sums = count([batch.response_mask]), torch.zeros(()), torch.zeros(())
            for part in (slice(size // 2), slice(size // 2, None)):
                some = {name: value[part] if value.dim() else value for name, value in theirs.items()}
                sums = sums + trainer.compute_loss(trainer.model, some)
                piece = {name: value if value is None else value[part] for name, value in vars(batch).items()}
                ours = ours + our_experience_loss(row_, trainer.model, Experience(**piece), totals)
            yield gradients(ours, trainer.model), gradients(sums, trainer.model)

    trainer, plain = grpo(loss_type="grpo"), algorithm("grpo").with_settings({"kl_loss_coef": 0.0})
    yield row("GRPO without KL", "GRPOTrainer grpo", compared(trainer, plain))
    yield row("GRPO, an answer left out", "GRPOTrainer grpo", compared(trainer, plain, empty=True), differs=True)

    def rescaled() -> Both:
        pairs = compared(trainer, plain, empty=True)
        for (size, _), (ours, (loss, slopes)) in zip(SHAPES, pairs, strict=True):
            yield ours, (loss * size / (size - 1), [slope * size / (size - 1) for slope in slopes])

    yield row("... divided by the answers that count", "GRPOTrainer grpo", rescaled())
    trainer.beta = 0.04
    yield row("GRPO, KL in the loss 0.04", "GRPOTrainer grpo", compared(trainer, algorithm("grpo")), differs=True)
    trainer.args.use_bias_correction_kl = False
    yield row("... use_bias_correction_kl=False", "GRPOTrainer grpo", compared(trainer, algorithm("grpo")))

    dapo = grpo(loss_type="dapo", epsilon_high=0.28)
    yield row("DAPO", "GRPOTrainer dapo, epsilon_high=0.28", compared(dapo, algorithm("dapo")))
    yield row("DAPO, two micro-batches", "GRPOTrainer dapo, epsilon_high=0.28", in_two(dapo, algorithm("dapo")))
    bnpo = grpo(loss_type="bnpo", epsilon_high=0.28)
    yield row("DAPO", "GRPOTrainer bnpo", compared(bnpo, algorithm("dapo")))
    yield row("DAPO, two micro-batches", "GRPOTrainer bnpo", in_two(bnpo, algorithm("dapo")), differs=True)
    dr_grpo = grpo(loss_type="dr_grpo", scale_rewards="none")
    yield row("Dr. GRPO", "GRPOTrainer dr_grpo", compared(dr_grpo, algorithm("dr_grpo")))
    gspo = grpo(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4)
    peer = "GRPOTrainer grpo, sequence"
    yield row("GSPO, ratios far from 1", peer, compared(gspo, algorithm("gspo")))
    yield row("GSPO, ratios near 1", peer, compared(gspo, algorithm("gspo"), near=1e-3))
    dual = grpo(loss_type="dapo", delta=3.0, epsilon_high=0.28)
    dual_row = algorithm("dapo").with_settings({"dual_clip": 3.0})
    yield row("dual clip 3", "GRPOTrainer dapo, delta=3", compared(dual, dual_row, near=1.5))

    cispo = grpo(loss_type="cispo", epsilon_high=5.0)
    peer = "GRPOTrainer cispo, epsilon_high=5"
    yield row("CISPO, weights up to 5", peer, compared(cispo, algorithm("cispo"), near=1.5), differs=True)

    def moved() -> Both:
        """Ours is of log (now / old), TRL's of log now: apart by a number that has no gradient."""
        pairs = compared(cispo, algorithm("cispo"), near=1.5)
        for seed, (shape, (ours, (loss, slopes))) in enumerate(zip(SHAPES, pairs, strict=True)):
            _, batch = sampled(seed, cispo.model, *shape, near=1.5)
            now = our_logprobs(cispo.model, batch.tokens, batch.attention_mask)
            weight = (now - batch.old_logprobs).exp().clamp(max=5.0)
            yield (
                ours,
                (loss + masked_mean(weight * batch.advantages * batch.old_logprobs, batch.response_mask), slopes),
            )

    yield row("... less a number without gradient", peer, moved())

    def advantages(trainer: Any, ours: Callable[..., Tensor], *, population: bool = False) -> Both:
        """Of the trainer's own rollouts, with scores of ours."""
        for seed in range(4):
            torch.manual_seed(seed)
            scores.append(torch.randn(8))
            prompts = [{"prompt": "w2 w3"}] * 4 + [{"prompt": "w7 w5"}] * 4
            theirs = trainer._generate_and_score_completions(prompts)["advantages"]
            if population:
                groups = scores[-1].view(-1, 4)
                change = (groups.std(-1) + 1e-4) / (groups.std(-1, correction=0) + 1e-6)
                theirs = theirs * change.repeat_interleave(4)
            yield (ours(scores[-1], torch.arange(8) // 4), []), (theirs, [])

    rloo = grpo(RLOOTrainer, RLOOConfig)

    def steps(*, by_answer: bool) -> Both:
        for seed, shape in enumerate(SHAPES):
            theirs, batch = sampled(seed, rloo.model, *shape, near=0.0)
            # Its own, so that its ratio is exactly 1.
            width = shape[1]
            old, *_ = rloo._get_per_token_logps_and_entropies(rloo.model, batch.tokens, batch.attention_mask, width)
            theirs["old_logps"] = (old.detach() * theirs["completion_mask"]).sum(-1)
            totals = count([batch.response_mask])
            _, ours = gradients(our_experience_loss(algorithm("rloo"), rloo.model, batch, totals), rloo.model)
            _, slopes = gradients(rloo.compute_loss(rloo.model, theirs), rloo.model)
            if by_answer:
                slopes = [slope * totals.sequences / totals.tokens for slope in slopes]
            # The losses are constants of two kinds, 0 and minus the mean advantage.
            yield (torch.zeros(()), ours), (torch.zeros(()), slopes)

    yield row("RLOO's step, on the policy that sampled", "RLOOTrainer", steps(by_answer=False), differs=True)
    yield row("... divided by tokens an answer", "RLOOTrainer", steps(by_answer=True))
    yield row("RLOO's advantages", "RLOOTrainer", advantages(rloo, leave_one_out))
    yield row("Dr. GRPO's advantages", "GRPOTrainer scale_rewards=none", advantages(dr_grpo, group_centered))
    peer = "GRPOTrainer scale_rewards=group"
    yield row("GRPO's advantages", peer, advantages(dapo, group_normalized), differs=True)
    yield row("... by the population's deviation", peer, advantages(dapo, group_normalized, population=True))

    length, limit = torch.arange(1, 101), {"soft_tokens": 20, "max_length": 100}
    ours = earned(torch.zeros(100), length > 0, length, truncated="soft", truncation_penalty=1.0, **limit)
    theirs = torch.tensor(get_soft_overlong_punishment(100, 20)([[2] * int(n) for n in length]))
    yield row("DAPO's soft penalty on length", "get_soft_overlong_punishment", [((ours, []), (theirs, []))])


# --- PPO --------------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What goes through the functions that TRL's PPO trainer calls in its loop, where all else is local to it."""

    logprobs: list[Tensor] = field(default_factory=list)  # [16, T]: old, reference; then [8, T]: new, all unmasked
    whitened: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # in, mask, out: rewards, advantages
    read: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of tokens and answers: value, then reward model
    predicted: list[Tensor] = field(default_factory=list)  # [8, prompt and answer, 1]: new values
    order: list[Tensor] = field(default_factory=list)  # [16]: of the rows, one an epoch
    losses: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # and slopes of the newest two of these

    @property
    def answered(self) -> Tensor:
        """Mask of the answers' tokens."""
        return self.whitened[1][1]

    @property
    def after(self) -> Tensor:
        """The same and one place more where there is one: TRL's critic has a value there too."""
        return self.whitened[0][1]

    def of_answers(self, of_all: Tensor) -> Tensor:
        """Values [B, prompt and answer, 1] -> those [B, T] of the states the answer's tokens were chosen in."""
        return of_all[:, -self.answered.shape[1] - 1 : -1, 0]

    @property
    def values(self) -> Tensor:
        return self.of_answers(self.read[0][0]).masked_fill(~self.after, 0.0)

    def clipped(self) -> bool:
        """Whether the last micro-batch met the clip."""
        rows = self.order[-1][MICRO:]
        moved = (self.logprobs[-1] - self.logprobs[0][rows])[self.answered[rows]]
        return bool(((moved.exp() - 1).abs() > PPO["cliprange"]).any())


def watched(module: Any, tokenizer: Any, seed: int) -> Seen:
    """A round of the real trainer: sixteen answers, two epochs of two micro-batches, a step large enough for clips."""
    from datasets import Dataset
    from transformers import set_seed

    generator = torch.Generator().manual_seed(seed)
    data = Dataset.from_list([{"input_ids": ids(generator, 2, 6)} for _ in range(2 * MICRO)])
    given = {
        "processing_class": tokenizer,
        "train_dataset": data,
        "eval_dataset": data,
        "model": language_model(1),
        "ref_model": language_model(2),
        "reward_model": tiny("LlamaForSequenceClassification", 3),
        "value_model": tiny("LlamaForSequenceClassification", 4),
    }
    sizes = {
        "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": 2,
        "num_mini_batches": 1,
        "num_ppo_epochs": 2,
        "total_episodes": 2 * MICRO,
        "local_rollout_forward_batch_size": 2 * MICRO,
        "num_sample_generations": 0,
        "response_length": 12,
    }
    # The rewards are whitened only so that they are seen.
    choices = {"seed": seed, "learning_rate": 0.01, "stop_token": "eos", "whiten_rewards": True}
    trainer = made(module.PPOTrainer, module.PPOConfig, given, **sizes, **choices, **PPO)
    set_seed(seed)
    seen = Seen()

    def watch(owner: Any, name: str, note: Callable[[tuple[Any, ...], Any], object]) -> None:
        real = getattr(owner, name)

        def watching(*given: Any, **named: Any) -> Any:
            result = real(*given, **named)
            note((*given, *named.values()), result)
            return result

        setattr(owner, name, watching)
        undo.callback(setattr, owner, name, real)

    def predicted(_: Any, result: Any) -> None:
        # The reference goes the same way, and has no values.
        if isinstance(result, tuple):
            seen.predicted.append(result[1])

    def lost(loss: Tensor) -> None:
        slopes = torch.autograd.grad(loss, (seen.logprobs[-1], seen.predicted[-1]), retain_graph=True)
        seen.losses.append((loss.detach(), *slopes))
        backward(loss)

    with ExitStack() as undo, redirect_stdout(StringIO()):
        watch(module, "selective_log_softmax", lambda _, result: seen.logprobs.append(result))
        watch(module, "masked_whiten", lambda given, result: seen.whitened.append((given[0], given[1], result)))
        watch(module, "get_reward", lambda _, result: seen.read.append(result[:2]))
        watch(module, "forward", predicted)
        watch(module.np.random, "permutation", lambda _, result: seen.order.append(torch.from_numpy(result)))
        backward, trainer.accelerator.backward = trainer.accelerator.backward, lost
        trainer.train()
    return seen


def ppo_rows(tokenizer: Any) -> Iterator[Row]:
    import trl.experimental.ppo.ppo_trainer as module

    def both(ours: Callable[..., Tensor], theirs: Callable[..., Tensor]) -> Both:
        for seed, shape in enumerate(SHAPES):
            generator = torch.Generator().manual_seed(seed)
            values, weights = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
            mask = torch.rand(shape, generator=generator) < 0.7
            yield tuple(_slope(function, values * 3 + 1, mask, weights) for function in (ours, theirs))  # type: ignore[misc]

    def sample(values: Tensor, mask: Tensor, shift_mean: bool) -> Tensor:
        """Ours, from the variance of a sample."""
        size, mean = mask.sum(), masked_mean(values, mask)
        white = (values - mean) * torch.rsqrt(masked_var(values, mask) * size / (size - 1) + 1e-8)
        return white if shift_mean else white + mean

    yield row("masked mean", "masked_mean", both(masked_mean, module.masked_mean))
    biased = functools.partial(module.masked_var, unbiased=False)
    yield row("masked variance", "masked_var unbiased=False", both(masked_var, biased))
    for shift in (True, False):
        theirs, peer = functools.partial(module.masked_whiten, shift_mean=shift), f"masked_whiten shift_mean={shift}"
        yield row("whitening", peer, both(functools.partial(whiten, shift_mean=shift), theirs), differs=True)
        yield row("... by a sample's variance", peer, both(functools.partial(sample, shift_mean=shift), theirs))

    cases, peer = [watched(module, tokenizer, seed) for seed in range(3)], "PPOTrainer.train"
    assert all(map(Seen.clipped, cases))

    def rewards(place: Callable[[Seen], Tensor]) -> Both:
        for seen in cases:
            old, ref = (seen.logprobs[i].masked_fill(~seen.answered, 0.0) for i in (0, 1))
            last = (place(seen).sum(-1, keepdim=True) - 1).clamp(min=0)
            ours = (-PPO["kl_coef"] * k1(old, ref)).scatter_add(1, last, seen.read[1][1][:, None])
            yield (ours, []), (seen.whitened[0][0], [])

    yield row("rewards of tokens, KL by k1", peer, rewards(lambda seen: seen.answered), differs=True)
    yield row("... the score one place after the end mark", peer, rewards(lambda seen: seen.after))

    def estimated(*, one_more: bool) -> Both:
        for seen in cases:
            rewards, mask = seen.whitened[0][2].masked_fill(~seen.after, 0.0), seen.after
            if not one_more:
                late, mask = (rewards * ~seen.answered).sum(-1, keepdim=True), seen.answered
                last = (mask.sum(-1, keepdim=True) - 1).clamp(min=0)
                rewards = (rewards * mask).scatter_add(1, last, late)
            ours = gae(rewards, seen.values, mask, gamma=PPO["gamma"], lam=PPO["lam"])
            yield (ours * seen.answered, []), (seen.whitened[1][0] * seen.answered, [])

    yield row("GAE, gamma 0.9, lambda 0.8", peer, estimated(one_more=False), differs=True)
    yield row("... a value after the end mark too", peer, estimated(one_more=True))

    def micro_batches(seen: Seen, *, of_update: bool) -> Both:
        """With totals of the micro-batch or of the update."""
        settings = PolicyGradientSettings(value_coef=PPO["vf_coef"], value_clip=PPO["cliprange_value"])
        raw, _, white = seen.whitened[1]
        for number, (loss, of_logprobs, of_values) in enumerate(seen.losses):
            rows = seen.order[number // 2].view(2, MICRO)[number % 2]
            new = seen.logprobs[2 + number].detach().requires_grad_()
            values = seen.of_answers(seen.predicted[number]).detach().requires_grad_()
            batch = Experience(
                tokens=rows,
                attention_mask=seen.after[rows],
                response_mask=seen.answered[rows],
                engine_logprobs=seen.logprobs[0][rows],
                old_logprobs=seen.logprobs[0][rows],
                advantages=white[rows].masked_fill(~seen.answered[rows], 0.0),
                group=rows,
                values=seen.values[rows],
                returns=(raw + seen.values)[rows],
            )
            terms = policy_loss(TokenScores(new), values, batch, settings)
            # The place after the end mark counts in their mean of the value loss.
            masks = {"policy": seen.answered, "value": seen.after}
            totals = {name: count([mask if of_update else mask[rows]]) for name, mask in masks.items()}
            ours = torch.stack([aggregate(terms[name], masks[name][rows], totals[name]) for name in masks]).sum()
            slopes = torch.autograd.grad(ours, (new, values))
            yield (ours, slopes), (loss, [of_logprobs, seen.of_answers(of_values)])

    def updates() -> Both:
        for seen in cases:
            found = list(micro_batches(seen, of_update=True))
            for (ours, theirs), (ours_too, theirs_too) in zip(found[::2], found[1::2], strict=True):
                halved = [slope / 2 for slope in (*theirs[1], *theirs_too[1])]
                yield (ours[0] + ours_too[0], [*ours[1], *ours_too[1]]), ((theirs[0] + theirs_too[0]) / 2, halved)

    piece, alone = "clipped policy and value loss", (micro_batches(seen, of_update=False) for seen in cases)
    yield row(f"{piece}, a micro-batch", peer, (found for some in alone for found in some))
    yield row(f"{piece}, two of them", peer, updates(), differs=True)


def _slope(function: Callable[[Tensor, Tensor], Tensor], values: Tensor, mask: Tensor, weights: Tensor) -> Found:
    values = values.detach().requires_grad_()
    result = function(values, mask)
    if result.dim():
        result = result.masked_fill(~mask, 0.0)
    return result, torch.autograd.grad((result * weights).sum(), values)


# --- the whole --------------------------------------------------------------------------------------------------------

VERSIONS = {"1.12.0": [ppo_rows], "1.16.0": [preference_rows, rating_rows, group_rows]}


def main() -> int:
    try:
        import datasets
        import trl
    except ImportError:
        print(
            f"TRL is not here; in an environment of its own: pip install {PINS}1.16.0 (1.12.0 for PPO),"
            f" then PYTHONPATH=src python {sys.argv[0]}"
        )
        return 0
    if trl.__version__ not in VERSIONS:
        print(
            f"TRL is {trl.__version__}, compared are {' and '.join(VERSIONS)}: pip install {PINS}1.16.0",
            file=sys.stderr,
        )
        return 1
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    print(f"TRL {trl.__version__}, torch {torch.__version__}\n")
    return 0 if table(found for rows in VERSIONS[trl.__version__] for found in rows(words())) else 1


if __name__ == "__main__":
    raise SystemExit(main())

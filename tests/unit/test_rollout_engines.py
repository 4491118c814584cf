"""The native engine against transformers' `generate`, plain forward passes, and itself in other batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close

from dressage import few_rows
from dressage.config import LoraConfig
from dressage.errors import EngineError, ModelError
from dressage.experience.build import tensors_of
from dressage.models.backbone import Backbone
from dressage.models.pretrained import packaged_folder
from dressage.models.roles import Role
from dressage.models.scoring import score_tokens
from dressage.rollout import native
from dressage.rollout.huggingface import HuggingFaceEngine
from dressage.rollout.native import NativeEngine, filled
from dressage.schema import Completion, Prompt, Rollout, Sampling

VOCABULARY = 61
SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE: dict[str, Any] = SMALL | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED: dict[str, Any] = WIDE | {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}

CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, GATED),
    "qwen2": (transformers.Qwen2Config, GATED),
    "qwen3": (transformers.Qwen3Config, GATED | {"head_dim": 8}),
    "gpt2": (transformers.GPT2Config, SMALL | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": (transformers.OPTConfig, WIDE | {"ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32}),
    "bloom": (transformers.BloomConfig, SMALL | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": (transformers.MptConfig, SMALL | {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "mistral, window of 4": (transformers.MistralConfig, GATED | {"sliding_window": 4}),
    "gptj": (
        transformers.GPTJConfig,
        SMALL | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    ),
}
COMPILED = "as a tree" if few_rows.kernel() is None else "compiled"
WAYS = {
    "llama": COMPILED,
    "qwen2": COMPILED,
    "bloom": "plain",
    "mistral, window of 4": "plain",
    "mpt": "in place",
    "gptj": "in place",
}
"""What is not read as a tree: the last two have an attention of their own."""


def model_of(name: str, **changes: Any) -> Any:
    """Random, with weights large enough that its distributions are far from even."""
    torch.manual_seed(7)
    config, settings = CONFIGS[name]
    model = transformers.AutoModelForCausalLM.from_config(config(**(settings | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1) + (parameter.dim() == 1)
            )
    return model.eval()


def prompt_of(*tokens: int) -> Prompt:
    return replace(Prompt.of(" ".join(map(str, tokens))), tokens=tokens)


PROMPTS = [
    prompt_of(5, 9, 11, 4, 3, 8, 20),
    prompt_of(7),
    prompt_of(30, 31, 32),
    prompt_of(5, 9, 11, 4, 3, 8, 20),
    prompt_of(0, 2, 40, 2),  # pad and stop tokens are tokens like others inside a prompt
    prompt_of(12, 50, 51, 52, 53),
]


BEGIN_ALIKE = [
    prompt_of(5, 9, 11, 4, 3),
    prompt_of(5, 9, 11, 8, 20),
    prompt_of(5, 9, 30),
    prompt_of(5, 9, 11),
    prompt_of(6, 9, 11),
]


def engine_of(model: Any, *stop_tokens: int, **options: Any) -> NativeEngine:
    return NativeEngine(model, stop_tokens=stop_tokens, pad_token=0, **options)


def continued(model: Any, prompt: Prompt, completion: Completion, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [T, V] where the completion's tokens were drawn: one forward pass, no batch, no cache."""
    tokens = torch.tensor([prompt.tokens + completion.tokens])
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits[0, len(prompt.tokens) - 1 : -1]
    return (logits.double() / temperature).log_softmax(-1)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_is_what_generate_does(name: str) -> None:
    model = model_of(name)
    free = Sampling(max_new_tokens=12, temperature=0.0)
    stop = engine_of(model).generate(PROMPTS, free)[0].tokens[3]
    for stop_tokens in [(), (stop,)]:
        # One prompt at a time: no padding that both could get wrong.
        oracle = HuggingFaceEngine(model, stop_tokens=stop_tokens or (VOCABULARY + 1,), pad_token=0, max_batch=1)
        expected = oracle.generate(PROMPTS, free)
        answers = engine_of(model, *stop_tokens).generate(PROMPTS, free)
        assert [(a.tokens, a.finish) for a in answers] == [(e.tokens, e.finish) for e in expected]
        for answer, other in zip(answers, expected, strict=True):
            assert_close(answer.logprobs, other.logprobs, rtol=0, atol=1e-4)
    assert any(answer.finish == "stop" for answer in answers)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_fast_path_is_taken_where_it_is_right(name: str) -> None:
    assert engine_of(model_of(name)).way == WAYS.get(name, "as a tree")


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_are_those_of_a_plain_forward_pass(name: str, temperature: float) -> None:
    model = model_of(name)
    sampling = Sampling(max_new_tokens=20, temperature=temperature, seed=4)
    engine = engine_of(model, 3, 4, 5)
    for prompt, answer in zip(PROMPTS, engine.generate(PROMPTS, sampling), strict=True):
        scores = continued(model, prompt, answer, temperature)
        expected = scores.gather(-1, torch.tensor(answer.tokens)[:, None]).squeeze(-1)
        assert_close(torch.tensor(answer.logprobs), expected.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "mistral, window of 4"])
def test_batch_and_order_change_no_sample(name: str) -> None:
    """In float64, so that rounding, which does depend on the batch, turns no draw."""
    model = model_of(name).double()
    sampling = Sampling(max_new_tokens=15, seed=2)
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    together = engine_of(model, 3, 4, 5, 6).generate(prompts, sampling)
    assert len({len(answer.tokens) for answer in together}) > 3, "answers should leave the batch one by one"
    for max_batch in (1, 2, 5, 11):
        apart = engine_of(model, 3, 4, 5, 6, max_batch=max_batch).generate(prompts, sampling)
        assert [a.tokens for a in apart] == [t.tokens for t in together]
    # Moving whole prompts; the copies of one prompt keep their order, which tells them apart.
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i].tokens[-1], i))
    moved = engine_of(model, 3, 4, 5, 6).generate([prompts[i] for i in order], sampling)
    assert [a.tokens for a in moved] == [together[i].tokens for i in order]


@pytest.mark.parametrize("name", ["llama", "mistral, window of 4"])
def test_each_answer_has_a_limit_of_its_own(name: str) -> None:
    """It ends there what it would have said without, whatever batch it is in; a stop token may come before."""
    model = model_of(name).double()
    free, ranged = Sampling(max_new_tokens=9, seed=2), Sampling(max_new_tokens=9, seed=2, length_range=(2, 7))
    prompts = [prompt for prompt in PROMPTS for _ in range(5)]
    whole = engine_of(model, 3, 4, 5).generate(prompts, free)
    cut = engine_of(model, 3, 4, 5).generate(prompts, ranged)
    for answer, ended in zip(whole, cut, strict=True):
        assert ended.tokens == answer.tokens[: len(ended.tokens)] and len(ended.tokens) <= 7
        assert ended.finish == answer.finish if ended.tokens == answer.tokens else ended.finish == "length"
    assert {len(answer.tokens) for answer in cut if answer.finish == "length"} == {2, 3, 4, 5, 6, 7}
    for max_batch in (1, 7):
        apart = engine_of(model, 3, 4, 5, max_batch=max_batch).generate(prompts, ranged)
        assert [answer.tokens for answer in apart] == [answer.tokens for answer in cut]
    assert engine_of(model, 3, 4, 5).generate(prompts, replace(ranged, seed=3)) != cut
    assert list(engine_of(model, 3, 4, 5).stream(prompts[0], ranged)) == list(cut[0].tokens)


def test_both_engines_end_an_answer_at_the_same_limit() -> None:
    sampling = Sampling(max_new_tokens=9, temperature=0.0, length_range=(2, 7))
    model = model_of("llama")
    ours = engine_of(model, 3, 4).generate(PROMPTS * 3, sampling)
    theirs = HuggingFaceEngine(model, stop_tokens=(3, 4), pad_token=0, max_batch=4).generate(PROMPTS * 3, sampling)
    assert [(a.tokens, a.finish) for a in ours] == [(a.tokens, a.finish) for a in theirs]
    assert len({len(answer.tokens) for answer in ours}) > 3


def test_seeds_make_the_sample() -> None:
    engine = engine_of(model_of("llama"))
    first, again, other = (
        engine.generate([PROMPTS[0]] * 4, Sampling(max_new_tokens=10, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert len({answer.tokens for answer in first + other}) == 8


def test_samples_follow_the_models_distribution() -> None:
    """Two tokens drawn 6,000 times against the product of the softmaxes along the way."""
    model, count, few = model_of("llama", vocab_size=6), 6000, 6
    prompt = prompt_of(3, 1, 5)
    engine = engine_of(model, max_batch=1000)
    answers = engine.generate([prompt] * count, Sampling(max_new_tokens=2, temperature=2.0))
    first = continued(model, prompt, Completion((0,), (), "length"), 2.0)[0].exp()
    second = torch.stack(
        [continued(model, prompt, Completion((token, 0), (), "length"), 2.0)[1].exp() for token in range(few)]
    )
    expected = (first[:, None] * second).flatten() * count
    drawn = torch.tensor([a.tokens[0] * few + a.tokens[1] for a in answers]).bincount(minlength=few * few)
    likely = expected > 5
    chi_square = ((drawn - expected).square() / expected)[likely].sum()
    freedom = int(likely.sum()) - 1
    assert freedom > 8
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_a_stop_token_is_the_last_and_is_included() -> None:
    stop_tokens = set(range(3, 15))
    answers = engine_of(model_of("qwen2"), *stop_tokens).generate(PROMPTS * 4, Sampling(max_new_tokens=8))
    for answer in answers:
        stopped = [i for i, token in enumerate(answer.tokens) if token in stop_tokens]
        assert stopped == ([len(answer.tokens) - 1] if answer.finish == "stop" else [])
        assert answer.finish == "stop" or len(answer.tokens) == 8
        assert len(answer.logprobs) == len(answer.tokens)
    assert {answer.finish for answer in answers} == {"stop", "length"}


@pytest.mark.parametrize("name", ["llama", "gptj", "bloom"])
def test_finished_answers_leave_the_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    engine = engine_of(model, *range(3, 20))
    shapes = shapes_of_passes(model, monkeypatch)
    answers = engine.generate(PROMPTS, Sampling(max_new_tokens=12))
    longer = [sum(len(answer.tokens) > step for answer in answers) for step in range(1, 12)]
    assert shapes[0] == ((1, 20) if engine.way in ("as a tree", "compiled") else (5, 7)), (
        "five different prompts, of 20 tokens"
    )
    sizes = [rows for rows, _ in shapes[1:]]
    assert sizes == [size for size in longer if size], "then those that are still being written"


def shapes_of_passes(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Filled with the rows and columns of every forward pass from now on."""
    shapes: list[tuple[int, int]] = []
    forward = model.forward

    @wraps(forward)
    def noted(**inputs: Any) -> Any:
        shapes.append(tuple(inputs["input_ids"].shape))
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", noted)
    return shapes


@pytest.mark.parametrize(("name", "at_once"), [("llama", True), ("gptj", True), ("bloom", False)])
def test_waiting_answers_enter_where_others_have_left(
    name: str, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows drawn at every step, against a count by hand of who is in: at once, or when the batch has ended."""
    drawn: list[int] = []
    draw = native.draw

    def noted(logits: Tensor, *args: Any, **options: Any) -> Any:
        drawn.append(len(logits))
        return draw(logits, *args, **options)

    monkeypatch.setattr(native, "draw", noted)
    engine = engine_of(model_of(name), 3, 4, 5, 6, max_batch=4)
    prompts = sorted(PROMPTS * 4, key=lambda prompt: (-len(prompt.tokens), prompt.tokens))  # as the engine takes them
    waiting = [len(answer.tokens) for answer in engine.generate(prompts, Sampling(max_new_tokens=15))]
    expected: list[int] = []
    left: list[int] = []
    while waiting or left:
        if at_once or not left:
            room = 4 - len(left)
            left, waiting = left + waiting[:room], waiting[room:]
        expected.append(len(left))
        left = [count - 1 for count in left if count > 1]
    assert drawn == expected


@pytest.mark.parametrize("max_batch", [2, 3, 8, 64])
def test_a_prompt_is_read_once_for_all_its_answers(max_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    engine = engine_of(model, 3, 4, 5, max_batch=max_batch)
    shapes = shapes_of_passes(model, monkeypatch)
    prompts = [prompt_of(*range(start, start + 4)) for start in range(10, 30, 2) for _ in range(6)]
    engine.generate(prompts, Sampling(max_new_tokens=9))
    assert sum(columns for _, columns in shapes if columns > 1) == 10 * 4
    assert max(rows for rows, columns in shapes if columns == 1) == min(max_batch, 60)


def test_what_prompts_begin_with_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    engine = engine_of(model, max_batch=8)
    expected = [engine.generate([one], Sampling(3, temperature=0.0))[0].tokens for one in BEGIN_ALIKE]
    shapes = shapes_of_passes(model, monkeypatch)
    answers = engine.generate(BEGIN_ALIKE, Sampling(3, temperature=0.0))
    assert [answer.tokens for answer in answers] == expected
    assert shapes[0] == (1, 5 + 2 + 1 + 0 + 3)


def test_nothing_is_taken_from_where_nothing_was_written() -> None:
    """Memory that torch hands out is NaN in this mode; a hidden column would carry it into the answer."""
    model = model_of("llama")
    expected = engine_of(model, 3, 4, max_batch=3).generate(PROMPTS * 3, Sampling(max_new_tokens=12))
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        answers = engine_of(model, 3, 4, max_batch=3).generate(PROMPTS * 3, Sampling(max_new_tokens=12))
    finally:
        torch.use_deterministic_algorithms(False)
    assert answers == expected


@pytest.mark.parametrize(
    ("live", "places"),
    [([0, 1, 2], [0, 1, 2]), ([0, 2, 3, 5], [0, 5, 2, 3]), ([4, 5], [5, 4]), ([3], [3]), ([], []), ([0, 1], [0, 1])],
)
def test_holes_are_filled_from_behind(live: list[int], places: list[int]) -> None:
    assert filled(live) == places


def test_streaming_draws_what_generate_draws() -> None:
    engine = engine_of(model_of("llama"), 3, 4, 5)
    for seed in range(5):
        sampling = Sampling(max_new_tokens=15, seed=seed)
        assert tuple(engine.stream(PROMPTS[0], sampling)) == engine.generate([PROMPTS[0]], sampling)[0].tokens


def test_the_model_is_left_as_it_was() -> None:
    """A trainer's dropout comes back, even where one part was already switched off, and while a stream waits."""
    model = model_of("llama", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    speaking = []

    @contextmanager
    def active() -> Iterator[None]:
        speaking.append(True)
        yield
        speaking.pop()

    engine = engine_of(model, active=active)
    heard = []
    model.register_forward_pre_hook(lambda *_: heard.append((bool(speaking), model.training, torch.is_grad_enabled())))
    answers = engine.generate(PROMPTS, Sampling(max_new_tokens=5))
    stream = engine.stream(PROMPTS[0], Sampling(max_new_tokens=5))
    next(stream)
    assert set(heard) == {(True, False, False)}
    assert {name: module.training for name, module in model.named_modules()} == before
    assert speaking == [] and not torch.is_inference_mode_enabled()
    assert answers == engine_of(model.eval()).generate(PROMPTS, Sampling(max_new_tokens=5))


@pytest.mark.parametrize("make", [NativeEngine, HuggingFaceEngine])
def test_versions_and_progress(make: Any) -> None:
    engine = make(model_of("llama"), stop_tokens=[3], pad_token=0, max_batch=4)
    told: list[int] = []
    assert {a.version for a in engine.generate(PROMPTS, Sampling(max_new_tokens=4), told.append)} == {0}
    assert told == sorted(told) and told[-1] == len(PROMPTS) and len(set(told)) > 1
    engine.load_weights(3)
    assert {a.version for a in engine.generate(PROMPTS, Sampling(max_new_tokens=4))} == {3}


@pytest.mark.parametrize("make", [NativeEngine, HuggingFaceEngine])
def test_what_cannot_be_answered_is_said_in_a_line(make: Any) -> None:
    engine = make(model_of("gpt2"), stop_tokens=[3], pad_token=0)
    with pytest.raises(EngineError, match=r"60 tokens .* 5 new ones are more than the model's 64 positions") as raised:
        engine.generate([PROMPTS[0], prompt_of(*[9] * 60)], Sampling(max_new_tokens=5))
    assert "\n" not in str(raised.value)
    with pytest.raises(EngineError, match="no tokens; encode it"):
        engine.generate([Prompt.of("hello")], Sampling(max_new_tokens=5))
    assert engine.generate([], Sampling(max_new_tokens=5)) == []
    assert len(engine.generate([prompt_of(*[9] * 59)], Sampling(max_new_tokens=5))[0].tokens) <= 5


def test_a_diverged_model_is_said_to_be_one() -> None:
    model = model_of("llama")
    engine = engine_of(model)
    model.lm_head.weight.data[3] = math.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(EngineError, match="NaN"):
            engine.generate(PROMPTS, Sampling(max_new_tokens=5, temperature=temperature))


def test_huggingface_samples_at_temperature_with_its_own_seeds() -> None:
    model = model_of("llama")
    model.generation_config.repetition_penalty = 5.0
    engine = HuggingFaceEngine(model, stop_tokens=[3], pad_token=0)
    sampling = Sampling(max_new_tokens=10, temperature=0.7, seed=3)
    state = torch.random.get_rng_state()
    answers = engine.generate(PROMPTS, sampling)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert answers == engine.generate(PROMPTS, sampling)
    assert answers != engine.generate(PROMPTS, replace(sampling, seed=4))
    assert model.generation_config.repetition_penalty == 5.0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = continued(model, prompt, answer, 0.7).gather(-1, torch.tensor(answer.tokens)[:, None]).squeeze(-1)
        assert_close(torch.tensor(answer.logprobs), expected.float(), rtol=0, atol=1e-4)


@pytest.mark.real_model
def test_greedy_on_a_real_model() -> None:
    try:
        folder = packaged_folder()
    except ModelError as error:
        pytest.skip(str(error))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["The capital of France is", "Water boils at", "One, two, three, four,", "A horse has four legs and"]
    prompts = [replace(Prompt.of(text), tokens=tuple(tokenizer(text).input_ids)) for text in texts]
    # Limits of their own, so that the last two enter beside answers that are being written.
    sampling, stop = Sampling(max_new_tokens=12, temperature=0.0, length_range=(5, 12)), tokenizer.eos_token_id
    oracle = HuggingFaceEngine(model, stop_tokens=[stop], pad_token=stop, max_batch=1)
    answers = engine_of(model, stop, max_batch=2).generate(prompts, sampling)
    assert [a.tokens for a in answers] == [e.tokens for e in oracle.generate(prompts, sampling)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "opt"])
def test_the_engine_and_the_trainer_see_one_policy(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """With an adapter on, mixed lengths and a temperature: the sampler's log-probabilities are the trainer's."""
    backbone = Backbone(model_of(name).to(dtype))
    backbone.add_adapter("policy", LoraConfig(rank=4), seed=1)
    with torch.no_grad():
        for key, parameter in backbone.adapter_state("policy").items():
            if "lora_B" in key:
                parameter.normal_(0, 0.3)
    policy = Role(backbone, "policy")
    engine = NativeEngine(backbone.model, stop_tokens=[2], pad_token=0, active=policy.speaking, max_batch=3)
    asked = PROMPTS * 2
    answers = engine.generate(asked, Sampling(max_new_tokens=10, temperature=0.7, seed=3))
    rollouts = [Rollout(prompt, answer, "", 0) for prompt, answer in zip(asked, answers, strict=True)]
    samples = tensors_of(rollouts, 0)
    with torch.no_grad():
        scores = score_tokens(policy, samples.tokens, samples.attention_mask, samples.response_mask, temperature=0.7)
    assert_close(scores.logprobs.float(), samples.engine_logprobs, rtol=0, atol=tolerance)
    assert int(samples.response_mask.sum()) == sum(len(answer.tokens) for answer in answers)

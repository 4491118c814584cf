"""The verb dpo: the update cut in any way, the reference kept, and the whole stage on a model of two layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from dressage.algorithms.catalog import ALGORITHMS, algorithm
from dressage.batches import PreferenceBatch, RatingBatch
from dressage.config import LoraConfig, OptimizerConfig
from dressage.data.collate import collate_rankings, collate_ratings
from dressage.data.prepare import EncodedRanking, EncodedRating
from dressage.data.template import Encoded
from dressage.models.backbone import Backbone
from dressage.models.roles import Role
from dressage.monitor.writers import read_metrics
from dressage.training.optimizer import Optimizer
from dressage.training.reference import score_answers, with_reference
from dressage.training.update import Learner

Command = Callable[..., Any]
Write = Callable[..., Path]
PAIRED = [
    name
    for name, row in ALGORITHMS.items()
    if row.implicit_reward is not None and PreferenceBatch in row.losses and "reward" not in row.roles
]
ALL = [*PAIRED, "kto"]
POLICY = "policy/adapter_model.safetensors"


def backbone() -> Backbone:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return Backbone(LlamaForCausalLM(config).eval())


def learner(name: str, micro_batch_tokens: int = 10_000, *, rate: float = 1e-2) -> Learner:
    base = backbone()
    base.add_adapter("policy", LoraConfig(rank=4), seed=2)
    policy = Role(base, "policy")
    return Learner(
        algorithm=algorithm(name),
        policy=policy,
        optimizer=Optimizer({"policy": policy.parameters()}, OptimizerConfig(learning_rate=rate)),
        rates=lambda update: {"policy": rate},
        micro_batch_tokens=micro_batch_tokens,
    )


def moved(learns: Learner) -> Learner:
    """Away from the reference, as after some updates, so that no margin is 0."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in learns.optimizer.named.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return learns


def answer(generator: torch.Generator, prompt: Sequence[int]) -> Encoded:
    new = torch.randint(0, 64, (int(torch.randint(1, 9, (1,), generator=generator)),), generator=generator).tolist()
    return Encoded((*prompt, *new), (False,) * len(prompt) + (True,) * len(new))


def rankings() -> list[EncodedRanking]:
    """Three prompts with 4, 2 and 3 answers; the last has a tie."""
    generator = torch.Generator().manual_seed(0)
    ranks = [(0, 1, 2, 3), (1, 0), (0, 1, 1)]
    rows = [EncodedRanking(tuple(answer(generator, (7, 8, p)) for _ in r), r) for p, r in enumerate(ranks)]
    return rows


def ratings() -> list[EncodedRating]:
    """Five answers to three prompts, three of them good, each with an unrelated one."""
    generator = torch.Generator().manual_seed(0)
    asked = [(0, True), (0, False), (1, True), (2, True), (2, False)]
    return [EncodedRating((answer(generator, (7, p)), answer(generator, (7, p))), good) for p, good in asked]


def judged(name: str, folder: Path) -> PreferenceBatch | RatingBatch:
    """What this row learns from, with what the model says before it learns."""
    reference = Role(backbone())
    if name == "kto":
        return collate_ratings(with_reference(ratings(), reference, folder, lambda read: None), 0)
    return collate_rankings(with_reference(rankings(), reference, folder, lambda read: None), 0)


def gradients(learns: Learner, batch: Any) -> dict[str, torch.Tensor]:
    """The gradient of one whole update, before any clipping or step."""
    for _ in learns._learn(batch):
        pass
    return {name: p.grad.clone() for name, p in learns.optimizer.named.items() if p.grad is not None}


# --- the update -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_micro_batches_change_nothing(name: str, tmp_path: Path) -> None:
    """One piece, or a piece for each ranking or answer: the same gradient and the same measures."""
    batch = judged(name, tmp_path)
    whole, cut = (moved(learner(name, tokens)) for tokens in (10_000, 1))
    measured, expected = cut.measure(batch), whole.measure(batch)
    assert measured.keys() == expected.keys() >= {"loss", "accuracy", "margin", "logprobs/chosen", "logprobs/rejected"}
    for key, value in expected.items():
        assert measured[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    found, wanted = gradients(cut, batch), gradients(whole, batch)
    assert any(gradient.abs().max() > 1e-4 for gradient in wanted.values())
    for key, gradient in wanted.items():
        assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_padding_and_order_change_nothing(name: str, tmp_path: Path) -> None:
    batch = judged(name, tmp_path)
    order = torch.randperm(len(batch.tokens), generator=torch.Generator().manual_seed(3))

    def worse(value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(value, (0, 4))[order] if value.dim() == 2 else value[order]

    mixed = replace(batch, **{key: worse(value) for key, value in vars(batch).items() if value is not None})
    expected, measured = (moved(learner(name)).measure(one) for one in (batch, mixed))
    assert measured == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("name", "loss"), [("dpo", 0.693147), ("cdpo", 0.693147), ("ipo", 25.0), ("kto", 0.5)])
def test_the_first_update_begins_at_the_reference(name: str, loss: float, tmp_path: Path) -> None:
    """Reference and policy are one, through all the machinery: known losses, no margin, nobody yet right."""
    measured = learner(name).measure(judged(name, tmp_path))
    assert measured["loss"] == pytest.approx(loss, rel=1e-5)
    assert measured["margin"] == pytest.approx(0, abs=1e-5)
    if name == "kto":
        assert measured["kl/unrelated_per_answer"] == pytest.approx(0, abs=1e-5)


def plain_logprob(learns: Learner, row: Encoded) -> float:
    """By the plain model's logits, one answer at a time."""
    with torch.no_grad(), learns.policy.speaking():
        logits = learns.policy.backbone.model(input_ids=torch.tensor([row.tokens])).logits[0]
    logp = torch.log_softmax(logits, -1)
    return sum(logp[t - 1, token].item() for t, token in enumerate(row.tokens) if row.loss_mask[t])


def test_measures_by_hand(tmp_path: Path) -> None:
    """Of DPO: pairs of a prompt averaged, then prompts; log-probabilities by the plain model."""
    learns, rows = moved(learner("dpo")), rankings()
    measured = learns.measure(judged("dpo", tmp_path))
    base = learner("dpo")
    margins, chosen, rejected = [], [], []
    for row in rows:
        now, before = ([plain_logprob(one, a) for a in row.answers] for one in (learns, base))
        pairs = [(i, j) for i, r in enumerate(row.ranks) for j, s in enumerate(row.ranks) if r < s]
        ratio = [a - b for a, b in zip(now, before, strict=True)]
        margins.append(sum(0.1 * (ratio[i] - ratio[j]) for i, j in pairs) / len(pairs))
        chosen.append(sum(now[i] for i, _ in pairs) / len(pairs))
        rejected.append(sum(now[j] for _, j in pairs) / len(pairs))
    assert measured["margin"] == pytest.approx(sum(margins) / 3, rel=1e-4)
    assert measured["logprobs/chosen"] == pytest.approx(sum(chosen) / 3, rel=1e-5)
    assert measured["logprobs/rejected"] == pytest.approx(sum(rejected) / 3, rel=1e-5)


def test_ktos_measures_by_hand(tmp_path: Path) -> None:
    """The KL comes from the unrelated answers alone; good and bad answers are averaged each by themselves."""
    learns, base, rows = moved(learner("kto")), learner("kto"), ratings()
    measured = learns.measure(judged("kto", tmp_path))
    now, before = ([[plain_logprob(one, a) for a in row.answers] for row in rows] for one in (learns, base))
    kl = sum(n[1] - b[1] for n, b in zip(now, before, strict=True)) / 5
    assert measured["kl/unrelated_per_answer"] == pytest.approx(kl, rel=1e-3)
    good, bad = ([i for i, row in enumerate(rows) if row.good is side] for side in (True, False))
    reward = [0.1 * (n[0] - b[0]) for n, b in zip(now, before, strict=True)]
    margin = sum(reward[i] for i in good) / 3 - sum(reward[i] for i in bad) / 2
    assert measured["margin"] == pytest.approx(margin, rel=1e-3)
    assert measured["logprobs/chosen"] == pytest.approx(sum(now[i][0] for i in good) / 3, rel=1e-5)
    signed = [(1 if row.good else -1) * (r - 0.1 * max(kl, 0)) for row, r in zip(rows, reward, strict=True)]
    values = [1 / (1 + torch.tensor(s).exp().item()) for s in signed]
    assert measured["loss"] == pytest.approx(sum(values) / 5, rel=1e-4)
    assert measured["accuracy"] == pytest.approx(sum(s > 0 for s in signed) / 5)


@pytest.mark.parametrize("side", [True, False])
def test_ratings_of_one_kind_have_no_margin(side: bool, tmp_path: Path) -> None:
    rows = [replace(row, good=side) for row in ratings()]
    batch = collate_ratings(with_reference(rows, Role(backbone()), tmp_path, lambda read: None), 0)
    measured = learner("kto").measure(batch)
    assert "margin" not in measured and "logprobs/chosen" not in measured and "accuracy" in measured


@pytest.mark.parametrize("name", ALL)
def test_what_is_preferred_is_learnt(name: str, tmp_path: Path) -> None:
    learns, batch = learner(name), judged(name, tmp_path)
    before = learns.measure(batch)
    for _ in range(25):
        learns.update([batch])
    after = learns.measure(batch)
    assert after["loss"] < before["loss"] and after["margin"] > before["margin"]
    assert after["accuracy"] > 0.9


# --- the reference ----------------------------------------------------------------------------------------------------


def test_the_reference_is_asked_once(tmp_path: Path) -> None:
    """What was kept is taken, whatever has been learnt since; other answers, or a damaged file, are asked anew."""
    rows, role = rankings(), Role(backbone())
    asked: list[int] = []
    first = with_reference(rows, role, tmp_path, asked.append)
    assert sum(asked) == 9
    other = moved(learner("dpo")).policy
    assert with_reference(rows, other, tmp_path, asked.append) == first and sum(asked) == 9

    assert with_reference(rows[:2], other, tmp_path / "elsewhere", asked.append) != first[:2] and sum(asked) == 15
    file = tmp_path / "checkpoints" / "reference.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-40] ^= 1
    file.write_bytes(raw)
    assert with_reference(rows, role, tmp_path, asked.append) == first and sum(asked) == 24
    assert with_reference(rows[:2], role, tmp_path, asked.append) == first[:2] and sum(asked) == 30
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_answers_score_alike_however_they_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    learns = moved(learner("dpo"))
    answers = [a for row in rankings() for a in row.answers]
    expected = torch.tensor([plain_logprob(learns, a) for a in answers])
    assert_close(score_answers(learns.policy, answers), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr("dressage.training.reference.SCORING_TOKENS", 1)
    assert_close(score_answers(learns.policy, answers), expected, rtol=1e-5, atol=1e-5)


# --- the verb ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def compared(write_rows: Write) -> Path:
    names = ["Ann", "Ben", "Cem", "Dao", "Eva", "Fay", "Gus", "Hal", "Ida", "Jon", "Kim", "Lea"]
    rows = [{"prompt": f"Who is {n}?", "chosen": f"{n} is a friend.", "rejected": f"No idea {n}"} for n in names]
    return write_rows("compared.jsonl", rows)


@pytest.fixture
def asked(compared: Path, tiny_model: Path) -> list[str]:
    """`dressage dpo` on the comparisons, three steps, a checkpoint after each."""
    settings = [f"model.name={tiny_model}", f'data.sources=["{compared}"]', "data.heldout_fraction=0.3"]
    settings += ["lora={rank: 2, alpha: 4}", "optimizer.learning_rate=1e-2"]
    return ["dpo", *settings, "training={steps: 3, batch_size: 4, checkpoint_every: 1}"]


def ran_well(ran: Any) -> str:
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    return str(ran.stdout)


LOGGED = {"loss/train", "accuracy/train", "margin/train", "logprobs/chosen", "logprobs/rejected"}
HELDOUT = {"loss/heldout", "accuracy/heldout", "margin/heldout", "logprobs/chosen_heldout", "logprobs/rejected_heldout"}


@pytest.mark.parametrize("name", ALL)
def test_a_policy_is_trained_and_answers(name: str, dressage: Command, asked: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    text = ran_well(dressage(*asked, f"algorithm={name}", "--out", out))
    assert "report: " in text
    rows = read_metrics(out)
    assert rows[0].keys() >= HELDOUT and rows[-1].keys() >= LOGGED | HELDOUT
    assert rows[-1]["margin/train"] != rows[1]["margin/train"]
    reference = out / "checkpoints" / "reference.safetensors"
    assert reference.is_file() == (name not in ("orpo", "simpo"))
    manifest = json.loads((out / "stage.json").read_text(encoding="utf-8"))
    assert manifest["status"] == "done" and set(manifest["outputs"]) == {"data.json", "policy"}
    assert "skipped" in ran_well(dressage(*asked, f"algorithm={name}", "--out", out))

    data = f'prompts.sources=["{tmp_path / "compared.jsonl"}"]'
    sample = ["sample", f"model.name={out / 'policy'}", data, "prompts.limit=2", "max_new_tokens=3", "measure_kl=true"]
    ran_well(dressage(*sample, "--out", tmp_path / "answers"))
    assert len((tmp_path / "answers" / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_asking_the_reference_moves_no_row_to_the_other_side(
    dressage: Command, asked: list[str], tmp_path: Path
) -> None:
    """Methods with and without a reference learn from the same rows and hold out the same."""
    for name in ("dpo", "simpo"):
        ran_well(dressage(*asked, f"algorithm={name}", "optimizer.learning_rate=0", "--out", tmp_path / name))
    with_it, without = (read_metrics(tmp_path / name) for name in ("dpo", "simpo"))
    for metric in ("logprobs/chosen", "logprobs/chosen_heldout"):
        values = [[row[metric] for row in rows if metric in row] for rows in (with_it, without)]
        assert values[0] == pytest.approx(values[1], rel=1e-6) and len(values[0]) >= 2


def test_the_report_shows_what_was_learnt(dressage: Command, asked: list[str], tmp_path: Path) -> None:
    ran_well(dressage(*asked, "--out", tmp_path / "run"))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Margin between better and worse" in page and "Log-probability of an answer" in page
    assert "the policy learns what is preferred" in page


@pytest.mark.parametrize(
    ("metric", "values", "level"),
    [
        ("accuracy/heldout", [0.5, 0.7], "ok"),
        ("accuracy/heldout", [0.7, 0.5], "warn"),
        ("loss/heldout", [0.69, 0.6], "ok"),
        ("loss/heldout", [0.69, 0.8], "warn"),
        ("logprobs/chosen", [-60.0, -58.0, -75.0, -80.0], "ok"),
        ("logprobs/chosen", [-60.0, -58.0, -75.0, -120.0], "warn"),
    ],
)
def test_its_health_is_judged(metric: str, values: list[float], level: str) -> None:
    from dressage.monitor.health import verdicts

    found = verdicts("dpo", [{"step": step, metric: value} for step, value in enumerate(values)])
    assert [(verdict.metric, verdict.level) for verdict in found] == [(metric, level)]


def test_the_policy_can_be_talked_to(dressage: Command, asked: list[str], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from dressage.cli import app

    ran_well(dressage(*asked, "--out", tmp_path / "run"))
    talk = ["chat", str(tmp_path / "run" / "policy"), "--max-new-tokens", "3", "--temperature", "0"]
    ran = CliRunner().invoke(app, talk, input="Hello\n/exit\n")
    assert ran.exit_code == 0, ran.output


@pytest.mark.parametrize("lora", ["{rank: 2, alpha: 4}", "null"])
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_interrupted_and_resumed_is_uninterrupted(
    name: str, lora: str, dressage: Command, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and the reference is not asked again: with whole weights it would not be the reference any more."""
    from dressage.training import reference, trainer

    asked = [*asked, f"algorithm={name}", f"lora={lora}"]
    ran_well(dressage(*asked, "--out", tmp_path / "whole"))
    save, score, times = trainer.save_checkpoint, reference.score_answers, []

    def save_then_stop(*given: Any) -> Path:
        save(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(reference, "score_answers", lambda *given: times.append(1) or score(*given))
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "save_checkpoint", save_then_stop)
        assert dressage(*asked, "--out", tmp_path / "cut").exit_code == 130
    assert "gone on with" in ran_well(dressage(*asked, "--out", tmp_path / "cut"))
    assert times == [1]
    file = POLICY if lora != "null" else "policy/model.safetensors"
    assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    timeless = [
        [
            {k: v for k, v in row.items() if "second" not in k and "rss_gb" not in k}
            for row in read_metrics(tmp_path / run)
        ]
        for run in ("whole", "cut")
    ]
    assert timeless[0] == timeless[1]


def test_thumbs_up_and_down_teach_kto(dressage: Command, asked: list[str], write_rows: Write, tmp_path: Path) -> None:
    rows = [{"prompt": f"Is {n} odd?", "completion": "Yes" if n % 3 else "No", "label": n % 2 == 1} for n in range(8)]
    data = f'data.sources=["{write_rows("rated.jsonl", rows)}"]'
    text = ran_well(dressage(*asked, data, "algorithm=kto", "data.heldout_fraction=0", "--out", tmp_path / "run"))
    assert "8 records of 8 rows (prompt, completion, label)" in text
    refused = dressage(*asked, data, "--out", tmp_path / "o")
    assert refused.exit_code == 2 and "which has no rankings" in refused.stderr


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("algorithm=dop", "there is no such row; did you mean dpo?"),
        ("algorithm=ppo", "algorithm='ppo': does not learn from preferences; those that do: dpo, cdpo, rdpo, ipo, kto"),
        ("settings.beta=0", "settings.beta=0.0 must be above 0"),
        ("settings.gamma=1", "settings.gamma: unknown setting; known: beta, label_smoothing"),
        ("settings.label_smoothing=0.7", "settings.label_smoothing=0.7 must be at least 0 and below 0.5"),
        ("lora.dropout=0.1", "lora.dropout=0.1 must be 0 here"),
        ("reward_model=x", "reward_model: unknown setting"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_bad_settings_are_one_line(
    setting: str, said: str, dry: bool, dressage: Command, asked: list[str], tmp_path: Path
) -> None:
    ran = dressage(*asked, setting, "--out", tmp_path / "o", *(["--dry-run"] if dry else []))
    assert ran.exit_code == 2, ran.output
    assert said in ran.stderr and len(ran.stderr.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_ppo_does_not_learn_from_rankings(dressage: Command, compared: Path, tiny_model: Path, tmp_path: Path) -> None:
    asked = ["ppo", f"model.name={tiny_model}", f'prompts.sources=["{compared}"]', "reward_model=x", "algorithm=dpo"]
    ran = dressage(*asked, "training.steps=1", "--out", tmp_path / "o")
    assert ran.exit_code == 2 and "does not learn from sampled answers" in ran.stderr


def test_a_dry_run_counts_what_is_there(dressage: Command, asked: list[str], tmp_path: Path) -> None:
    foretold = {}
    for name in ("dpo", "simpo", "kto"):
        text = ran_well(dressage(*asked, f"algorithm={name}", "--out", tmp_path / "o", "--dry-run"))
        foretold[name] = text
        assert "3 steps of 4 rows" in text and "learns" in text
    assert not (tmp_path / "o").exists()
    notes = str(ran_well(dressage(*asked, "--out", tmp_path / "run")))
    learnt = int(notes.split("train: ")[1].split(" rows")[0])
    assert f"{learnt} rows of 2.0 answers to learn from, {12 - learnt} held out" in foretold["dpo"]
    assert f"{2 * learnt} rows to learn from, {2 * (12 - learnt)} held out" in foretold["kto"]

    def operations(name: str) -> float:
        return float(foretold[name].split("(")[-1].split(" operations")[0])

    assert operations("simpo") < operations("dpo")  # whose reference is asked too


def test_in_a_pipeline_it_learns_what_was_ranked(
    dressage: Command, tiny_model: Path, write_rows: Write, tmp_path: Path
) -> None:
    """From the rankings of an earlier stage, which a dry run knows before they are there."""
    prompts = write_rows(
        "prompts.jsonl", [{"prompt": f"Who is {name}?"} for name in ("Ann", "Ben", "Cem", "Dao", "Eva")]
    )
    recipe = tmp_path / "loop.yaml"
    text = f"""
model: {{name: {tiny_model}}}
stages:
  samples: {{kind: sample, prompts: {{sources: [{prompts}]}}, answers_per_prompt: 3, max_new_tokens: 6}}
  rank: {{answers: "stage:samples/answers.jsonl"}}
  dpo: &learn
    data: {{sources: ["stage:rank/rankings.jsonl"], heldout_fraction: 0.0}}
    lora: {{rank: 2, alpha: 4}}
    training: {{steps: 2, batch_size: 2}}
  kto: {{<<: *learn, kind: dpo, algorithm: kto, model: {{name: "stage:dpo/policy"}}}}
"""
    recipe.write_text(text, encoding="utf-8")
    foretold = ran_well(dressage("run", recipe, "--out", tmp_path / "run", "--dry-run"))
    assert "5 rows of 3.0 answers to learn from" in foretold and "10 rows to learn from" in foretold
    ran_well(dressage("run", recipe, "--out", tmp_path / "run"))
    for stage in ("dpo", "kto"):
        assert (tmp_path / "run" / stage / POLICY).is_file()

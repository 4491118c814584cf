"""Gates between stages: what is sound passes, each planted fault is caught, and a pipeline stops at one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from dressage.assemble import Rows, build_rows, build_template
from dressage.config import DataConfig
from dressage.data.collate import collate_demonstrations
from dressage.data.prepare import EncodedRanking
from dressage.data.template import ChatTemplate, Encoded
from dressage.evaluation.win_rate import calibration_error
from dressage.models.files import load_backbone
from dressage.models.roles import Role, ScalarHead
from dressage.schema import Completion, Demonstration, Message, Prompt, Ranking
from dressage.settings import ModelConfig
from dressage.stages import gates
from dressage.stages.gates import Ruling

Command = Callable[..., Any]
Write = Callable[..., Path]
HEALTH = {"health": {"on_alarm": "warn", "patience_steps": 3, "bounds": {}}}


def said(rulings: Iterable[Ruling]) -> dict[str, str]:
    return {one.what: one.verdict for one in rulings}


def ranking(number: int, answers: tuple[str, ...], ranks: tuple[int, ...]) -> Ranking:
    return Ranking(Prompt.of(f"question {number}"), answers, ranks)


# --- what is learnt from ----------------------------------------------------------------------------------------------


def rows_of(train: list[Any], heldout: list[Any]) -> Rows:
    return Rows(train, heldout, (), train, heldout)


def test_what_is_measured_on_is_not_learnt_from() -> None:
    def shown(number: int, answer: str = "Yes.") -> Demonstration:
        return Demonstration((Message("user", f"question {number}"), Message("assistant", answer)))

    train, new = [shown(n) for n in range(20)], [shown(n) for n in range(20, 30)]
    assert said(gates.of_split(rows_of(train, new))) == {"repeated records": "ok", "leakage": "ok"}
    # One of ten prompts is known, with another answer: a tenth may leak with a warning, two of ten fail.
    one, two = [*new[:9], shown(3, "No.")], [*new[:8], shown(3, "No."), shown(4)]
    assert said(gates.of_split(rows_of(train, one)))["leakage"] == "warn"
    assert said(gates.of_split(rows_of(train, two)))["leakage"] == "fail"
    (leak,) = (found for found in gates.of_split(rows_of(train, two)) if found.what == "leakage")
    assert leak.value == 0.2 and "20% of 10" in leak.evidence and leak.remedy.startswith("data.heldout")
    # 5 of 25 records stand there before.
    assert said(gates.of_split(rows_of([*train, *train[:5]], new)))["repeated records"] == "warn"


def test_leakage_is_found_through_files(tiny_model: Path, write_rows: Write) -> None:
    """Held-out sources that hold the training prompts; a split of one source never does."""
    rows = [{"prompt": f"Who is {n}?", "chosen": "A friend.", "rejected": "No."} for n in range(20)]
    data = {"sources": (str(write_rows("train.jsonl", rows)),), "max_tokens": 200}
    template = build_template(ModelConfig(name=str(tiny_model)))
    heldout = (str(write_rows("heldout.jsonl", rows[:5])),)
    leaky = build_rows("rankings", DataConfig(**data, heldout=heldout), template, 1)
    assert said(gates.of_split(leaky))["leakage"] == "fail"
    assert said(gates.of_split(build_rows("rankings", DataConfig(**data), template, 1)))["leakage"] == "ok"


def test_length_and_ties_of_rankings() -> None:
    even = [ranking(n, ("long answer", "short"), (n % 2, 1 - n % 2)) for n in range(40)]
    assert said(gates.of_rankings(even)) == {"ties": "ok", "length": "ok"}
    # The longer wins 38 of 40: Wilson's interval is 0.83 to 0.99, wholly above 0.75.
    biased = [ranking(n, ("long answer", "short"), (0, 1) if n > 1 else (1, 0)) for n in range(40)]
    assert said(gates.of_rankings(biased)) == {"ties": "ok", "length": "warn"}
    (_, length) = gates.of_rankings(biased)
    assert length.value == 0.95 and "0.95 (0.83 to 0.99)" in length.evidence
    # Of four rankings nothing is certain (0.51 to 1).
    assert said(gates.of_rankings(biased[2:6]))["length"] == "ok"
    tied = [ranking(n, ("a", "bb", "ccc"), (0, 0, 0)) for n in range(4)]
    assert said(gates.of_rankings(tied)) == {"ties": "fail"}
    # Two of three pairs in half of the rankings, all three in the others: 5 of 6 are ties.
    mostly = [ranking(n, ("a", "bb", "ccc", "dddd"), (0, 0, 0, 0) if n % 2 else (0, 0, 0, 1)) for n in range(4)]
    (ties, _) = gates.of_rankings(mostly)
    assert (ties.verdict, ties.value) == ("warn", 0.75)
    assert said(gates.of_rankings([])) == {"ties": "fail"}


def test_the_place_of_an_answer() -> None:
    even = [ranking(n, ("a", "b"), (n % 2, 1 - n % 2)) for n in range(40)]
    first = [ranking(n, ("a", "b"), (0, 1) if n > 1 else (1, 0)) for n in range(40)]
    assert said(gates.of_position(even)) == {"position": "ok"}
    assert said(gates.of_position(first)) == {"position": "warn"}
    # Sorted best first: nobody knows where they stood.
    assert said(gates.of_position(first[2:])) == {}


def test_judges_who_do_not_agree() -> None:
    """Of pairs that were judged twice: all alike, or as two coins would."""
    pairs = [(Prompt.of(f"q{n}"), n) for n in range(200)]
    agreed = [Ranking(p, ("x", "y"), (n % 2, 1 - n % 2)) for p, n in pairs for _ in range(2)]
    # The second judge shows the answers in the other order: the same judgement.
    agreed[1::2] = [Ranking(one.prompt, one.answers[::-1], one.ranks[::-1]) for one in agreed[1::2]]
    (ruling,) = gates.of_judgements(agreed)
    assert (ruling.verdict, ruling.value) == ("ok", 1.0) and "200 pairs" in ruling.evidence
    noise = [*agreed[0::2], *(Ranking(p, ("x", "y"), (n // 2 % 2, 1 - n // 2 % 2)) for p, n in pairs)]
    (ruling,) = gates.of_judgements(noise)
    # 0.5 of 200: 0.43 to 0.57 is not surely nothing; of 2000 it is.
    assert (ruling.verdict, ruling.value) == ("warn", 0.5)
    many = [Ranking(Prompt.of(f"{one.prompt.text}-{k}"), one.answers, one.ranks) for k in range(10) for one in noise]
    (ruling,) = gates.of_judgements(many)
    assert (ruling.verdict, ruling.value) == ("fail", 0.5)
    assert said(gates.of_judgements(agreed[::2])) == {}


# --- what has learnt --------------------------------------------------------------------------------------------------


def logged(name: str, *values: float | None) -> list[dict[str, Any]]:
    return [{"step": step, name: value} for step, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "verdict"),
    [((3.6, 2.8), "ok"), ((2.8, 2.8), "warn"), ((2.8, 2.9), "warn"), ((2.8, 3.0), "fail"), ((2.8, None), "fail")],
)
def test_the_held_out_loss_falls(values: tuple[float | None, ...], verdict: str) -> None:
    assert said(gates.of_heldout_loss(logged("loss/heldout", *values))) == {"held-out loss": verdict}
    assert said(gates.of_heldout_loss(logged("loss/train", *values))) == {}


@pytest.mark.parametrize(
    ("first", "last", "verdict"),
    [
        (0.3, 0.6, "ok"),
        (0.6, 0.5, "warn"),
        (0.6, 0.25, "fail"),  # being unlearnt
        (0.001, 0.001, "fail"),  # never learnt
        (0.001, 0.01, "warn"),  # being learnt
    ],
)
def test_the_end_mark_is_learnt(first: float, last: float, verdict: str) -> None:
    assert said(gates.of_end(logged(gates.END, first, last))) == {"end mark": verdict}


@pytest.mark.parametrize(
    ("asked", "end", "verdict"),
    [
        ((8, 8, 40), 0.9, "ok"),
        ((3, 8, 40), 0.9, "warn"),
        ((0, 8, 40), 0.1, "warn"),
        ((0, 8, 40), 0.9, "fail"),  # ends are likely, and the sampler never sees one
        ((0, 2, 40), 0.9, "warn"),
        ((0, 8, 40), None, "warn"),
    ],
)
def test_greedy_answers_stop(asked: tuple[int, int, int], end: float | None, verdict: str) -> None:
    assert said(gates.of_greedy(asked, end)) == {"greedy answers": verdict}


def test_alarms_that_were_looked_away_from() -> None:
    """Three steps of a KL far off are what ends a run; less is noise, and after a rollback it is over."""
    kl = "kl/reference_per_answer"
    rows = logged(kl, *[5.0] * 3, *[100.0] * 4)
    assert said(gates.of_numbers("ppo", rows, HEALTH)) == {kl: "fail"}
    assert said(gates.of_numbers("ppo", rows[:4], HEALTH)) == {kl: "warn"}
    assert said(gates.of_numbers("ppo", rows[:3], HEALTH)) == {"numbers while learning": "ok"}
    back = {"health": HEALTH["health"] | {"on_alarm": "rollback"}}
    assert said(gates.of_numbers("ppo", rows, back)) == {kl: "warn"}
    assert said(gates.of_numbers("ppo", logged(kl, 5.0, None), HEALTH)) == {kl: "fail"}
    assert said(gates.of_numbers("ppo", rows, HEALTH, but=(kl,))) == {"numbers while learning": "ok"}


def test_a_negative_kl_is_caught() -> None:
    """Three steps running, which no distance can be; and it lasts."""
    rows = logged("kl/reference_per_answer", 0.0, *[-0.3] * 5)
    assert said(gates.of_numbers("ppo", rows, HEALTH)) == {"kl/reference_per_answer": "fail"}


def test_a_constant_reward_is_told() -> None:
    assert said(gates.of_numbers("ppo", logged("reward/score_std", *[0.0] * 5), HEALTH)) == {"reward/score_std": "warn"}


def test_a_policy_that_never_moved() -> None:
    name, still = "kl/reference_per_answer", {"value": {"warmup_steps": 0}}
    assert said(gates.of_movement(logged(name, 0.0, 0.0, 0.0), still)) == {"the policy moved": "fail"}
    assert said(gates.of_movement(logged(name, 0.0, 0.0, -1e-7), still)) == {"the policy moved": "ok"}
    assert said(gates.of_movement(logged(name, 0.0), still)) == {}
    assert said(gates.of_movement(logged(name, 0.0, 0.0), {"value": {"warmup_steps": 1}})) == {}


# --- a reward model ---------------------------------------------------------------------------------------------------


def accuracy(value: float, low: float, high: float, length: float = 0.5) -> dict[str, Any]:
    return {"accuracy": value, "low": low, "high": high, "pairs": 60, "prompts": 30, "length_baseline": length}


@pytest.mark.parametrize(
    ("found", "verdicts"),
    [
        (accuracy(0.85, 0.70, 0.93, 0.78), ("ok", "ok")),  # the quickstart's
        (accuracy(0.65, 0.57, 0.73, 0.58), ("ok", "ok")),  # real people's
        (accuracy(0.62, 0.45, 0.77), ("warn", "ok")),  # too few to know
        (accuracy(0.50, 0.47, 0.53, 0.50), ("fail", "warn")),  # surely a coin
        (accuracy(0.30, 0.15, 0.50, 0.50), ("fail", "warn")),  # the wrong way round
        (accuracy(0.76, 0.59, 0.87, 0.90), ("ok", "fail")),  # surely worse than length alone
    ],
)
def test_pairs_are_ordered_and_not_by_length(found: dict[str, Any], verdicts: tuple[str, str]) -> None:
    assert tuple(said(gates.of_accuracy(found)).values()) == verdicts


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [([0.1, 0.9], "ok"), ([0.5] * 9, "fail"), ([0.1, math.nan], "fail"), ([0.1, math.inf], "fail")],
)
def test_scores_are_numbers_that_differ(scores: list[float], verdict: str) -> None:
    assert said(gates.of_scores(scores)) == {"scores differ": verdict}


def test_calibration_by_hand() -> None:
    """Log-odds of 3 are 0.75: right three times in four is no error, right twice in four is one of a quarter."""
    odds = math.log(3)
    assert calibration_error([odds, odds, odds, -odds], groups=1) == pytest.approx((0.0, 0.75, 0.75))
    assert calibration_error([odds, odds, -odds, -odds], groups=1) == pytest.approx((0.25, 0.75, 0.5))
    # Two groups: the unsure pair of equal scores, half right, is no error; the sure one is wrong.
    assert calibration_error([-odds, 0.0], groups=2) == pytest.approx((0.375, 0.625, 0.25))
    assert calibration_error([0.0], groups=5) == pytest.approx((0.0, 0.5, 0.5))


def test_a_reward_model_that_is_too_sure() -> None:
    """Right 6 times in 10: a margin of 0.4 is as sure as that, one of 8 is not, and costs more than a coin toss."""
    sound, sure = [0.4] * 6 + [-0.4] * 4, [8.0] * 6 + [-8.0] * 4
    assert said(gates.of_pairs(sound, 0.7)) == {"pair loss": "ok", "calibration": "ok"}
    assert said(gates.of_pairs(sure, 0.7)) == {"pair loss": "warn", "calibration": "warn"}
    (loss, _) = gates.of_pairs(sure, 0.7)
    assert loss.value == pytest.approx(3.2, abs=1e-3)  # 0.4 x 8, and next to nothing for the others
    assert said(gates.of_pairs([], 1.0)) == {}


def test_margins_stand_as_the_answers_do() -> None:
    one = Encoded((1,), (True,))
    rows = [EncodedRanking((one,) * 3, (2, 0, 0)), EncodedRanking((one,) * 2, (0, 1))]
    assert gates.margins_of([1.0, 4.0, 2.0, 0.5, 3.0], rows) == [3.0, 1.0, -2.5]


def test_nonsense_in_an_answers_place() -> None:
    made = gates.probes([ranking(1, ("no", "a good one"), (1, 0)), ranking(2, ("yes indeed", "x"), (0, 1))])
    assert made == {
        "an empty answer": ["", ""],
        "the prompt said again": ["question 1", "question 2"],
        "one word over and over": ["a a a", "yes yes"],
        "the answer four times over": [" ".join(["a good one"] * 4), " ".join(["yes indeed"] * 4)],
        "another prompt's answer": ["yes indeed", "a good one"],
    }


def test_a_probe_by_hand() -> None:
    best = [1.0] * 12
    assert gates.of_probe("empty", best, [0.0] * 6 + [2.0] * 6).verdict == "ok"
    # 2 of 12 and a tie: 0.21, whose interval ends at 0.49.
    ruling = gates.of_probe("empty", best, [0.0, 0.0, 1.0] + [2.0] * 9)
    assert (ruling.verdict, ruling.value) == ("warn", 2.5 / 12) and "of 12 prompts" in ruling.evidence


@pytest.fixture(scope="module")
def backbone(tiny_model: Path) -> Any:
    return load_backbone(ModelConfig(name=str(tiny_model)))


@pytest.fixture(scope="module")
def template(tiny_model: Path) -> ChatTemplate:
    return build_template(ModelConfig(name=str(tiny_model)))


@pytest.mark.parametrize(("sign", "caught"), [(1.0, {"an empty answer", "one word over and over"}), (-1.0, set())])
def test_probes_find_what_a_reward_model_falls_for(
    sign: float, caught: set[str], backbone: Any, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that likes brevity falls for the empty answer; one that likes length does not, but for what is longer."""
    monkeypatch.setattr(gates, "score_rows", lambda role, rows: torch.tensor([-sign * len(row) for row in rows]))
    records = [ranking(n, (f"a fine and long answer of {n}", "No."), (0, 1)) for n in range(12)]
    scores = [
        -sign * float(len(template.encode_answer(one.prompt, answer).tokens))
        for one in records
        for answer in one.answers
    ]
    found = said(gates.of_probes(Role(backbone), template, records, scores, 500))
    assert {what for what, verdict in found.items() if verdict == "warn"} >= caught
    assert found["an empty answer"] == ("warn" if sign > 0 else "ok")
    assert found["the answer four times over"] == ("ok" if sign > 0 else "warn")


# --- the end mark of a real model -------------------------------------------------------------------------------------


def test_the_ends_probability_is_that_of_the_plain_model(backbone: Any, template: ChatTemplate) -> None:
    """By a softmax of the library's own logits; a row that was cut has no end, and an end needs no label to be seen."""
    whole = [template.encode_answer(Prompt.of("Hi"), text) for text in ("Hello.", "Who?")]
    cut = template.encode_answer(Prompt.of("Hi"), "Hello", finished=False)
    unlabelled = [Encoded(row.tokens, (False,) * len(row.tokens)) for row in whole]
    expected = []
    for row in whole:
        with torch.no_grad():
            logits = backbone.model(torch.tensor([row.tokens[:-1]])).logits[0, -1]
        expected.append(float(logits.softmax(-1)[template.end_token]))
    for rows in (whole, [*unlabelled, cut]):
        found = gates.end_probability(Role(backbone), rows, template)
        assert found == {gates.END: pytest.approx(sum(expected) / 2, rel=1e-4)}
    assert gates.end_probability(Role(backbone), [cut], template) == {}


class Stops:
    """An engine whose answers end by themselves, or never."""

    def __init__(self, finish: Any) -> None:
        self.finish, self.asked = finish, 0

    def generate(self, prompts: Any, sampling: Any, progress: Any = None) -> list[Completion]:
        self.asked, self.limit = len(prompts), sampling.max_new_tokens
        assert sampling.temperature == 0
        return [Completion((1,), (0.0,), self.finish) for _ in prompts]

    def load_weights(self, version: int, weights: Any = ()) -> None: ...


@pytest.mark.parametrize(("finish", "stopped"), [("stop", 8), ("length", 0)])
def test_the_eight_shortest_are_asked(finish: str, stopped: int, template: ChatTemplate) -> None:
    engine, prompts = Stops(finish), [Prompt.of(f"q{n}") for n in range(10)]
    assert gates.ask(engine, template, prompts, [5 + n for n in range(10)]) == (stopped, 8, 24)
    assert gates.ask(engine, template, prompts[:2], [64, 65]) == (int(finish == "stop"), 1, 128)
    assert gates.ask(engine, template, prompts[:1], [65]) is None


# --- evaluation -------------------------------------------------------------------------------------------------------


def compared(**changes: float) -> dict[str, Any]:
    found = {"win_rate": 0.78, "win_rate_low": 0.7, "win_rate_high": 0.84, "prompts": 120, "judge": "gold"}
    found |= {"gold_sft": -0.4, "gold_ppo": 0.5, "score_sft": 0.0, "score_ppo": 0.8, "finished_sft": 0.57}
    return found | {"finished_ppo": 1.0, "distinct_sft": 0.9, "distinct_ppo": 0.92, "kl_per_answer": 2.3} | changes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"win_rate": 0.3, "win_rate_low": 0.2, "win_rate_high": 0.4}, {"win rate": "fail"}),
        ({"win_rate": 0.55, "win_rate_low": 0.45, "win_rate_high": 0.64}, {"win rate": "warn"}),
        ({"gold_ppo": -0.6}, {"gold follows the score": "warn"}),
        ({"finished_ppo": 0.0}, {"finished answers": "fail"}),
        ({"finished_ppo": 0.3}, {"finished answers": "warn"}),
        ({"distinct_ppo": 0.4}, {"variety": "warn"}),
        ({"kl_per_answer": 35.0}, {"what it could before": "warn"}),
        ({"judge_unread": 30, "judge_failed": 30, "judge_same_place": 0.5}, {}),
        ({"judge_unread": 31, "judge_failed": 30, "judge_same_place": 0.1}, {"the judge's verdicts": "warn"}),
        ({"judge_unread": 0, "judge_failed": 0, "judge_same_place": 0.51}, {"the judge's place": "warn"}),
        ({"judge_unread": 120, "judge_failed": 0}, {"the judge's verdicts": "warn"}),  # and of no place is told
    ],
)
def test_an_evaluation(changes: dict[str, float], expected: dict[str, str]) -> None:
    found = said(gates.of_comparison(compared(**changes)))
    assert len(found) == 5 + ("judge_unread" in changes) + ("judge_same_place" in changes)
    assert {what: verdict for what, verdict in found.items() if verdict != "ok"} == expected


# --- whole stages -----------------------------------------------------------------------------------------------------

PIPELINE = """
model: {{name: {model}}}
stages:
  sft:
    data: {{sources: [{demonstrations}], heldout_fraction: 0.3, max_tokens: 120}}
    lora: null
    optimizer: {{learning_rate: 1e-2}}
    training: {{steps: 12, batch_size: 4}}
  samples:
    kind: sample
    model: {{name: "stage:sft/policy"}}
    prompts: {{sources: [{demonstrations}], limit: 2}}
    max_new_tokens: 4
"""


@pytest.fixture
def recipe(write_rows: Write, tiny_model: Path, tmp_path: Path) -> Path:
    names = ["Ann", "Ben", "Cem", "Dao", "Eva", "Fay", "Gus", "Hal", "Ida", "Jon", "Kim", "Lea"]
    rows = [{"prompt": f"Who is {name}?", "completion": f"{name}!"} for name in names]
    path = tmp_path / "loop.yaml"
    text = PIPELINE.format(model=tiny_model, demonstrations=write_rows("demonstrations.jsonl", rows))
    path.write_text(text, encoding="utf-8")
    return path


def verdict_of(folder: Path) -> dict[str, str]:
    gate = json.loads((folder / "gate.json").read_text(encoding="utf-8"))
    return {one["what"]: one["verdict"] for one in gate["rulings"]} | {"gate": gate["verdict"]}


def test_a_pipeline_stops_at_a_failed_gate_and_goes_on_if_told_to(
    dressage: Command, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An end mark without a label: the loss falls all the same, and only the gate sees it."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:

        def unlabelled(rows: Any, pad: int) -> Any:
            return collate_demonstrations([Encoded(r.tokens, (*r.loss_mask[:-1], False)) for r in rows], pad)

        patch.setattr("dressage.stages.learning.collate_demonstrations", unlabelled)
        ran = dressage("run", recipe, "--out", out)
    assert ran.exit_code == 3, ran.output + repr(ran.exception)
    found = verdict_of(out / "sft")
    assert (found["held-out loss"], found["end mark"], found["gate"]) == ("ok", "fail", "fail")
    fault, kept = ran.stderr.splitlines()
    assert fault.startswith("error: sft failed its gate: end mark: its probability") and "chat_template" in fault
    assert kept == "error: samples was not begun; what was made is kept, and gates=warn goes on with it"
    assert "gate: fail: end mark" in ran.stdout and not (out / "samples").exists()
    assert "Gates between the stages" in (out / "report.html").read_text(encoding="utf-8")

    # The same command stops at the same place; told to, it goes on, and does nothing twice.
    made = (out / "sft" / "policy" / "model.safetensors").stat().st_mtime_ns
    assert dressage("run", recipe, "--out", out).exit_code == 3
    ran = dressage("run", recipe, "--out", out, "gates=warn")
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    assert "skipped" in ran.stdout and "rests on a stage that is at fault: sft failed its gate" in ran.stdout
    assert (out / "sft" / "policy" / "model.safetensors").stat().st_mtime_ns == made
    # A gate is no product: without it nothing is made again, and nothing is known against the stage.
    (out / "sft" / "gate.json").unlink()
    assert dressage("run", recipe, "--out", out).exit_code == 0
    assert (out / "sft" / "policy" / "model.safetensors").stat().st_mtime_ns == made


def test_a_sound_pipeline_passes(dressage: Command, recipe: Path, tmp_path: Path) -> None:
    ran = dressage("run", recipe, "--out", tmp_path / "run")
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    found = verdict_of(tmp_path / "run" / "sft")
    assert found["gate"] != "fail" and {found[what] for what in ("held-out loss", "leakage")} == {"ok"}
    first, *_, last = (row[gates.END] for row in _rows(tmp_path / "run" / "sft") if gates.END in row)
    assert last > 2 * first and found["end mark"] in ("ok", "warn")


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_pipeline_that_ends_worse_than_it_began(
    dressage: Command, write_rows: Write, tiny_model: Path, tmp_path: Path
) -> None:
    """Nothing rests on the evaluation: all is done, told and kept, and the exit code says that it is at fault."""
    good = "Wait until the water boils, then add the egg. Good luck!"
    for name, text in {"before": good, "after": ""}.items():
        asked = [[{"role": "user", "content": f"How do I boil egg {n}?"}] for n in range(12)]
        answers = [{"text": text, "finish": "stop"}]
        write_rows(f"{name}.jsonl", [{"prompt": prompt, "answers": answers} for prompt in asked])
    path = tmp_path / "compare.yaml"
    sides = ", ".join(f"{name}: {tmp_path / name}.jsonl" for name in ("before", "after"))
    path.write_text(f"model: {{name: {tiny_model}}}\nstages: {{evaluate: {{{sides}}}}}\n", encoding="utf-8")
    ran = dressage("run", path, "--out", tmp_path / "run")
    assert ran.exit_code == 3 and ran.stderr.startswith("error: evaluate failed its gate: win rate: 0.00"), ran.output
    assert (tmp_path / "run" / "summary.json").is_file() and "report:" in ran.stdout
    assert dressage("run", path, "--out", tmp_path / "run", "gates=warn").exit_code == 0


def test_a_reward_stage_that_learnt_nothing(
    dressage: Command, write_rows: Write, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that gives every answer the same score: half of the pairs count as right, and the gate is not taken in."""
    rows = [{"prompt": f"Who is {n}?", "answers": ["A friend.", "No!!"], "ranks": [0, 1]} for n in range(12)]
    settings = [f"model.name={tiny_model}", f'data.sources=["{write_rows("rankings.jsonl", rows)}"]']
    settings += ["data.heldout_fraction=0.5", "training.steps=1", "lora={rank: 2, alpha: 4}"]
    monkeypatch.setattr(ScalarHead, "forward", lambda self, hidden: hidden.float() @ (self.weight * 0) + self.bias * 0)
    ran = dressage("reward", *settings, "--out", tmp_path / "reward")
    # A stage alone is told of it; only a pipeline stops.
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    found = verdict_of(tmp_path / "reward")
    assert (found["scores differ"], found["accuracy"], found["gate"]) == ("fail", "warn", "fail")
    assert "gate: fail: scores differ: 0: the deviation" in ran.stdout


def test_rankings_of_ones_own_pass_a_gate(dressage: Command, write_rows: Write, tmp_path: Path) -> None:
    """Each pair is judged twice, and differently; all are longer first or tied."""
    rows = [
        {"prompt": f"q{n}", "answers": ["yes, indeed", "no"], "ranks": ranks}
        for n in range(60)
        for ranks in ([0, 1], [1, 0])
    ]
    source = write_rows("rankings.jsonl", rows)
    ran = dressage("rank", f"rankings={source}", "--out", tmp_path / "rank")
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    found = verdict_of(tmp_path / "rank")
    assert found == {"ties": "ok", "length": "ok", "position": "ok", "agreement": "fail", "gate": "fail"}

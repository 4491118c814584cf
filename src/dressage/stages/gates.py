"""Gates: whether what a stage made is fit to be rested on, and the numbers that say so.

A gate is a list of rulings, each a plain function of what the stage measured. It fails where one of them does; what
could not be measured has none. Where chance has a part an interval is judged: few data are no fault.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, combinations, permutations
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Literal

import torch
from rich.console import Console

from dressage.assemble import Rows
from dressage.data.order import length_sorted_chunks
from dressage.data.prepare import EncodedRanking
from dressage.data.template import ChatTemplate, Encoded
from dressage.errors import EngineError
from dressage.evaluation.win_rate import accuracy_interval, calibration_error
from dressage.models.roles import Role
from dressage.models.scoring import score_tokens
from dressage.monitor.health import verdicts
from dressage.monitor.run_folder import read_json
from dressage.pipeline import GATE, named_paths, write_json
from dressage.rewards.learned import SCORING_TOKENS, score_rows
from dressage.rollout.engine import Engine
from dressage.schema import Demonstration, Prompt, Ranking, Rating, Sampling
from dressage.settings import Settings
from dressage.tensors import pad_right

Verdict = Literal["ok", "warn", "fail"]
LEVELS: Sequence[Verdict] = ("ok", "warn", "fail")

LITTLE, ENOUGH = 0.55, 0.6
"""Reward accuracy that surely is no better than this is none; up to the second it is little."""
ENDS_SELDOM, ENDS_OFTEN = 0.05, 0.5
"""Mean probability of the end mark where an answer ends."""
ONE_SIDED = 0.75
"""Share of pairs that one length, or one place, surely wins."""
LEAKED, REPEATED, TIED = 0.1, 0.1, 0.5
UNJUDGED, ONE_PLACE = 0.5, 0.5
"""Shares of the pairs that a judge was asked about in both orders."""
FAR = 20.0
"""Nats an answer from the model before."""
MEASURED_ON = 16
"""Held-out demonstrations whose end is looked at."""
ASKED, ASKED_TOKENS = 8, 128
"""Greedy answers, and the most tokens of each."""
PROBED = 12
"""Held-out prompts to which a reward model is shown nonsense."""

MORE_RANKINGS = "more rankings, another optimizer.learning_rate, or other training.epochs"


@dataclass(frozen=True)
class Ruling:
    """What a gate says of one thing."""

    what: str
    verdict: Verdict
    value: float | None
    """The number judged; none: it is not finite."""
    evidence: str
    remedy: str
    """What to turn if it is not well."""


def rule(what: str, value: float, evidence: str, remedy: str, *, fail: bool = False, warn: bool = False) -> Ruling:
    """A ruling; what is no finite number fails."""
    finite = math.isfinite(value)
    verdict: Verdict = "fail" if fail or not finite else "warn" if warn else "ok"
    return Ruling(what, verdict, value if finite else None, evidence, remedy)


def judge(folder: Path, rulings: Iterable[Ruling], console: Console | None) -> None:
    """Saves the rulings in gate.json and says them: a line for each trouble, or one that all is well."""
    found = list(rulings)
    worst = max((one.verdict for one in found), key=LEVELS.index, default="ok")
    write_json(folder / GATE, {"verdict": worst, "rulings": [asdict(one) for one in found]})
    if console:
        troubles = [f"gate: {one.verdict}: {_said(asdict(one))}" for one in found if one.verdict != "ok"]
        for line in troubles or [f"gate: {len(found)} rulings, all well"]:
            console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)


def failed(folder: Path) -> list[str]:
    """Why the stage in this folder failed its gate, a line for each ruling; empty if it did not, or has none."""
    rulings = read_json(folder / GATE).get("rulings", ())
    return [f"{folder.name} failed its gate: {_said(one)}" for one in rulings if one["verdict"] == "fail"]


def failed_below(config: Settings) -> list[str]:
    """The same of every stage on whose products these settings rest."""
    folders = dict.fromkeys(folder for name in named_paths(config) for folder in (Path(name), Path(name).parent))
    return [line for folder in folders for line in failed(folder)]


def _said(ruling: Mapping[str, Any]) -> str:
    return f"{ruling['what']}: {ruling['evidence']}; {ruling['remedy']}"


# --- what is learnt from ----------------------------------------------------------------------------------------------


def of_split(rows: Rows) -> Iterable[Ruling]:
    """Nothing that is measured on is learnt from, and little of it stands there twice."""
    train, heldout = rows.train_records, rows.heldout_records
    if train:
        share = 1 - len(set(train)) / len(train)
        told = f"{share:.0%} of {len(train)} records stand there before"
        yield rule("repeated records", share, told, "leave one of the data.sources out", warn=share > REPEATED)
    if heldout:
        known = {_asked(record) for record in train}
        share = fmean(_asked(record) in known for record in heldout)
        told = f"{share:.0%} of {len(heldout)} held-out prompts are learnt from too"
        remedy = "data.heldout: other sources, or none, with data.heldout_fraction"
        yield rule("leakage", share, told, remedy, fail=share > LEAKED, warn=share > 0)


def _asked(record: Demonstration | Ranking | Rating | Prompt) -> Hashable:
    match record:
        case Demonstration():
            return Prompt(record.messages[:-1])
        case Prompt():
            return record
        case _:
            return record.prompt


def of_rankings(records: Sequence[Ranking]) -> Iterable[Ruling]:
    """Pairs are ordered, and by more than length."""
    ordered = [_ordered(one) for one in records]
    pairs = sum(len(one.answers) * (len(one.answers) - 1) // 2 for one in records)
    tied = 1 - sum(map(len, ordered)) / pairs if pairs else 1.0
    remedy = "let fewer ties be given, or set settings.ties in the reward stage"
    yield rule("ties", tied, f"{tied:.0%} of {pairs} pairs", remedy, fail=tied == 1, warn=tied > TIED)
    sizes = [[len(answer) for answer in one.answers] for one in records]
    unlike = [[(w, x) for w, x in of_one if n[w] != n[x]] for n, of_one in zip(sizes, ordered, strict=True)]
    longer = [fmean(n[w] > n[x] for w, x in of_one) for n, of_one in zip(sizes, unlike, strict=True) if of_one]
    remedy = "rank answers of like length, if length is not what people want"
    yield from _one_sided("length", longer, "the longer answer is preferred in", remedy)


def of_position(records: Sequence[Ranking]) -> Iterable[Ruling]:
    """The place in which an answer was shown does not decide, where answers stand as they were shown.

    A file in which every better answer stands before every worse one has been sorted: its order says nothing.
    """
    first = [fmean(w < x for w, x in of_one) for of_one in map(_ordered, records) if of_one]
    if first and fmean(first) < 1:
        yield from _one_sided("position", first, "the answer shown first is preferred in", "show answers in any order")


def _ordered(one: Ranking) -> list[tuple[int, int]]:
    """(better, worse) for every pair of its answers that is no tie."""
    return [(a, b) for a, b in permutations(range(len(one.ranks)), 2) if one.ranks[a] < one.ranks[b]]


def _one_sided(what: str, shares: Sequence[float], told: str, remedy: str) -> Iterable[Ruling]:
    """From each prompt's share of pairs. Whether that is a fault nobody but people can say: it warns."""
    if shares:
        share, n = fmean(shares), len(shares)
        low, high = accuracy_interval(share * n, n)
        evidence = f"{told} {_share(share, low, high)} of the pairs of {n} prompts"
        yield rule(what, share, evidence, remedy, warn=low > ONE_SIDED or high < 1 - ONE_SIDED)


def of_judgements(records: Sequence[Ranking]) -> Iterable[Ruling]:
    """Whether those who judged the same two answers agree, where a pair was judged more than once.

    The records are those of a file with nothing left out: an equal judgement there is somebody who agrees.
    """
    said: dict[Hashable, list[bool]] = defaultdict(list)
    for one in records:
        for (a, rank_a), (b, rank_b) in combinations(sorted(zip(one.answers, one.ranks, strict=True)), 2):
            if rank_a != rank_b:
                said[one.prompt, a, b].append(rank_a < rank_b)
    agreed = [fmean(x == y for x, y in combinations(votes, 2)) for votes in said.values() if len(votes) > 1]
    if agreed:
        share, n = fmean(agreed), len(agreed)
        low, high = accuracy_interval(share * n, n)
        evidence = f"two judgements of a pair are the same in {_share(share, low, high)}; {n} pairs were judged again"
        remedy = "clearer guidelines, or fewer annotators; data.merge=bradley_terry averages over them"
        yield rule("agreement", share, evidence, remedy, fail=high < LITTLE, warn=share < ENOUGH)


# --- what has learnt --------------------------------------------------------------------------------------------------


def of_numbers(
    kind: str, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], but: Sequence[str] = ()
) -> Iterable[Ruling]:
    """What health says of the last steps: what would have ended the run fails, whether or not it was let go on.

    After a rollback the weights are those of a sound checkpoint: it warns. `but` have rulings of their own.
    """
    patience, kept = settings["health"]["patience_steps"], settings["health"]["on_alarm"] != "rollback"
    found = [one for one in verdicts(kind, rows, settings) if one.metric not in but]
    bad = [
        {one.metric for one in verdicts(kind, rows[: max(0, len(rows) - k)], settings) if one.level == "stop"}
        for k in range(patience)
    ]
    for one in found:
        if one.level != "ok":
            lasted = math.isnan(one.value) or all(one.metric in steps for steps in bad)
            ruling = rule(one.metric, one.value, _number(one.value, one.reason), one.setting, warn=True)
            yield replace(ruling, verdict="fail" if lasted and one.level == "stop" and kept else "warn")
    if all(one.level == "ok" for one in found):
        yield rule("numbers while learning", len(found), f"{len(found)} judged, all well", "see Health")


def of_heldout_loss(rows: Sequence[Mapping[str, Any]]) -> Iterable[Ruling]:
    """It falls."""
    if values := _logged(rows, "loss/heldout"):
        first, last = values[0], values[-1]
        remedy = "a lower optimizer.learning_rate, fewer training.epochs, or more data"
        told = f"{first:.3f} before, {last:.3f} after"
        # It may be below 0: rises are counted from its size.
        rose = last > first + 0.05 * abs(first)
        yield rule("held-out loss", last, told, remedy, fail=rose, warn=last >= first)


def of_heldout_accuracy(rows: Sequence[Mapping[str, Any]], prompts: int) -> Iterable[Ruling]:
    """A policy that learnt preferences tells new answers apart."""
    if values := _logged(rows, "accuracy/heldout"):
        low, high = accuracy_interval(values[-1] * prompts, prompts)
        told = f"{_share(values[-1], low, high)}, on {prompts} prompts"
        yield rule("held-out accuracy", values[-1], told, MORE_RANKINGS, fail=high < 0.5, warn=low <= 0.5)


def of_end(rows: Sequence[Mapping[str, Any]]) -> Iterable[Ruling]:
    """The end mark is learnt: where held-out answers end it is likely, or likelier than before."""
    if values := _logged(rows, END):
        first, last = values[0], values[-1]
        told = f"its probability where held-out answers end was {first:.3f} before, is {last:.3f} after"
        lost = last < first / 2 or (last < ENDS_SELDOM and last <= first)
        remedy = "model.chat_template: answers end in the end mark; `dressage doctor` looks at its label"
        yield rule("end mark", last, told, remedy, fail=lost, warn=last < max(first, ENDS_SELDOM))


def of_greedy(asked: tuple[int, int, int] | None, end: float | None = None) -> Iterable[Ruling]:
    """Of `asked` = (stopped, n, limit): greedy answers end by themselves; that none does where ends are likely fails.

    `end` is the mean probability of the end mark where answers end.
    """
    if asked is not None:
        stopped, n, limit = asked
        told = f"{stopped} of {n} greedy answers end within {limit} tokens"
        never = stopped == 0 and n >= 4 and end is not None and end >= ENDS_OFTEN
        remedy = "the end mark that the sampler stops at (model.chat_template); else more training.epochs"
        yield rule("greedy answers", stopped / n, told, remedy, fail=never, warn=stopped < n / 2)


END = "end/heldout"


def end_probability(role: Role, rows: Sequence[Encoded], template: ChatTemplate) -> dict[str, float]:
    """Mean probability of the end mark where an answer ends, by the metric's name; nothing where none comes to an end.

    It is read off the text itself, not off the mask: an end mark without a label is seen.
    """
    whole = [row.tokens for row in rows[:MEASURED_ON] if row.tokens[-1] in template.stop_tokens]
    total = 0.0
    for chunk in length_sorted_chunks([len(tokens) for tokens in whole], SCORING_TOKENS):
        tokens = pad_right([whole[i] for i in chunk], template.pad_token).to(role.backbone.device)
        sizes = torch.tensor([[len(whole[i])] for i in chunk], device=tokens.device)
        place = torch.arange(tokens.shape[1], device=tokens.device)
        with torch.no_grad():
            ends = score_tokens(role, tokens, place < sizes, place == sizes - 1).logprobs.sum(-1)
        total += float(ends.exp().sum())
    return {END: total / len(whole)} if whole else {}


def ask(
    engine: Engine, template: ChatTemplate, prompts: Sequence[Prompt], answer_tokens: Sequence[int]
) -> tuple[int, int, int] | None:
    """(stopped, n, limit) of greedy answers to the prompts whose own answers are shortest; None if all are long.

    `answer_tokens` are the sizes of those answers: twice the longest is room enough.
    """
    short = [i for i, size in enumerate(answer_tokens) if 2 * size <= ASKED_TOKENS]
    order = sorted(short, key=lambda i: answer_tokens[i])[:ASKED]
    if not order:
        return None
    limit = 2 * answer_tokens[order[-1]]
    try:
        encoded = [template.encode_prompt(prompts[i]) for i in order]
        answers = engine.generate(encoded, Sampling(limit, temperature=0.0))
    except EngineError:
        return None  # Prompts that leave the model no room to answer.
    return sum(answer.finish == "stop" for answer in answers), len(answers), limit


# --- a reward model ---------------------------------------------------------------------------------------------------


def of_accuracy(found: Mapping[str, Any]) -> Iterable[Ruling]:
    """Held-out pairs are ordered rightly, more of them than by length alone; `found` is accuracy.json."""
    accuracy, low, high = found["accuracy"], found["low"], found["high"]
    told = f"{_share(accuracy, low, high)} of {found['pairs']} held-out pairs to {found['prompts']} prompts"
    yield rule("accuracy", accuracy, told, MORE_RANKINGS, fail=high < LITTLE, warn=accuracy <= ENOUGH or low <= 0.5)
    if "length_baseline" in found:
        length = found["length_baseline"]
        told = f"{accuracy:.2f}, where length alone reaches {length:.2f}"
        remedy = "more rankings, of answers of like length"
        yield rule("beyond length", accuracy - length, told, remedy, fail=high < length, warn=accuracy <= length)


def of_scores(scores: Sequence[float]) -> Iterable[Ruling]:
    """Scores are numbers, and differ."""
    spread = pstdev(scores) if all(map(math.isfinite, scores)) else math.nan
    told = _number(spread, f"the deviation of the scores of {len(scores)} held-out answers")
    remedy = "a lower optimizer.learning_rate; `dressage doctor` looks at the head"
    yield rule("scores differ", spread, told, remedy, fail=spread < 1e-3)


def of_pairs(margins: Sequence[float], high: float) -> Iterable[Ruling]:
    """It is no surer of held-out pairs than it may be right: up to `high`, the accuracy's upper bound.

    `margins` are the better answer's score less the other's, in nats: of losses of pairs, before scores are normalised.
    """
    if not margins or not all(map(math.isfinite, margins)):
        return
    loss = fmean(math.log1p(math.exp(-abs(m))) + max(0.0, -m) for m in margins)
    told = f"{loss:.3f} nats a held-out pair, where a coin toss costs 0.693"
    remedy = "fewer training.epochs, or a lower optimizer.learning_rate: it is too sure where it is wrong"
    yield rule("pair loss", loss, told, remedy, warn=loss >= math.log(2))
    error, sure, right = calibration_error(margins)
    told = f"{sure:.2f} sure and {right:.2f} right; {error:.2f} apart in five groups of pairs"
    yield rule("calibration", error, told, remedy, warn=sure > high)


def margins_of(scores: Sequence[float], rows: Sequence[EncodedRanking]) -> list[float]:
    """By how much the better answer of each ordered pair outscores the other; scores stand as the answers do."""
    found, start = [], 0
    for row in rows:
        scored = list(zip(row.ranks, scores[start : start + len(row.ranks)], strict=True))
        start += len(row.ranks)
        found += [(x - y) * (1 if a < b else -1) for (a, x), (b, y) in combinations(scored, 2) if a != b]
    return found


def probes(records: Sequence[Ranking]) -> dict[str, list[str]]:
    """Nonsense in place of each record's best answer, by what it is."""
    best = [one.answers[one.ranks.index(0)] for one in records]
    words = [answer.split() or [""] for answer in best]
    return {
        "an empty answer": [""] * len(best),
        "the prompt said again": [one.prompt.text for one in records],
        "one word over and over": [" ".join(said[:1] * len(said)) for said in words],
        "the answer four times over": [" ".join([answer] * 4) for answer in best],
        "another prompt's answer": best[1:] + best[:1],
    }


def of_probes(
    role: Role, template: ChatTemplate, records: Sequence[Ranking], scores: Sequence[float], max_tokens: int
) -> Iterable[Ruling]:
    """What people liked best outscores nonsense; `scores` are those of the records' answers, as they stand.

    It warns and never fails: a policy that is kept near its start need not find what is wrong there.
    """
    starts = [0, *accumulate(len(one.answers) for one in records)]
    best = [scores[start + one.ranks.index(0)] for start, one in zip(starts, records, strict=False)][:PROBED]
    records = records[:PROBED]
    if len(records) < 2:
        return
    for what, answers in probes(records).items():
        rows = [
            template.encode_answer(one.prompt, answer).tokens[:max_tokens]
            for one, answer in zip(records, answers, strict=True)
        ]
        yield of_probe(what, best, score_rows(role, rows).tolist())


def of_probe(what: str, best: Sequence[float], scores: Sequence[float]) -> Ruling:
    """How often the best answer has more than the nonsense in its place, a tie counting half."""
    won = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(best, scores, strict=True))
    low, high = accuracy_interval(won, len(best))
    told = f"the best answer outscores it in {_share(won / len(best), low, high)} of {len(best)} prompts"
    remedy = "rank answers like it too, and raise kl.coef in the stage that learns from these scores"
    return rule(what, won / len(best), told, remedy, warn=high < 0.5)


# --- what learnt from its own answers, and what came of it ------------------------------------------------------------


def of_movement(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Iterable[Ruling]:
    """The policy is not, to the bit, where it began."""
    # The first answers are those of the first weights, and so are all while the critic alone learns.
    kl = [abs(value) for value in _logged(rows, "kl/reference_per_answer")[1 + settings["value"]["warmup_steps"] :]]
    if kl:
        told = f"{max(kl):.3g} nats an answer from the start, at most"
        remedy = "optimizer.learning_rate; `dressage doctor` looks at the adapter and the optimizer"
        yield rule("the policy moved", max(kl), told, remedy, fail=max(kl) == 0)


def of_comparison(found: Mapping[str, Any]) -> Iterable[Ruling]:
    """Better than before, and able to do what it could; `found` is evaluation.json."""
    rate, low, high = found["win_rate"], found["win_rate_low"], found["win_rate_high"]
    told = f"{_share(rate, low, high)} of {found['prompts']} prompts, judged by {found['judge']}"
    remedy = "a lower optimizer.learning_rate, more kl.coef, or a better reward model"
    yield rule("win rate", rate, told, remedy, fail=high < 0.5, warn=low <= 0.5)
    if "judge_unread" in found:
        unread, failed = found["judge_unread"], found["judge_failed"]
        lost = (unread + failed) / found["prompts"]
        told = f"{unread} of {found['prompts']} pairs had none that can be read, {failed} got no reply; they are ties"
        remedy = "another pair_judge.model, or more pair_judge.timeout_seconds"
        yield rule("the judge's verdicts", lost, told, remedy, warn=lost > UNJUDGED)
    if "judge_same_place" in found:
        share = found["judge_same_place"]
        told = f"in {share:.0%} of pairs the same place won in both orders: a verdict on the place, not on the answer"
        remedy = "a larger pair_judge.model, or plainer pair_judge.criteria"
        yield rule("the judge's place", share, told, remedy, warn=share > ONE_PLACE)
    if {"gold_sft", "score_sft"} <= found.keys():
        gold, score = (found[f"{name}_ppo"] - found[f"{name}_sft"] for name in ("gold", "score"))
        told = f"gold {gold:+.2f}, learned score {score:+.2f}"
        remedy = "fewer training.steps, more kl.coef, or a reward model from newer answers"
        yield rule("gold follows the score", gold, told, remedy, warn=score > 0 > gold)
    before, after = found["finished_sft"], found["finished_ppo"]
    told = f"{after:.0%} come to an end, {before:.0%} before"
    lost = after == 0 and before >= 0.2
    yield rule("finished answers", after, told, 'truncated="penalty"', fail=lost, warn=after < before - 0.2)
    before, after = found["distinct_sft"], found["distinct_ppo"]
    told = f"{after:.0%} of pairs of words are distinct, {before:.0%} before"
    yield rule("variety", after, told, "raise kl.coef, or stop earlier", warn=after < before / 2)
    if "kl_per_answer" in found:
        kl = found["kl_per_answer"]
        told = f"{kl:.1f} nats an answer from the model before"
        yield rule("what it could before", kl, told, "raise kl.coef, or settings.ptx_coef", warn=kl > FAR)


def _logged(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Every value in its order; where it was not finite, NaN."""
    return [math.nan if row[name] is None else float(row[name]) for row in rows if name in row]


def _share(rate: float, low: float, high: float) -> str:
    return f"{rate:.2f} ({low:.2f} to {high:.2f})"


def _number(value: float, told: str) -> str:
    return told if math.isnan(value) else f"{value:.3g}: {told}"

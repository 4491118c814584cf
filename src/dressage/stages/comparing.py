"""How good it has become: a reward model on rankings, two models on the same prompts, a run in a few numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dressage import assemble, assemble_rewards
from dressage.config import DataConfig, EvaluateConfig
from dressage.data.prepare import EncodedRanking
from dressage.errors import DataError
from dressage.evaluation.win_rate import Ranked, accuracy_interval, length_baseline, ordered_pairs, win_rate
from dressage.models.files import load_reward_model
from dressage.models.roles import Role
from dressage.monitor.diversity import distinct
from dressage.pipeline import write_json
from dressage.reward_parts import JudgeConfig
from dressage.rewards.learned import score_rows
from dressage.rewards.pair_judge import Pair, PairVerdicts
from dressage.schema import Rollout
from dressage.stages import gates
from dressage.stages.answers import gold_of, read_answers

EVALUATION = "evaluation.json"


def ranked_scores(role: Role, rows: Sequence[EncodedRanking]) -> list[float]:
    """The score of each answer, in the order in which rows and answers stand."""
    answers = [(number, answer.tokens) for number, row in enumerate(rows) for answer in row.answers]
    scores: list[float] = score_rows(
        role, [tokens for _, tokens in answers], [number for number, _ in answers]
    ).tolist()
    return scores


def reward_accuracy(
    scores: Sequence[float], train: Sequence[EncodedRanking], heldout: Sequence[EncodedRanking]
) -> dict[str, Any]:
    """How often held-out pairs are ordered rightly, with its interval, beside a judge that sees only length.

    `scores` are those of the held-out answers.
    """
    right, pairs = ordered_pairs(scores, *_ranks(heldout))
    if not pairs:
        raise DataError("held-out rankings: every one is a tie, so there is no pair to order; hold out others")
    # Pairs of one prompt are not independent: the interval counts prompts.
    low, high = accuracy_interval(right / pairs * len(heldout), len(heldout))
    found: dict[str, Any] = {
        "accuracy": right / pairs,
        "low": low,
        "high": high,
        "pairs": pairs,
        "prompts": len(heldout),
    }
    if train:
        baseline = length_baseline(Ranked(_lengths(train), *_ranks(train)), Ranked(_lengths(heldout), *_ranks(heldout)))
        found |= {"length_baseline": baseline.accuracy, "longer_is_better": baseline.longer_is_better}
    return found


def _ranks(rows: Sequence[EncodedRanking]) -> tuple[list[int], list[int]]:
    return [rank for row in rows for rank in row.ranks], [group for group, row in enumerate(rows) for _ in row.ranks]


def _lengths(rows: Sequence[EncodedRanking]) -> list[float]:
    return [float(sum(answer.loss_mask)) for row in rows for answer in row.answers]


def evaluate(config: EvaluateConfig, folder: Path, console: Console | None) -> None:
    """Two models' answers to the same prompts -> who wins and how sure that is: folder/evaluation.json."""
    template = assemble.build_template(config.model)
    sides = {
        side: read_answers(Path(path), template)
        for side, path in {"before": config.before, "after": config.after}.items()
    }
    ids = {side: [rollout.prompt.id for rollout in rollouts] for side, rollouts in sides.items()}
    if ids["before"] != ids["after"]:
        raise DataError(f"{config.before} and {config.after} do not answer the same prompts; sample both from one file")
    # Before anything else is loaded: whoever is asked may not be there, and is done with then.
    verdicts = None if config.pair_judge is None else _verdicts(config.pair_judge, config.seed, sides)
    role = None if config.reward_model is None else load_reward_model(Path(config.reward_model))
    found: dict[str, Any] = {
        "judge": config.judge,
        "simulated": config.judge == "gold",
        "prompts": len(sides["before"]),
    }
    gold = {side: [gold_of(rollout) for rollout in rollouts] for side, rollouts in sides.items()}
    learned: dict[str, list[float]] = {}
    if role is not None:
        learned = {
            side: score_rows(role, [(*r.prompt.tokens, *r.completion.tokens) for r in rollouts]).tolist()
            for side, rollouts in sides.items()
        }
    judged = gold if config.judge == "gold" else learned
    if verdicts is not None:
        judged = {"after": [float(sign) for sign in verdicts.signs], "before": [0.0] * len(verdicts.signs)}
    won = win_rate(judged["after"], judged["before"])
    found |= {"win_rate": won.rate, "win_rate_low": won.low, "win_rate_high": won.high}
    found |= {"wins": won.wins, "ties": won.ties, "losses": won.losses}
    if verdicts is not None:
        found |= {f"judge_{what}": getattr(verdicts, what) for what in ("disagreed", "unread", "failed")}
        if verdicts.same_place_share is not None:
            found["judge_same_place"] = verdicts.same_place_share
    for side, name in {"before": "sft", "after": "ppo"}.items():
        rollouts = sides[side]
        found[f"gold_{name}"] = _mean(gold[side])
        if learned:
            found[f"score_{name}"] = _mean(learned[side])
        found[f"length_{name}"] = _mean([float(len(r.completion.tokens)) for r in rollouts])
        found[f"finished_{name}"] = _mean([float(r.completion.finish == "stop") for r in rollouts])
        found[f"distinct_{name}"] = distinct(r.text for r in rollouts)
    kl = Path(config.after).parent / "kl.json"
    if kl.is_file():
        found["kl_per_answer"] = json.loads(kl.read_text(encoding="utf-8"))["kl_per_answer"]
    if config.judge != "gold":
        for name in ("gold_sft", "gold_ppo"):
            del found[name]
    if role is not None and config.rankings:
        rows = assemble.build_rows("rankings", _all(config.rankings, config.max_tokens), template, config.seed).train
        found["reward_accuracy"] = reward_accuracy(ranked_scores(role, rows), (), rows)
    found["examples"] = [
        {
            "prompt": before.prompt.text,
            "before": before.text,
            "after": after.text,
            **({"gold_before": gold["before"][i], "gold_after": gold["after"][i]} if config.judge == "gold" else {}),
            **({"reward_before": learned["before"][i], "reward_after": learned["after"][i]} if learned else {}),
            **({} if verdicts is None else {"verdict": verdicts.signs[i]}),
        }
        for i, (before, after) in enumerate(zip(sides["before"], sides["after"], strict=True))
    ]
    write_json(folder / EVALUATION, found)
    if console:
        console.print(
            f"  win rate {won.rate:.2f} ({won.low:.2f} to {won.high:.2f}) on {won.n} prompts, judged by {config.judge}"
        )
        if verdicts is not None:
            console.print(f"  {_two_orders(verdicts)}", soft_wrap=True)
    gates.judge(folder, gates.of_comparison(found), console)


def _verdicts(judge: JudgeConfig, seed: int, sides: Mapping[str, Sequence[Rollout]]) -> PairVerdicts:
    """A win is one of the answer after."""
    pairs = zip(sides["after"], sides["before"], strict=True)
    return assemble_rewards.build_pair_judge(judge, seed)([Pair(a.prompt.text, a.text, b.text) for a, b in pairs])


def _two_orders(verdicts: PairVerdicts) -> str:
    share = verdicts.same_place_share
    place = "" if share is None else f"; the same place won both times in {share:.0%}"
    return (
        f"asked in both orders: {verdicts.disagreed} pairs disagreed, {verdicts.unread} had no verdict,"
        f" {verdicts.failed} got no reply (all ties){place}"
    )


def summarise(folder: Path) -> dict[str, Any]:
    """summary.json of a pipeline's folder, from its stages' manifests and its evaluation."""

    def products(name: str) -> list[Path]:
        """Of the stages as they are now, not of those that were moved aside."""
        return [path for path in sorted(folder.glob(f"*/{name}")) if ".old-" not in path.parent.name]

    manifests = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in products("stage.json")}
    seconds = {name: manifest.get("seconds", 0.0) for name, manifest in manifests.items()}
    summary: dict[str, Any] = {
        "seconds": seconds | {"total": round(sum(seconds.values()), 3)},
        "peak_rss_gb": max((manifest.get("peak_rss_gb", 0.0) for manifest in manifests.values()), default=0.0),
        "simulated": any(manifest.get("simulated") for manifest in manifests.values()),
    }
    for path in products(EVALUATION):
        found = json.loads(path.read_text(encoding="utf-8"))
        found.pop("examples", None)
        accuracy = found.pop("reward_accuracy", None)
        if accuracy is not None:
            summary |= {"reward_accuracy": accuracy["accuracy"], "reward_accuracy_low": accuracy["low"]}
            summary["reward_accuracy_high"] = accuracy["high"]
        summary |= found
    if "reward_accuracy" not in summary:
        for path in products("accuracy.json"):
            summary["reward_accuracy"] = json.loads(path.read_text(encoding="utf-8"))["accuracy"]
    write_json(folder / "summary.json", summary)
    return summary


def _all(sources: Sequence[str], max_tokens: int) -> Any:
    return DataConfig(sources=tuple(sources), heldout_fraction=0.0, max_tokens=max_tokens)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

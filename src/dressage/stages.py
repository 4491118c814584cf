"""What each verb does: settings and a folder in, products in the folder out."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from dressage import assemble
from dressage.algorithms.catalog import algorithm
from dressage.algorithms.reward_modeling import affine_normalisation
from dressage.batches import RatingBatch
from dressage.config import (
    DpoConfig,
    EvaluateConfig,
    PpoConfig,
    RankConfig,
    RewardConfig,
    SampleConfig,
    Settings,
    SftConfig,
)
from dressage.data.collate import collate_demonstrations, collate_rankings, collate_ratings
from dressage.data.prepare import EncodedRanking
from dressage.data.sources import read_rankings
from dressage.data.template import ChatTemplate
from dressage.errors import ConfigError, DataError
from dressage.evaluation.win_rate import Ranked, accuracy_interval, length_baseline, ordered_pairs, win_rate
from dressage.experience.build import tensors_of
from dressage.feedback.annotator import SimulatedAnnotator, gold_score
from dressage.models.files import (
    Normalisation,
    add_saved_adapter,
    load_backbone,
    load_reward_model,
    save_role,
    saved_model,
)
from dressage.models.pretrained import lineage
from dressage.models.roles import Role, ScalarHead
from dressage.monitor.diversity import distinct
from dressage.pipeline import settings_hash, write_json
from dressage.rewards.learned import score_rows
from dressage.schema import Completion, Message, Prompt, Rollout, Sampling
from dressage.training.batch_sources import DatasetSource, RolloutSource, logprobs_of
from dressage.training.online import online_algorithm, updates_per_round
from dressage.training.reference import with_reference
from dressage.training.trainer import BatchSource, train
from dressage.training.update import CHOSEN, REJECTED, Learner

ANSWERS, RANKINGS, EVALUATION, DATA = "answers.jsonl", "rankings.jsonl", "evaluation.json", "data.json"


def sft(config: SftConfig, folder: Path, console: Console | None) -> None:
    """Demonstrations -> a policy that imitates them: folder/policy."""
    template = assemble.build_template(config.model)
    rows = assemble.build_rows("demonstrations", config.data, template, config.seed)
    _note(folder, rows.notes, console)
    backbone = load_backbone(assemble.learning_model(config))
    policy = assemble.build_role(backbone, "policy", config.lora, seed=config.seed)
    steps = assemble.total_steps(config.training, len(rows.train))
    learner = assemble.build_learner(algorithm("sft"), policy, config, steps)

    def collate(encoded: Sequence[Any]) -> Any:
        return collate_demonstrations(encoded, template.pad_token)

    def measure() -> dict[str, float]:
        return {"loss/heldout": learner.measure(collate(rows.heldout))["loss"]}

    source = DatasetSource(rows.train, collate, config.training.batch_size, config.seed)
    _train(source, learner, config, folder, steps, console, measure if rows.heldout else None)
    save_role(folder / "policy", policy, "policy", config.model, tokenizer=template.tokenizer)


def reward(config: RewardConfig, folder: Path, console: Console | None) -> None:
    """Rankings -> a model that scores answers as people rank them: folder/reward."""
    template = assemble.build_template(config.model)
    rows = assemble.build_rows("rankings", config.data, template, config.seed)
    _note(folder, rows.notes, console)
    backbone = load_backbone(assemble.learning_model(config))
    head = ScalarHead.for_reward(backbone.width, config.seed)
    role = assemble.build_role(backbone, "reward", config.lora, seed=config.seed, head=head, depth=config.depth)
    steps = assemble.total_steps(config.training, len(rows.train))
    learner = assemble.build_learner(algorithm(f"reward_{config.loss}"), role, config, steps)

    def collate(encoded: Sequence[Any]) -> Any:
        return collate_rankings(encoded, template.pad_token)

    def measure() -> dict[str, float]:
        measured = learner.measure(collate(rows.heldout))
        return {"loss/heldout": measured["loss"], "accuracy/heldout": measured["accuracy"]}

    source = DatasetSource(rows.train, collate, config.training.batch_size, config.seed)
    _train(source, learner, config, folder, steps, console, measure if rows.heldout else None)
    assert role.head is not None
    if config.normalise_on is not None:
        rollouts = _read_answers(Path(config.normalise_on), template)
        typical = score_rows(role, [(*r.prompt.tokens, *r.completion.tokens) for r in rollouts])
    else:
        typical = score_rows(role, [answer.tokens for row in rows.train for answer in row.answers])
    gain, bias = (float(value) for value in affine_normalisation(typical))
    role.head.normalise(gain, bias)
    save_role(
        folder / "reward",
        role,
        "reward",
        config.model,
        normalisation=Normalisation(gain, bias),
        tokenizer=template.tokenizer,
    )
    if rows.heldout:
        write_json(folder / "accuracy.json", reward_accuracy(role, rows.train, rows.heldout))


def reward_accuracy(role: Role, train: Sequence[EncodedRanking], heldout: Sequence[EncodedRanking]) -> dict[str, Any]:
    """How often held-out pairs are ordered rightly, with its interval, beside a judge that sees only length."""
    scores = score_rows(role, [answer.tokens for row in heldout for answer in row.answers]).tolist()
    right, pairs = ordered_pairs(scores, *_ranks(heldout))
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


def dpo(config: DpoConfig, folder: Path, console: Console | None) -> None:
    """Answers that people judged -> a policy that prefers as they do: folder/policy."""
    row = assemble.build_preference_algorithm(config)
    template = assemble.build_template(config.model)
    one_by_one = RatingBatch in row.losses
    rows = assemble.build_rows("ratings" if one_by_one else "rankings", config.data, template, config.seed)
    _note(folder, rows.notes, console)
    backbone = load_backbone(assemble.learning_model(config))
    train_rows, heldout = list(rows.train), list(rows.heldout)
    if "reference" in row.roles:
        # Before anything learns the model is its own reference, with whole weights too.
        judged = _referenced([*train_rows, *heldout], Role(backbone), folder, console)
        train_rows, heldout = judged[: len(train_rows)], judged[len(train_rows) :]
    policy = assemble.build_role(backbone, "policy", config.lora, seed=config.seed)
    steps = assemble.total_steps(config.training, len(train_rows))
    learner = assemble.build_learner(row, policy, config, steps)

    def collate(encoded: Sequence[Any]) -> Any:
        return (collate_ratings if one_by_one else collate_rankings)(encoded, template.pad_token)

    def measure() -> dict[str, float]:
        measured = learner.measure(collate(heldout))
        return {f"{name}/heldout": measured[name] for name in ("loss", "accuracy", "margin") if name in measured} | {
            f"{name}_heldout": measured[name] for name in (CHOSEN, REJECTED) if name in measured
        }

    source = DatasetSource(train_rows, collate, config.training.batch_size, config.seed)
    _train(source, learner, config, folder, steps, console, measure if heldout else None)
    save_role(folder / "policy", policy, "policy", config.model, tokenizer=template.tokenizer)


def _referenced(rows: Sequence[Any], reference: Role, folder: Path, console: Console | None) -> list[Any]:
    with Progress(console=console or Console(quiet=True), transient=True) as progress:
        task = progress.add_task("reference", total=sum(len(row.answers) for row in rows))
        return with_reference(rows, reference, folder, lambda read: progress.advance(task, read))


def ppo(config: PpoConfig, folder: Path, console: Console | None) -> None:
    """Prompts and a reward model -> a policy that earns more: folder/policy."""
    row = online_algorithm(config)
    template = assemble.build_template(config.model)
    rows = assemble.build_rows("prompts", config.prompts, template, config.seed)
    ptx = None
    if config.ptx is not None:
        demonstrations = assemble.build_rows("demonstrations", config.ptx.data, template, config.seed)
        ptx = DatasetSource(
            demonstrations.train,
            lambda encoded: collate_demonstrations(encoded, template.pad_token),
            config.ptx.batch_size,
            config.seed,
        )
    _note(folder, rows.notes, console)
    backbone = load_backbone(assemble.learning_model(config))
    reward_model, scorer = assemble.build_reward_model(config, backbone, template)
    value = assemble.build_value(row, config, reward_model)
    trunk = ScalarHead(backbone.width) if value is None and "value" in row.roles else None
    policy = assemble.build_role(backbone, "policy", config.lora, seed=config.seed, head=trunk)
    assert config.training.steps is not None
    steps = config.training.steps
    updates = steps * updates_per_round(config)
    source = RolloutSource(
        config=config,
        algorithm=row,
        prompts=rows.train,
        template=template,
        engine=assemble.build_engine(config.rollout.engine, policy, template, config.rollout.max_batch),
        scorer=scorer,
        policy=policy,
        reference=assemble.build_reference(config, backbone),
        value=value,
        ptx=ptx,
        gold=_gold if config.gold == "simulated" else None,
    )
    _train(source, assemble.build_learner(row, policy, config, updates, value=value), config, folder, steps, console)
    if value is not None:
        save_role(folder / "value", value, "value", config.model)
    save_role(folder / "policy", policy, "policy", config.model, tokenizer=template.tokenizer)


def _train(
    source: BatchSource,
    learner: Learner,
    config: SftConfig | RewardConfig | DpoConfig | PpoConfig,
    folder: Path,
    steps: int,
    console: Console | None,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
) -> None:
    train(
        source,
        learner,
        folder=folder,
        total_steps=steps,
        config=config.training,
        seed=config.seed,
        settings_hash=settings_hash(config),
        open_monitor=assemble.open_monitor(folder, config.kind, steps, console),
        evaluate=evaluate,
    )


def _gold(rollout: Rollout) -> float:
    return gold_score(rollout.prompt.text, rollout.text, rollout.completion.finish == "stop").total


def sample(config: SampleConfig, folder: Path, console: Console | None) -> None:
    """Prompts -> answers of a model: folder/answers.jsonl."""
    template = assemble.build_template(config.model)
    data = config.prompts.model_copy(update={"heldout_fraction": 0.0})
    rows = assemble.build_rows("prompts", data, template, config.seed)
    _note(folder, rows.notes, console)
    role, reference = _model_and_below(config) if config.measure_kl else (Role(load_backbone(config.model)), None)
    engine = assemble.build_engine(config.engine, role, template, config.max_batch)
    sampling = Sampling(
        config.max_new_tokens, temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, seed=config.seed
    )
    asked = [prompt for prompt in rows.train for _ in range(config.answers_per_prompt)]
    with Progress(console=console or Console(quiet=True), transient=True) as progress:
        task = progress.add_task("sampling", total=len(asked))
        completions = engine.generate(asked, sampling, lambda done: progress.update(task, completed=done))
    lines = []
    for index, prompt in enumerate(rows.train):
        first = index * config.answers_per_prompt
        own = completions[first : first + config.answers_per_prompt]
        lines.append(
            {
                "prompt": _messages(prompt),
                "prompt_id": prompt.id,
                "answers": [
                    {"text": template.decode(c.tokens), "tokens": len(c.tokens), "finish": c.finish} for c in own
                ],
                "model": config.model.name,
                "sampling": {
                    "temperature": config.temperature,
                    "max_new_tokens": config.max_new_tokens,
                    "seed": config.seed,
                },
            }
        )
    _write_lines(folder / ANSWERS, lines)
    if reference is not None:
        rollouts = [Rollout(p, c, "", 0) for p, c in zip(asked, completions, strict=True)]
        samples = tensors_of(rollouts, template.pad_token)
        own_logprobs, below = (logprobs_of(r, samples, config.temperature or 1.0) for r in (role, reference))
        kl = (own_logprobs - below).sum(-1).mean()
        write_json(folder / "kl.json", {"kl_per_answer": float(kl), "answers": len(asked)})


def _model_and_below(config: SampleConfig) -> tuple[Role, Role]:
    """A model whose last adapter is a switch, and the model without it."""
    folders = lineage(config.model.name).adapters
    if not folders:
        raise ConfigError(f"measure_kl: model.name={config.model.name} has no adapter to switch off")
    backbone = load_backbone(saved_model(folders[-1]).model_copy(update={"dtype": config.model.dtype}))
    add_saved_adapter(backbone, folders[-1], "policy")
    backbone.model.requires_grad_(False)
    return Role(backbone, "policy"), Role(backbone)


def rank(config: RankConfig, folder: Path, console: Console | None) -> None:
    """Answers -> rankings by the simulated annotator, or people's own rankings checked: folder/rankings.jsonl."""
    lines: list[dict[str, Any]] = []
    if config.rankings is not None:
        loaded = read_rankings(config.rankings)
        _note(folder, (f"{config.rankings}: {loaded.summary()}",), console)
        lines = [
            {
                "prompt": _messages(ranking.prompt),
                "answers": list(ranking.answers),
                "ranks": list(ranking.ranks),
                "finished": list(ranking.finished or [True] * len(ranking.answers)),
                "annotator": f"file: {Path(config.rankings).name}",
                "simulated": False,
            }
            for ranking in loaded.records
        ]
    else:
        assert config.answers is not None
        annotator = SimulatedAnnotator(config.seed, config.noise)
        for number, row in _lines(Path(config.answers)):
            prompt = _prompt(row)
            texts = [answer["text"] for answer in row["answers"]]
            finished = [answer["finish"] == "stop" for answer in row["answers"]]
            if len(texts) < 2:
                raise DataError(
                    f"{config.answers}:{number}: a ranking needs two answers or more; set answers_per_prompt"
                )
            ranks = annotator.rank(prompt.text, texts, finished)
            lines.append(
                {
                    "prompt": row["prompt"],
                    "answers": texts,
                    "ranks": list(ranks),
                    "finished": finished,
                    "annotator": annotator.name,
                    "simulated": True,
                }
            )
        # A row in which nothing is preferred, or an empty answer, has nothing to teach.
        lines = [
            line for line in lines if len(set(line["ranks"])) > 1 and all(text.strip() for text in line["answers"])
        ]
        if console:
            console.print(f"  {len(lines)} rankings by the SIMULATED annotator ({annotator.name})")
    _write_lines(folder / RANKINGS, lines)


def evaluate(config: EvaluateConfig, folder: Path, console: Console | None) -> None:
    """Two models' answers to the same prompts -> who wins and how sure that is: folder/evaluation.json."""
    template = assemble.build_template(config.model)
    sides = {
        side: _read_answers(Path(path), template)
        for side, path in {"before": config.before, "after": config.after}.items()
    }
    ids = {side: [rollout.prompt.id for rollout in rollouts] for side, rollouts in sides.items()}
    if ids["before"] != ids["after"]:
        raise DataError(f"{config.before} and {config.after} do not answer the same prompts; sample both from one file")
    role = None if config.reward_model is None else load_reward_model(Path(config.reward_model))
    found: dict[str, Any] = {
        "judge": config.judge,
        "simulated": config.judge == "gold",
        "prompts": len(sides["before"]),
    }
    gold = {side: [_gold(rollout) for rollout in rollouts] for side, rollouts in sides.items()}
    learned: dict[str, list[float]] = {}
    if role is not None:
        learned = {
            side: score_rows(role, [(*r.prompt.tokens, *r.completion.tokens) for r in rollouts]).tolist()
            for side, rollouts in sides.items()
        }
    judged = gold if config.judge == "gold" else learned
    won = win_rate(judged["after"], judged["before"])
    found |= {"win_rate": won.rate, "win_rate_low": won.low, "win_rate_high": won.high}
    found |= {"wins": won.wins, "ties": won.ties, "losses": won.losses}
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
        found["reward_accuracy"] = reward_accuracy(role, (), rows)
    found["examples"] = [
        {
            "prompt": before.prompt.text,
            "before": before.text,
            "after": after.text,
            **({"gold_before": gold["before"][i], "gold_after": gold["after"][i]} if config.judge == "gold" else {}),
            **({"reward_before": learned["before"][i], "reward_after": learned["after"][i]} if learned else {}),
        }
        for i, (before, after) in enumerate(zip(sides["before"], sides["after"], strict=True))
    ]
    write_json(folder / EVALUATION, found)
    if console:
        console.print(
            f"  win rate {won.rate:.2f} ({won.low:.2f} to {won.high:.2f}) on {won.n} prompts, judged by {config.judge}"
        )


WORK: Mapping[str, Callable[[Any, Path, Console | None], None]] = {
    "sft": sft,
    "reward": reward,
    "dpo": dpo,
    "ppo": ppo,
    "sample": sample,
    "rank": rank,
    "evaluate": evaluate,
}


def work(config: Settings, folder: Path, console: Console | None) -> None:
    """Does what the settings' kind says, and leaves the memory it took."""
    try:
        WORK[config.kind](config, folder, console)  # type: ignore[attr-defined]
    finally:
        gc.collect()


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
    from dressage.config import DataConfig

    return DataConfig(sources=tuple(sources), heldout_fraction=0.0, max_tokens=max_tokens)


def _read_answers(path: Path, template: ChatTemplate) -> list[Rollout]:
    """The first answer to each prompt of an answers.jsonl, written with this template."""
    rollouts = []
    for group, (_, row) in enumerate(_lines(path)):
        prompt, answer = template.encode_prompt(_prompt(row)), row["answers"][0]
        finished = answer["finish"] == "stop"
        tokens = template.encode_answer(prompt, answer["text"], finished).tokens[len(prompt.tokens) :]
        rollouts.append(
            Rollout(prompt, Completion(tokens, (0.0,) * len(tokens), answer["finish"]), answer["text"], group)
        )
    if not rollouts:
        raise DataError(f"{path}: holds no answers")
    return rollouts


def _lines(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                    assert isinstance(row["prompt"], list) and all({"text", "finish"} <= set(a) for a in row["answers"])
                except (ValueError, KeyError, TypeError, AssertionError) as error:
                    raise DataError(
                        f"{path}:{number}: not a line of answers.jsonl; make the file with `dressage sample`"
                    ) from error
                yield number, row
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); make it with `dressage sample`") from error


def _prompt(row: Mapping[str, Any]) -> Prompt:
    return Prompt(tuple(Message(turn["role"], turn["content"]) for turn in row["prompt"]))


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in prompt.messages]


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def _note(folder: Path, notes: Sequence[str], console: Console | None) -> None:
    """What was read, left out and why: on the screen and in data.json."""
    write_json(folder / DATA, {"notes": list(notes)})
    if console:
        for note in notes:
            console.print(f"  {note}", highlight=False, soft_wrap=True)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

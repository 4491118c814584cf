"""The stages that learn: records or prompts in, a role on disk out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from dressage import assemble, assemble_rewards
from dressage.algorithms.catalog import algorithm
from dressage.algorithms.reward_modeling import affine_normalisation
from dressage.batches import RatingBatch
from dressage.config import DpoConfig, PpoConfig, RewardConfig, SftConfig
from dressage.data.collate import collate_demonstrations, collate_rankings, collate_ratings
from dressage.data.merge import standardised
from dressage.data.template import ChatTemplate, Encoded
from dressage.doctor import glance
from dressage.models.files import Normalisation, load_backbone, save_role
from dressage.models.roles import Role, ScalarHead
from dressage.monitor.watch import Watch
from dressage.monitor.writers import read_metrics
from dressage.pipeline import settings_hash, write_json
from dressage.rewards.learned import score_rows
from dressage.schema import Prompt, Reward, Rollout
from dressage.stages import gates
from dressage.stages.answers import gold_of, note, read_answers
from dressage.stages.comparing import ranked_scores, reward_accuracy
from dressage.training.batch_sources import DatasetSource, RolloutSource
from dressage.training.online import online_algorithm, online_settings, updates_of
from dressage.training.reference import with_reference
from dressage.training.trainer import BatchSource, train
from dressage.training.update import CHOSEN, REJECTED, Learner


def sft(config: SftConfig, folder: Path, console: Console | None) -> None:
    """Demonstrations -> a policy that imitates them: folder/policy."""
    template = assemble.build_template(config.model)
    assemble.check_memory(config)
    rows = assemble.build_rows("demonstrations", config.data, template, config.seed)
    note(folder, (*rows.notes, *glance(config, template, "demonstrations", rows)), console)
    backbone = load_backbone(assemble.learning_model(config))
    policy = assemble.build_role(backbone, "policy", config.lora, seed=config.seed)
    steps = assemble.total_steps(config.training, len(rows.train))
    learner = assemble.build_learner(algorithm("sft"), policy, config, steps)

    def collate(encoded: Sequence[Any]) -> Any:
        return collate_demonstrations(encoded, template.pad_token)

    def measure() -> dict[str, float]:
        ends = gates.end_probability(policy, rows.heldout, template)
        return {"loss/heldout": learner.measure(collate(rows.heldout))["loss"]} | ends

    source = DatasetSource(rows.train, collate, config.training.batch_size, config.seed)
    _train(source, learner, config, folder, steps, console, measure if rows.heldout else None)
    save_role(folder / "policy", policy, "policy", config.model, tokenizer=template.tokenizer)
    told = read_metrics(folder)
    talks = [(Prompt(one.messages[:-1]), row) for one, row in zip(rows.heldout_records, rows.heldout, strict=True)]
    rulings = (
        *gates.of_split(rows),
        *gates.of_heldout_loss(told),
        *gates.of_end(told),
        *gates.of_greedy(_asked(policy, talks, template), told[-1].get(gates.END)),
        *gates.of_numbers(config.kind, told, config.model_dump(), but=("loss/heldout",)),
    )
    gates.judge(folder, rulings, console)


def reward(config: RewardConfig, folder: Path, console: Console | None) -> None:
    """Rankings -> a model that scores answers as people rank them: folder/reward."""
    row = algorithm(f"reward_{config.loss}").with_settings(config.settings)
    template = assemble.build_template(config.model)
    assemble.check_memory(config)
    rows = assemble.build_rows("rankings", config.data, template, config.seed)
    note(folder, (*rows.notes, *glance(config, template, "rankings", rows)), console)
    train_rows, heldout = list(rows.train), list(rows.heldout)
    to_normalise = None if config.normalise_on is None else read_answers(Path(config.normalise_on), template)
    if config.loss == "regression":
        train_rows, heldout = standardised(train_rows, heldout)
    role = assemble.build_reward_role(config)
    steps = assemble.total_steps(config.training, len(train_rows))
    learner = assemble.build_learner(row, role, config, steps)

    def collate(encoded: Sequence[Any]) -> Any:
        return collate_rankings(encoded, template.pad_token)

    def measure() -> dict[str, float]:
        measured = learner.measure(collate(heldout))
        return {"loss/heldout": measured["loss"], "accuracy/heldout": measured["accuracy"]}

    source = DatasetSource(train_rows, collate, config.training.batch_size, config.seed)
    _train(source, learner, config, folder, steps, console, measure if heldout else None)
    assert role.head is not None
    if to_normalise is not None:
        typical = score_rows(role, [(*r.prompt.tokens, *r.completion.tokens) for r in to_normalise])
    else:
        typical = score_rows(role, [answer.tokens for one in train_rows for answer in one.answers])
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
    rulings = [*gates.of_split(rows), *gates.of_rankings((*rows.train_records, *rows.heldout_records))]
    if any(len(set(one.ranks)) > 1 for one in heldout):
        scores = ranked_scores(role, heldout)
        accuracy = reward_accuracy(scores, train_rows, heldout)
        write_json(folder / "accuracy.json", accuracy)
        rulings += [*gates.of_accuracy(accuracy), *gates.of_scores(scores)]
        if config.loss != "regression":
            margins = [margin / gain for margin in gates.margins_of(scores, heldout)]
            rulings += gates.of_pairs(margins, accuracy["high"])
        rulings += gates.of_probes(role, template, rows.heldout_records, scores, config.data.max_tokens)
    own = ("loss/heldout", "accuracy/heldout")
    rulings += gates.of_numbers(config.kind, read_metrics(folder), config.model_dump(), but=own)
    gates.judge(folder, rulings, console)


def dpo(config: DpoConfig, folder: Path, console: Console | None) -> None:
    """Answers that people judged -> a policy that prefers as they do: folder/policy."""
    row = assemble.build_preference_algorithm(config)
    template = assemble.build_template(config.model)
    assemble.check_memory(config)
    one_by_one = RatingBatch in row.losses
    kind: assemble.Records = "ratings" if one_by_one else "rankings"
    rows = assemble.build_rows(kind, config.data, template, config.seed)
    note(folder, (*rows.notes, *glance(config, template, kind, rows)), console)
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
    told = read_metrics(folder)
    talks = [(one.prompt, row.answers[0]) for one, row in zip(rows.heldout_records, heldout, strict=True)]
    rulings = (
        *gates.of_split(rows),
        *(() if one_by_one else gates.of_rankings((*rows.train_records, *rows.heldout_records))),
        *gates.of_heldout_loss(told),
        *gates.of_heldout_accuracy(told, len(heldout)),
        *gates.of_greedy(_asked(policy, talks, template)),
        *gates.of_numbers(config.kind, told, config.model_dump(), but=("loss/heldout", "accuracy/heldout")),
    )
    gates.judge(folder, rulings, console)


def _asked(
    policy: Role, talks: Sequence[tuple[Prompt, Encoded]], template: ChatTemplate
) -> tuple[int, int, int] | None:
    engine = assemble.build_engine("native", policy, template, gates.ASKED)
    return gates.ask(engine, template, [prompt for prompt, _ in talks], [sum(row.loss_mask) for _, row in talks])


def _referenced(rows: Sequence[Any], reference: Role, folder: Path, console: Console | None) -> list[Any]:
    with Progress(console=console or Console(quiet=True), transient=True) as progress:
        task = progress.add_task("reference", total=sum(len(row.answers) for row in rows))
        return with_reference(rows, reference, folder, lambda read: progress.advance(task, read))


def ppo(config: PpoConfig, folder: Path, console: Console | None) -> None:
    """Prompts and rewards -> a policy that earns more: folder/policy."""
    row = online_algorithm(config)
    template = assemble.build_template(config.model)
    assemble.check_memory(config)
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
    note(folder, (*rows.notes, *glance(config, template, "prompts", rows)), console)
    assemble_rewards.check_rewards(config, rows.train)
    backbone = load_backbone(assemble.learning_model(config))
    scorer, learned = assemble_rewards.build_rewards(config, backbone, template)
    critic = assemble.build_value(row, config, backbone, learned, template)
    value = None if critic is None else critic[0]
    trunk = ScalarHead(backbone.width) if value is None and "value" in row.roles else None
    policy = assemble.build_role(backbone, "policy", config.lora, seed=config.seed, head=trunk)
    assert config.training.steps is not None
    steps = config.training.steps
    updates = sum(updates_of(row, config, step) for step in range(steps))
    reference = assemble.build_reference(config, backbone)
    source = RolloutSource(
        config=config,
        algorithm=row,
        prompts=rows.train,
        template=template,
        engine=assemble.build_engine(
            config.rollout.engine,
            policy,
            template,
            config.rollout.max_batch,
            spare=config.training.memory_gb is not None,
        ),
        scorer=scorer,
        policy=policy,
        reference=reference,
        value=value,
        ptx=ptx,
        gold=None if config.gold is None else partial(_gold, config.gold),
    )
    whole = online_settings(row).full_kl or config.kl.watch_full
    learner = assemble.build_learner(
        row,
        policy,
        config,
        updates,
        value=value,
        reference=reference if whole else None,
        others=[reference, *learned.values()],
    )
    _train(source, learner, config, folder, steps, console)
    if critic is not None:
        save_role(folder / "value", critic[0], "value", critic[1], tokenizer=template.tokenizer)
    save_role(folder / "policy", policy, "policy", config.model, tokenizer=template.tokenizer)
    told, settings = read_metrics(folder), config.model_dump()
    rulings = (*gates.of_movement(told, settings), *gates.of_numbers(config.kind, told, settings))
    gates.judge(folder, rulings, console)


def _gold(judge: str, rollout: Rollout, reward: Reward) -> float:
    return gold_of(rollout) if judge == "simulated" else reward.parts[judge]


def _train(
    source: BatchSource,
    learner: Learner,
    config: SftConfig | RewardConfig | DpoConfig | PpoConfig,
    folder: Path,
    steps: int,
    console: Console | None,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
) -> None:
    if console and isinstance(source, DatasetSource) and (budget := config.training.memory_gb) is not None:
        longest = max(source.collate([row]).tokens.numel() for row in source.rows)
        if longest > learner.micro_batch_tokens:
            console.print(
                f"  training.memory_gb={budget} has room for {learner.micro_batch_tokens} tokens at once, and no text"
                f" or ranking is cut: the largest, of {longest}, will take more; data.max_tokens leaves it out",
                highlight=False,
                soft_wrap=True,
            )
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
        watch=partial(Watch, config.kind, config.model_dump()),
    )

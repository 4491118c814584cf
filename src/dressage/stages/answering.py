"""The stages between: a model's answers, and their rankings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from dressage import assemble, assemble_rewards
from dressage.algorithms.selection import best_of_groups, best_of_n_kl, expected_best
from dressage.config import RankConfig, SampleConfig
from dressage.data.sources import read_rankings
from dressage.errors import ConfigError, DataError
from dressage.experience.build import tensors_of
from dressage.feedback.annotator import SimulatedAnnotator
from dressage.models.files import add_saved_adapter, load_backbone, saved_model
from dressage.models.pretrained import lineage
from dressage.models.roles import Role
from dressage.pipeline import settings_hash, write_json
from dressage.schema import Rollout, Sampling
from dressage.stages import gates
from dressage.stages.answers import ANSWERS, RANKINGS, lines_of, messages_of, note, prompt_of, write_lines
from dressage.stages.completions import Kept, completed, identity_of
from dressage.training.batch_sources import logprobs_of


def sample(config: SampleConfig, folder: Path, console: Console | None) -> None:
    """Prompts -> answers of a model, or the best of several: folder/answers.jsonl."""
    template = assemble.build_template(config.model)
    data = config.prompts.model_copy(update={"heldout_fraction": 0.0})
    rows = assemble.build_rows("prompts", data, template, config.seed)
    note(folder, rows.notes, console)
    role, reference = _model_and_below(config) if config.measure_kl else (Role(load_backbone(config.model)), None)
    engine = assemble.build_engine(config.engine, role, template, config.max_batch)
    sampling = Sampling(
        config.max_new_tokens, temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, seed=config.seed
    )
    scorer = None
    if config.reward_model is not None:
        # A policy that is switched on and off is not the model of the settings.
        backbone = role.backbone if reference is None else None
        scorer = assemble_rewards.build_reward_model(config.reward_model, config.model, backbone, template)
    drawn = config.answers_per_prompt * config.best_of
    asked = [prompt for prompt in rows.train for _ in range(drawn)]
    with Progress(console=console or Console(quiet=True), transient=True) as progress:
        task = progress.add_task("sampling", total=len(asked))
        sampled = Kept(folder / "checkpoints" / "completions.jsonl", identity_of(settings_hash(config), asked))
        completions = completed(
            engine, asked, sampling, config.max_batch, sampled, lambda done: progress.update(task, completed=done)
        )
    rollouts = [
        Rollout(prompt, completion, template.decode(completion.tokens), number // config.best_of)
        for number, (prompt, completion) in enumerate(zip(asked, completions, strict=True))
    ]
    answers: list[dict[str, Any]] = [
        {"text": r.text, "tokens": len(r.completion.tokens), "finish": r.completion.finish} for r in rollouts
    ]
    sampling_said: dict[str, Any] = {
        "temperature": config.temperature,
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
    }
    if scorer is not None:
        scores = torch.tensor([reward.total for reward in scorer.score(rollouts)])
        kept = best_of_groups(scores, torch.tensor([rollout.group for rollout in rollouts]))
        answers = [answers[i] | {"score": float(scores[i])} for i in kept.nonzero()[:, 0].tolist()]
        sampling_said |= {
            "reward_model": config.reward_model,
            "best_of": config.best_of,
            "kl_bound_per_answer": best_of_n_kl(config.best_of),
        }
        write_json(
            folder / "best_of.json", {"prompts": len(rows.train), "curve": best_of_curve(scores.view(-1, drawn))}
        )
    lines = [
        {
            "prompt": messages_of(prompt),
            "prompt_id": prompt.id,
            "answers": answers[index * config.answers_per_prompt :][: config.answers_per_prompt],
            "model": config.model.name,
            "sampling": sampling_said,
        }
        for index, prompt in enumerate(rows.train)
    ]
    write_lines(folder / ANSWERS, lines)
    if reference is not None:
        samples = tensors_of(rollouts, template.pad_token)
        own_logprobs, below = (logprobs_of(r, samples, config.temperature or 1.0) for r in (role, reference))
        kl = (own_logprobs - below).sum(-1).mean()
        write_json(folder / "kl.json", {"kl_per_answer": float(kl), "answers": len(asked)})


def best_of_curve(scores: torch.Tensor) -> list[dict[str, float]]:
    """What the best of 1, 2, 4 ... answers scores, and the bound on its KL, from scores [prompts, answers]."""
    most = scores.shape[-1]
    return [
        {"n": n, "score": expected_best(scores, n).mean().item(), "kl_bound_per_answer": best_of_n_kl(n)}
        for n in sorted({2**power for power in range(most.bit_length())} | {most})
    ]


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
    rulings: list[gates.Ruling] = []
    if config.rankings is not None:
        loaded = read_rankings(config.rankings)
        rulings += gates.of_judgements(read_rankings(config.rankings, repeated=True).records)
        note(folder, (f"{config.rankings}: {loaded.summary()}",), console)
        lines = [
            {
                "prompt": messages_of(ranking.prompt),
                "answers": list(ranking.answers),
                "ranks": list(ranking.ranks),
                "finished": list(ranking.finished or [True] * len(ranking.answers)),
                "annotator": f"file: {Path(config.rankings).name}",
                "simulated": False,
            }
            | ({"grades": list(ranking.grades)} if ranking.grades else {})
            for ranking in loaded.records
        ]
    else:
        assert config.answers is not None
        annotator = SimulatedAnnotator(config.seed, config.noise)
        for number, row in lines_of(Path(config.answers)):
            prompt = prompt_of(row)
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
    if not lines:
        raise DataError(f"{config.rankings or config.answers}: no ranking is left: no answer is preferred to another")
    write_lines(folder / RANKINGS, lines)
    made = read_rankings(str(folder / RANKINGS), repeated=True).records if lines else ()
    gates.judge(folder, [*gates.of_rankings(made), *gates.of_position(made), *rulings], console)

"""The stages between: a model's answers, and their rankings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from dressage import assemble
from dressage.config import RankConfig, SampleConfig
from dressage.data.sources import read_rankings
from dressage.errors import ConfigError, DataError
from dressage.experience.build import tensors_of
from dressage.feedback.annotator import SimulatedAnnotator
from dressage.models.files import add_saved_adapter, load_backbone, saved_model
from dressage.models.pretrained import lineage
from dressage.models.roles import Role
from dressage.pipeline import write_json
from dressage.schema import Rollout, Sampling
from dressage.stages.answers import ANSWERS, RANKINGS, lines_of, messages_of, note, prompt_of, write_lines
from dressage.training.batch_sources import logprobs_of


def sample(config: SampleConfig, folder: Path, console: Console | None) -> None:
    """Prompts -> answers of a model: folder/answers.jsonl."""
    template = assemble.build_template(config.model)
    data = config.prompts.model_copy(update={"heldout_fraction": 0.0})
    rows = assemble.build_rows("prompts", data, template, config.seed)
    note(folder, rows.notes, console)
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
                "prompt": messages_of(prompt),
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
    write_lines(folder / ANSWERS, lines)
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
    write_lines(folder / RANKINGS, lines)

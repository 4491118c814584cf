"""The verbs: settings are read, work is handed on, errors become lines. What is slow to load waits inside a verb."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dressage.cli_serving import feedback, serve
from dressage.errors import ConfigError, DressageError, HealthError
from dressage.exits import Verbs
from dressage.monitor.memory import keep_freed_memory

if TYPE_CHECKING:
    from dressage.settings import Settings

app = typer.Typer(cls=Verbs, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a YAML file.")]
StageRecipe = Annotated[
    str | None, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a YAML file; none: settings only.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="SETTING=VALUE", help="Settings that overrule the recipe's, such as training.epochs=2."),
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for all that is made; else the recipe's own.")]
StageOut = Annotated[Path | None, typer.Option("--out", help="Folder for all that is made; else runs/RECIPE.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and say what it will cost; train nothing.")]


def _version(asked: bool) -> None:
    if asked:
        from importlib import metadata

        try:
            version = metadata.version("dressage")
        except metadata.PackageNotFoundError:
            version = "of a source tree, not installed"
        typer.echo(f"dressage {version}")
        raise typer.Exit


@app.callback()
def _dressage(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error came from.", envvar="DRESSAGE_DEBUG")
    ] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which.")] = False,
) -> None:
    """Train language models from human feedback: demonstrations, rankings, a reward model, PPO, evaluation, chat."""


@app.command()
def quickstart(
    overrides: Overrides = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Another seed gives another run.")] = None,
    rankings: Annotated[
        Path | None, typer.Option("--rankings", help="People's rankings, instead of the simulated annotator's.")
    ] = None,
    out: Out = None,
    dry_run: DryRun = False,
) -> None:
    """The whole loop on the packaged small model, on a CPU in minutes, with a report."""
    chosen = [] if seed is None else [f"seed={seed}"]
    if rankings is not None:
        if not dry_run:  # which reads them too
            from dressage.data.sources import read_rankings

            # Not after minutes of training.
            read_rankings(str(rankings))
        # Nothing is simulated then: no answers are sampled to be ranked, and no hidden preference judges.
        chosen += [
            "stages.samples=null",
            "stages.rank.answers=null",
            f"stages.rank.rankings={json.dumps(str(rankings))}",
        ]
        chosen += ["stages.ppo.gold=null", "stages.evaluate.judge=reward"]
    _run_pipeline("quickstart", [*chosen, *(overrides or ())], out, dry_run)


@app.command()
def run(recipe: Recipe, overrides: Overrides = None, out: Out = None, dry_run: DryRun = False) -> None:
    """A pipeline of stages: skips what is done, goes on where it was stopped."""
    _run_pipeline(recipe, overrides or [], out, dry_run)


def _stage_verb(verb: str, what: str, *, kind: str | None = None, default: str | None = None) -> None:
    """A verb for one kind of stage, its own name's unless said; without a recipe it takes `default`."""

    @app.command(verb, help=what)
    def run_stage(
        recipe: StageRecipe = None, overrides: Overrides = None, out: StageOut = None, dry_run: DryRun = False
    ) -> None:
        chosen = overrides or []
        if recipe is not None and "=" in recipe:
            chosen, recipe = [recipe, *chosen], None
        _run_one_stage(kind or verb, recipe or default, chosen, out, dry_run)


_stage_verb("sft", "Learn demonstrations: supervised fine-tuning.")
_stage_verb("reward", "Learn rankings: a reward model.")
_stage_verb("dpo", "Learn rankings or ratings without a reward model: DPO, IPO, KTO, ORPO, SimPO.")
_stage_verb("ppo", "Train the policy against a reward model.")
_stage_verb(
    "rl",
    "The same by any method that learns from its own answers: rl grpo, rl rloo ...; without a recipe by PPO's.",
    kind="ppo",
    default="ppo",
)
_stage_verb("sample", "A model's answers to prompts.")
_stage_verb(
    "rank", "Order those answers: by the simulated annotator, or by people, whose file is checked and taken over."
)
_stage_verb("evaluate", "Compare two models' answers to the same prompts.")


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help='A folder with a model or an adapter, a hub name, or "packaged".')],
    system: Annotated[str | None, typer.Option("--system", help="How the model is to behave.")] = None,
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="Thinking mode, where the model has one.")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 takes the likeliest word.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 256,
    seed: Annotated[int, typer.Option("--seed", help="Another seed gives other answers.")] = 1,
    best_of: Annotated[int, typer.Option("--best-of", min=1, help="Write so many answers, show the best.")] = 1,
    reward_model: Annotated[Path | None, typer.Option("--reward-model", help="Who says which is the best.")] = None,
) -> None:
    """Talk to a model, or to a base with adapters."""
    if best_of > 1 and reward_model is None:
        raise ConfigError(f"--best-of {best_of} needs --reward-model, the folder of one")
    if not math.isfinite(temperature):
        raise ConfigError(f"--temperature {temperature}: must be a finite number")
    console = _console()
    with console.status("loading the model"):
        from dressage.assemble import build_speaker
        from dressage.assemble_rewards import build_reward_model
        from dressage.schema import Sampling
        from dressage.serving.chat import BestOf, Streaming
        from dressage.serving.chat import chat as talk

        speaker = build_speaker(model)
        engine: Streaming = speaker.engine
        if reward_model is not None:
            scorer = build_reward_model(str(reward_model), speaker.config, speaker.backbone, speaker.template)
            engine = BestOf(speaker.engine, scorer, speaker.template, best_of, console)
    sampling = Sampling(max_new_tokens, temperature=temperature, seed=seed)
    talk(engine, speaker.template, sampling=sampling, system=system, thinking=thinking, console=console)


app.command()(serve)
app.add_typer(feedback, name="feedback")


class Language(StrEnum):
    """Of a report."""

    en = "en"
    zh = "zh"


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run's folder, or one stage's.")],
    language: Annotated[Language, typer.Option("--language", help="Of the headings and explanations.")] = Language.en,
) -> None:
    """Write a run's report.html again."""
    from dressage.monitor.report import write_report

    typer.echo(write_report(folder, language=language.value))


@app.command()
def doctor(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="TARGET", help="A recipe, a run's folder, a model's, or a data file; none: the starter's."
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines: one JSON object.")] = False,
) -> None:
    """Look for what goes wrong silently, before it does: 31 checks. Exit code 1 if one finds a fault."""
    import tempfile

    chosen = overrides or []
    if target is not None and "=" in target and not Path(target).exists():
        chosen, target = [target, *chosen], None
    console = _console()
    with tempfile.TemporaryDirectory() as scratch, Console(stderr=True).status("loading") as status:
        _quiet()
        from dressage.doctor import examine, report_of
        from dressage.doctor.target import subject_of

        subject = subject_of(target, chosen, Path(scratch))
        subject.load()
        results = examine(subject, told=lambda check: status.update(f"{check.number}: {check.name}"))
    faults = sum(one.finding.level == "fault" for one in results)
    if as_json:
        typer.echo(json.dumps(report_of(target, subject, results), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _say(console, f"[bold]doctor[/] {target or 'of the starter recipe'}, on {subject.model.name}")
        table = Table("", "check", "verdict", "evidence", box=None, pad_edge=False)
        colours = {"ok": "green", "warn": "yellow", "fault": "bold red", "not applicable": "dim"}
        for one in results:
            level, evidence = one.finding.level, escape(one.finding.evidence)
            if level in ("warn", "fault"):
                evidence += f"\n[bold]-> {escape(one.check.remedy)}[/]"
            table.add_row(str(one.check.number), one.check.name, f"[{colours[level]}]{level}[/]", evidence)
        console.print(table)
        counts = Counter[str](one.finding.level for one in results)
        told = ", ".join(f"{counts[level]} {level}" for level in colours if counts[level])
        _say(console, f"{told}; {sum(one.seconds for one in results):.0f} seconds")
    if faults:
        raise typer.Exit(1)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None,
) -> None:
    """The recipes that are shipped."""
    from dressage.recipe import read_yaml
    from dressage.recipe import recipes as shipped

    if name is not None:
        read_yaml(name)
        typer.echo(shipped().get(name, Path(name)).read_text(encoding="utf-8").rstrip())
        return
    table = Table("recipe", "verb", "what it does", box=None, pad_edge=False)
    for known in shipped():
        raw = read_yaml(known)
        table.add_row(known, "run" if "stages" in raw else raw.get("kind", ""), raw.get("description", ""))
    _console().print(table)


@app.command()
def algorithms(
    name: Annotated[str | None, typer.Argument(help="Explain this row of the catalog.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/algorithms.md.")] = False,
) -> None:
    """The methods there are: what each minimises, needs, and is for."""
    from dressage.algorithms.catalog import ALGORITHMS, algorithm
    from dressage.algorithms.page import describe, family, needs, page

    if markdown:
        typer.echo(page(), nl=False)
    elif name is not None:
        typer.echo("\n".join(describe(algorithm(name))))
    else:
        table = Table("row", "what it is", "needs", "learns", box=None, pad_edge=False)
        for known, row in ALGORITHMS.items():
            table.add_row(known, row.about.title, needs(row), family(row)[0].lower() + family(row)[1:])
        _console().print(table)


def main() -> None:
    """The command `dressage`."""
    keep_freed_memory()
    app(prog_name="dressage")


# --- running stages ---------------------------------------------------------------------------------------------------


def _run_pipeline(recipe: str, overrides: Sequence[str], out: Path | None, dry_run: bool) -> None:
    from dressage.recipe import load_pipeline

    overrides = [*overrides, *([] if out is None else [f"folder={json.dumps(str(out))}"])]
    plan, stages = load_pipeline(recipe, overrides)
    if dry_run:
        _foretell(stages, Path(plan.folder))
        return
    from dressage.pipeline import locked

    with locked(Path(plan.folder)):
        told = {"recipe": recipe, "overrides": overrides, **plan.model_dump(mode="json")}
        _run_stages(told, stages, Path(plan.folder), _console(), gates_stop=plan.gates == "stop")


def _run_stages(
    told: Mapping[str, Any], stages: Mapping[str, Settings], folder: Path, console: Console, gates_stop: bool
) -> None:
    from dressage.monitor.report import write_report
    from dressage.pipeline import write_json
    from dressage.stages.comparing import summarise
    from dressage.stages.gates import failed, failed_below

    for number, (name, settings) in enumerate(stages.items(), start=1):
        kind = getattr(settings, "kind", name)
        _say(console, f"[bold]{number} of {len(stages)}  {name}[/]" + ("" if kind == name else f" [dim]({kind})[/]"))
        if gates_stop and (faults := failed_below(settings)):
            if number > 1:
                _say(console, f"report: {write_report(folder)}")
            kept = f"{name} was not begun; what was made is kept, and gates=warn goes on with it"
            raise HealthError("\n".join([*faults, kept]))
        try:
            _run_stage(name, settings, folder / name, console)
        except DressageError as error:
            if number > 1:
                error.add_note(f"stopped at {name}; the stages before it stay, and the same command goes on from here")
            raise
        # Not before: a run that cannot even begin leaves nothing behind.
        write_json(folder / "pipeline.json", told)
    summary = summarise(folder)
    _show_summary(summary, console)
    _say(console, f"report: {write_report(folder)}")
    if gates_stop and (faults := [line for name in stages for line in failed(folder / name)]):
        raise HealthError("\n".join(faults))


def _run_one_stage(kind: str, recipe: str | None, overrides: Sequence[str], out: Path | None, dry_run: bool) -> None:
    from dressage.recipe import load_stage

    settings = load_stage(kind, recipe, overrides)
    folder = out or Path("runs") / (Path(recipe).stem if recipe else kind)
    if not folder.name:
        raise ConfigError(f"--out {str(folder)!r}: give a folder of its own, such as runs/mine")
    if dry_run:
        _foretell({folder.name: settings}, folder.parent)
        return
    console = _console()
    _say(console, f"[bold]{kind}[/] -> {folder}")
    _run_stage(folder.name, settings, folder, console)
    from dressage.monitor.report import write_report

    _say(console, f"report: {write_report(folder)}")


def _run_stage(name: str, settings: Settings, folder: Path, console: Console) -> None:
    _quiet()
    from dressage import pipeline, stages
    from dressage.monitor.writers import clock
    from dressage.stages.gates import failed_below

    for fault in failed_below(settings):
        console.print(f"  rests on a stage that is at fault: {fault}", style="yellow", soft_wrap=True, markup=False)
    began = time.perf_counter()
    status = pipeline.run_stage(name, settings, folder, lambda config, place: stages.work(config, place, console))
    said = {
        "skipped": "skipped: done before, with these very settings and inputs",
        "resumed": f"gone on with, and done, in {clock(time.perf_counter() - began)}",
        "done": f"done in {clock(time.perf_counter() - began)}",
    }
    _say(console, f"  [green]{said[status]}[/]")


def _foretell(stages: Mapping[str, Settings], folder: Path) -> None:
    """What each stage will take, without doing any of it."""
    _quiet()
    from dressage.assemble import build_rows, build_template
    from dressage.assemble_rewards import check_rewards
    from dressage.training.preflight import Foresight

    console = _console()
    template = cache(build_template)
    foresight = Foresight(
        cache(lambda kind, data, model, seed: build_rows(kind, data, template(model), seed)), check_rewards
    )
    for number, (name, settings) in enumerate(stages.items(), start=1):
        _say(console, f"[bold]{number} of {len(stages)}  {name}[/] [dim]({getattr(settings, 'kind', name)})[/]")
        for label, text in foresight.of(settings, folder / name).items():
            _say(console, f"  {label:<8} {text}")
    for line in foresight.altogether():
        _say(console, line)


def _show_summary(summary: Mapping[str, Any], console: Console) -> None:
    from dressage.monitor.writers import clock

    def pair(name: str, form: str) -> str:
        return " -> ".join(format(summary[f"{name}_{side}"], form) for side in ("sft", "ppo"))

    rows = {
        "win rate": "{win_rate:.0%} ({win_rate_low:.0%} to {win_rate_high:.0%}), judged by {judge}",
        "reward model": "orders {reward_accuracy:.0%} of held-out pairs rightly",
        "KL": "{kl_per_answer:.2f} nats an answer",
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in rows.items():
        try:
            table.add_row(name, text.format(**summary))
        except KeyError:  # not every pipeline measures everything
            continue
    for key, form in {"gold": ".2f", "length": ".1f", "finished": ".0%", "distinct": ".0%"}.items():
        if f"{key}_sft" in summary and f"{key}_ppo" in summary:
            table.add_row(f"{key}, before -> after", pair(key, form))
    table.add_row("time", clock(summary["seconds"]["total"]))
    table.add_row("memory", f"{summary['peak_rss_gb']:.1f} GB at its peak")
    console.print(table)
    if summary.get("simulated"):
        _say(console, "[yellow]The rankings were SIMULATED: this shows that the machinery works, no more.[/]")


def _console() -> Console:
    return Console(highlight=False)


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True)


def _quiet() -> None:
    from dressage.models.pretrained import quiet_transformers

    quiet_transformers()

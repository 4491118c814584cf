"""Random walks: the shortest way to one node of a graph, by every method that learns from its own answers.

    python benchmarks/random_walks.py [--methods ppo grpo ...] [--seeds 1 2 3] [--out runs/random_walks]

The small benchmark of trlx (after the toy problem of Chen et al. 2021, Decision Transformer), built anew from its
description: a language model of 1.5 million weights is taught random walks on a directed graph of 21 nodes, and then
rewarded for how near the walk it writes comes to the shortest one. Without options: ppo and grpo with seeds 1, 2 and 3,
then all other online rows of the catalog with seed 1, all on equally many answers. What OUT/results.json already holds
is not run again; a run that was interrupted begins anew. Prints a table, writes OUT/results.json and OUT/curves.svg;
exits with 1 if ppo or grpo stays below 0.95.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import string
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from dressage import assemble
from dressage.algorithms.catalog import ALGORITHMS, algorithm
from dressage.config import DataConfig, OptimizerConfig, PpoConfig, SftConfig, TrainingConfig
from dressage.data.collate import collate_demonstrations
from dressage.data.template import ChatTemplate, Encoded
from dressage.experience.build import tensors_of
from dressage.models.files import load_backbone, save_role
from dressage.models.roles import Role, ScalarHead
from dressage.monitor.charts import HEIGHT, WIDTH, Line, Mark, Point, line_chart
from dressage.monitor.metrics import Metric
from dressage.monitor.page import STYLE
from dressage.monitor.writers import METRICS_FILE
from dressage.pipeline import settings_hash, write_json
from dressage.rollout.engine import Engine
from dressage.schema import Demonstration, Message, Prompt, Reward, Rollout, Sampling
from dressage.settings import ModelConfig
from dressage.training.batch_sources import DatasetSource, RolloutSource, logprobs_of
from dressage.training.online import updates_of
from dressage.training.trainer import BatchSource, train
from dressage.training.update import Learner

PROMISED = 0.95
"""What ppo and grpo must reach."""


# --- the graph


@dataclass(frozen=True)
class Graph:
    """Nodes 0, 1, ...; a walk ends at node 0, the goal, from which no edge leads away."""

    edges: tuple[tuple[int, ...], ...]
    """Where each node's edges lead."""
    longest: int
    """A walk has at most so many steps."""

    def distances(self) -> dict[int, int]:
        """Steps of the shortest walk to the goal from each node that has one."""
        found, waiting = {0: 0}, deque([0])
        while waiting:
            near = waiting.popleft()
            for node, ends in enumerate(self.edges):
                if near in ends and node not in found:
                    found[node] = found[near] + 1
                    waiting.append(node)
        return found

    def optimality(self, walk: Sequence[int]) -> float:
        """Steps of the shortest walk from the same start over the steps of this one.

        0 for a walk that does not end at the goal, takes an edge that is not there, or is too long.
        """
        steps = len(walk) - 1
        whole = all(0 <= a < len(self.edges) and b in self.edges[a] for a, b in pairwise(walk))
        if not whole or walk[-1] != 0 or not 0 < steps <= self.longest:
            return 0.0
        return self.distances()[walk[0]] / steps

    def random_walk(self, draw: random.Random) -> list[int]:
        """From any node but the goal, along edges drawn alike, to the goal or as far as a walk may go."""
        walk = [draw.randrange(1, len(self.edges))]
        while walk[-1] != 0 and len(walk) <= self.longest:
            walk.append(draw.choice(self.edges[walk[-1]]))
        return walk


def random_graph(nodes: int = 21, *, edge: float = 0.1, longest: int = 10, seed: int = 1000) -> Graph:
    """Each edge is there with probability `edge`; drawn anew until every node has a walk to the goal."""
    draw = random.Random(seed)
    while True:
        ends = [
            tuple(end for end in range(nodes) if end != node and draw.random() < edge) if node else ()
            for node in range(nodes)
        ]
        graph = Graph(tuple(ends), longest)
        distances = graph.distances()
        if len(distances) == nodes and max(distances.values()) <= longest:
            return graph


# --- the model


@dataclass(frozen=True)
class Sizes:
    """Everything that a quick trial makes smaller."""

    walks: int = 1000
    epochs: int = 10
    layers: int = 6
    width: int = 144
    heads: int = 6
    rounds: int = 60
    answers_per_prompt: int = 8


def untrained(folder: Path, graph: Graph, sizes: Sizes, seed: int) -> None:
    """A GPT-2 of random weights and the words for it: a letter for each node, an end mark, padding."""
    nodes = string.ascii_lowercase[: len(graph.edges)]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*nodes, "<end>", "<pad>"])}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>")
    # A prompt is the node to start from, an answer the nodes after it.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}"
    )
    torch.manual_seed(seed)
    shape = GPT2Config(
        vocab_size=len(nodes) + 2,
        n_positions=graph.longest + 2,
        n_embd=sizes.width,
        n_layer=sizes.layers,
        n_head=sizes.heads,
        bos_token_id=None,
        eos_token_id=len(nodes),
        pad_token_id=len(nodes) + 1,
    )
    GPT2LMHeadModel(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def words(walk: Sequence[int]) -> str:
    return " ".join(string.ascii_lowercase[node] for node in walk)


def learn_walks(folder: Path, graph: Graph, sizes: Sizes, seed: int) -> None:
    """FOLDER/policy, which imitates random walks and from which every method begins: learnt once a seed."""
    if (folder / "policy").is_dir():
        return
    untrained(folder / "untrained", graph, sizes, seed)
    config = SftConfig(
        seed=seed,
        model=ModelConfig(name=str(folder / "untrained"), dtype="float32"),
        data=DataConfig(sources=("random walks",)),
        lora=None,
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine"),
        training=TrainingConfig(
            epochs=sizes.epochs, batch_size=100, micro_batch_tokens=2048, checkpoint_every=0, keep_checkpoints=1
        ),
    )
    template = assemble.build_template(config.model)
    draw = random.Random(seed)
    # Not through a file: a reader of demonstrations leaves out duplicates, and short walks are often the same.
    rows = [demonstration(graph.random_walk(draw), template) for _ in range(sizes.walks)]
    role = assemble.build_role(load_backbone(config.model), "policy", None, seed=seed)
    steps = assemble.total_steps(config.training, len(rows))
    source = DatasetSource(rows, lambda some: collate_demonstrations(some, template.pad_token), 100, seed)
    learn(source, assemble.build_learner(algorithm("sft"), role, config, steps), config, folder / "sft", steps)
    save_role(folder / "policy", role, "policy", config.model, tokenizer=template.tokenizer)


def demonstration(walk: Sequence[int], template: ChatTemplate) -> Encoded:
    turns = (Message("user", words(walk[:1])), Message("assistant", words(walk[1:])))
    return template.encode_demonstration(Demonstration(turns))


def learn(source: BatchSource, learner: Learner, config: SftConfig | PpoConfig, folder: Path, steps: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    train(
        source,
        learner,
        folder=folder,
        total_steps=steps,
        config=config.training,
        seed=config.seed,
        settings_hash=settings_hash(config),
        open_monitor=assemble.open_monitor(folder, config.kind, steps, None),
    )


# --- the methods

ONLINE = [name for name, row in ALGORITHMS.items() if row.samples]
PROMISING = ("ppo", "grpo")

FREE_CRITIC = {"value_coef": 1.0, "value_clip": None, "lam": 1.0}
"""The critic begins at 0 and is to follow rewards that rise to 0.9 in a minute: 0.2 a round at a tenth is too slow, and
lam=0.95 may trust it too early (ppo with seed 3 stayed at 0.942, at another rate)."""
UNCLIPPED = {"optimizer": {"learning_rate": 1e-4}}
"""Nothing holds these at what the old policy did: at the common rate remax and actor_critic end at 0, rloo at 0.73."""
OWN: Mapping[str, Mapping[str, Any]] = {
    "ppo": {"settings": FREE_CRITIC},
    "ppo_penalty": {"settings": FREE_CRITIC},
    "trpo": {
        "settings": FREE_CRITIC | {"max_kl": 0.05},
        "value": {"learning_rate": 5e-4},
        "minibatch_size": None,
    },
    # A critic that sees one token ahead takes any step to the goal for a good one, be there an edge or not; it needs to
    # be quicker than the policy, and a price on what nobody ever walked. Without the price it ends at 0.
    "actor_critic": UNCLIPPED | {"value": {"learning_rate": 1e-3}, "kl": {"coef": 0.05}},
    "reinforce": UNCLIPPED,
    "remax": UNCLIPPED | {"training": {"steps": 53}},  # its greedy answers are answers too
    "rloo": UNCLIPPED,
    "dapo": {"training": {"steps": 25}},  # what is drawn again is drawn
    "cispo": UNCLIPPED,
    # What never arrives is not worth imitating, however few of the answers do.
    "rejection_sampling": {"settings": {"best": 2, "threshold": 0.0}, "minibatch_size": 10},
    # Few rounds of many answers: each learns all that was kept so far, from the first weights on.
    "expert_iteration": {
        "settings": {"best": 8, "threshold": 0.0},
        "rollout": {"answers_per_prompt": 48},
        "training": {"steps": 10},
        "reuse": 4,
        "minibatch_size": 40,
    },
    "online_dpo": {"minibatch_size": 10},  # five pairs of the round's twenty
}
"""Where a method's settings differ from the common ones."""


def settings_of(method: str, model: ModelConfig, graph: Graph, sizes: Sizes, seed: int) -> PpoConfig:
    common: dict[str, Any] = {
        "algorithm": method,
        "seed": seed,
        "model": model,
        "prompts": {"sources": ["every node but the goal"]},
        "reward_model": "optimality",
        "lora": None,
        "value": {"start": "zero"},
        "rollout": {
            "prompts_per_step": len(graph.edges) - 1,
            "answers_per_prompt": sizes.answers_per_prompt,
            "max_new_tokens": graph.longest + 1,
            "max_batch": 512,
        },
        "kl": {"coef": 0.0},
        "score_clip": None,
        "truncated": "keep",
        "minibatch_size": (len(graph.edges) - 1) * sizes.answers_per_prompt // 4,
        "optimizer": {"learning_rate": 5e-4, "schedule": "linear"},
        "training": {
            "steps": sizes.rounds, "micro_batch_tokens": 4096, "checkpoint_every": 0, "keep_checkpoints": 1
        },
    }  # fmt: skip
    for name, own in OWN.get(method, {}).items():
        common[name] = common[name] | own if name in common and isinstance(own, dict) else own
    return PpoConfig.model_validate(common)


@dataclass
class Optimality:
    """The scorer: a walk's optimality is the whole reward."""

    graph: Graph
    scored: int = 0
    """Answers so far."""

    def score(self, rollouts: Sequence[Rollout]) -> list[Reward]:
        """A letter's token is its node's number; the end mark belongs to no walk."""
        self.scored += len(rollouts)
        found = []
        for rollout in rollouts:
            answer = rollout.completion.tokens
            walk = (*rollout.prompt.tokens, *(answer[:-1] if rollout.completion.finish == "stop" else answer))
            found.append(Reward(self.graph.optimality(walk)))
        return found


def run(method: str, config: PpoConfig, graph: Graph, folder: Path) -> dict[str, Any]:
    """One method with one seed, from the model that imitates walks to what it reached."""
    began = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    row = algorithm(method).with_settings(config.settings)
    template = assemble.build_template(config.model)
    prompts = [template.encode_prompt(Prompt.of(words([node]))) for node in range(1, len(graph.edges))]
    backbone = load_backbone(config.model)
    value = trunk = None
    if "value" in row.roles:
        if config.value.learning_rate is None:
            trunk = ScalarHead(backbone.width)
        else:  # A rate of its own means weights of its own: a second copy of the model.
            other = load_backbone(config.model)
            value = assemble.build_role(other, "value", None, seed=config.seed, head=ScalarHead(other.width))
    policy = assemble.build_role(backbone, "policy", None, seed=config.seed, head=trunk)
    reference = assemble.build_reference(config, backbone)
    engine = assemble.build_engine(config.rollout.engine, policy, template, config.rollout.max_batch)
    scorer = Optimality(graph)

    def look() -> dict[str, float]:
        return measured(engine, scorer, prompts, policy, reference, template.pad_token, config.rollout.max_new_tokens)

    before = look()
    assert config.training.steps is not None
    steps, scorer.scored = config.training.steps, 0
    source = RolloutSource(
        config=config,
        algorithm=row,
        prompts=prompts,
        template=template,
        engine=engine,
        scorer=scorer,
        policy=policy,
        reference=reference,
        value=value,
    )
    updates = sum(updates_of(row, config, step) for step in range(steps))
    learn(source, assemble.build_learner(row, policy, config, updates, value=value), config, folder, steps)
    samples = scorer.scored
    rounds = [json.loads(line) for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    return {
        "settings": settings_hash(config),
        "before": before,
        "after": look(),
        "rounds": [one["reward/score_mean"] for one in rounds],
        "samples": samples,
        "seconds": time.perf_counter() - began,
    }


def measured(
    engine: Engine,
    scorer: Optimality,
    prompts: Sequence[Prompt],
    policy: Role,
    reference: Role,
    pad_token: int,
    max_new_tokens: int,
    copies: int = 32,
) -> dict[str, float]:
    """Mean optimality over all starts: of the likeliest answers, and of drawn ones; KL to the reference of those."""

    def answers(times: int, temperature: float) -> list[Rollout]:
        asked = [prompt for prompt in prompts for _ in range(times)]
        sampling = Sampling(max_new_tokens, temperature=temperature, seed=20_000_003)
        return [Rollout(p, c, "", 0) for p, c in zip(asked, engine.generate(asked, sampling), strict=True)]

    def mean(rollouts: Sequence[Rollout]) -> float:
        return sum(reward.total for reward in scorer.score(rollouts)) / len(rollouts)

    drawn = answers(copies, 1.0)
    samples = tensors_of(drawn, pad_token)
    now, then = (logprobs_of(role, samples, 1.0) for role in (policy, reference))
    return {"greedy": mean(answers(1, 0.0)), "drawn": mean(drawn), "kl": float((now - then).sum(-1).mean())}


# --- what is shown


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Of every method its means over the seeds, and each seed's own value behind them."""
    lines = [
        "| method | seeds | before: drawn | after: likeliest | after: drawn | KL | answers drawn | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, seeds in found.items():
        runs = list(seeds.values())
        cells = [
            shown([run["before"]["drawn"] for run in runs]),
            shown([run["after"]["greedy"] for run in runs]),
            shown([run["after"]["drawn"] for run in runs]),
            shown([run["after"]["kl"] for run in runs], 1),
            shown([run["samples"] for run in runs], 0),
            shown([run["seconds"] for run in runs], 0),
        ]
        lines.append(f"| `{method}` | {', '.join(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(values: Sequence[float], digits: int = 3) -> str:
    mean = f"{sum(values) / len(values):.{digits}f}"
    if max(values) == min(values):
        return mean
    return f"{mean} ({', '.join(f'{value:.{digits}f}' for value in values)})"


OPTIMALITY = Metric("optimality", "", "Steps of the shortest walk over steps of the walk written; 0 if it is none.")
GAP, LEGEND = 30, 34


def curves(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A picture that stands by itself: optimality of drawn answers over the rounds, four curves to a chart."""
    charts = [
        (method, [(f"seed {seed}", run["rounds"]) for seed, run in found[method].items()])
        for method in PROMISING
        if method in found
    ]
    first = [(method, next(iter(seeds.values()))["rounds"]) for method, seeds in found.items()]
    charts += [("one seed each", first[i : i + 4]) for i in range(0, len(first), 4)]
    parts = []
    for number, (title, named) in enumerate(charts):
        x, y = number % 2 * (WIDTH + GAP), number // 2 * (HEIGHT + LEGEND + GAP)
        lines = [
            Line(name, OPTIMALITY, [Point(step, value) for step, value in enumerate(rounds, 1)], colour)
            for colour, (name, rounds) in enumerate(named[:4])
        ]
        names = "".join(f'<tspan class="tick c{i}" dx="14">{line.label}</tspan>' for i, line in enumerate(lines))
        chart = line_chart(lines, title=title, step_word="round", marks=[Mark(PROMISED, f"{PROMISED}")])
        placed = chart.replace("<svg ", f'<svg y="{LEGEND}" width="{WIDTH}" height="{HEIGHT}" ', 1)
        parts.append(f'<g transform="translate({x} {y})"><text y="14"><tspan>{title}</tspan>{names}</text>{placed}</g>')
    return standing_alone(parts, 2 * WIDTH + GAP, (len(charts) + 1) // 2 * (HEIGHT + LEGEND + GAP))


def standing_alone(parts: Sequence[str], width: int, height: int) -> str:
    """A file of its own: parts of a picture with a ground, a margin and the report's style."""
    ground = f'<rect x="-20" y="-20" width="{width + 40}" height="{height + 40}" style="fill:var(--card)"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-20 -20 {width + 40} {height + 40}">'
        f"<style>{STYLE} text{{font:14px system-ui,sans-serif;fill:var(--ink)}}</style>{ground}{''.join(parts)}</svg>\n"
    )


def main(arguments: Sequence[str] | None = None, sizes: Sizes = Sizes(), graph: Graph | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--methods", nargs="*", choices=ONLINE, default=[])
    options.add_argument("--seeds", nargs="+", default=["1", "2", "3"])
    options.add_argument("--out", type=Path, default=Path("runs/random_walks"))
    chosen = options.parse_args(arguments)
    graph = graph or random_graph()
    rest = [method for method in ONLINE if method not in PROMISING]
    wanted = [(method, seed) for method in chosen.methods or PROMISING for seed in chosen.seeds]
    wanted += [(method, chosen.seeds[0]) for method in rest if not chosen.methods]
    path = chosen.out / "results.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for method, seed in wanted:
        folder = chosen.out / f"seed-{seed}"
        config = settings_of(method, ModelConfig(name=str(folder / "policy"), dtype="float32"), graph, sizes, int(seed))
        runs = found.setdefault(method, {})
        if runs.get(seed, {}).get("settings") == settings_hash(config):
            continue
        learn_walks(folder, graph, sizes, int(seed))
        runs[seed] = run(method, config, graph, folder / method)
        found = {name: found[name] for name in ONLINE if name in found}
        write_json(path, found)
        (chosen.out / "curves.svg").write_text(curves(found), encoding="utf-8")
        print(table({method: {seed: runs[seed]}}).splitlines()[-1], flush=True)
    print(table(found))
    missed = [
        f"{method}, seed {seed}: {run['after']['greedy']:.3f}"
        for method in PROMISING
        for seed, run in found.get(method, {}).items()
        if run["after"]["greedy"] < PROMISED
    ]
    print("\n".join(missed) or f"ppo and grpo reach {PROMISED} with every seed")
    return 1 if missed else 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # Others may have the rest: the products are too small to gain much.
    sys.exit(main())

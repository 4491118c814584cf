"""The random-walk benchmark: what it measures, by hand; and that it runs, small, and learns."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "random_walks.py"


@pytest.fixture(scope="module")
def walks() -> ModuleType:
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("random_walks", FILE)
    assert spec is not None and spec.loader is not None
    module = sys.modules["random_walks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EDGES = ((), (0, 2), (0,), (1,))
"""3 leads to 1, 1 to 2 and to the goal, 2 to the goal."""


@pytest.mark.parametrize(
    ("walk", "optimality"),
    [
        ([1, 0], 1.0),
        ([3, 1, 0], 1.0),
        ([1, 2, 0], 1 / 2),
        ([3, 1, 2, 0], 2 / 3),
        pytest.param([3, 1], 0.0, id="never arrives"),
        pytest.param([3], 0.0, id="stays"),
        pytest.param([3, 0], 0.0, id="no such edge"),
        pytest.param([2, 1, 0], 0.0, id="an edge backwards"),
        pytest.param([1, 0, 0], 0.0, id="goes on from the goal"),
        pytest.param([1, 4, 0], 0.0, id="no such node"),
    ],
)
def test_optimality_by_hand(walks: ModuleType, walk: list[int], optimality: float) -> None:
    assert walks.Graph(EDGES, longest=3).optimality(walk) == pytest.approx(optimality)


def test_a_walk_may_be_too_long(walks: ModuleType) -> None:
    assert walks.Graph(EDGES, longest=2).optimality([3, 1, 2, 0]) == 0.0
    assert walks.Graph(EDGES, longest=2).optimality([3, 1, 0]) == 1.0


def test_distances_are_those_of_all_walks_tried(walks: ModuleType) -> None:
    """Against the slow way: which nodes reach the goal in k steps, for k = 1, 2, ..."""
    graph = walks.random_graph()
    reached = {0: 0}
    for steps in range(1, graph.longest + 1):
        before = {node for node, distance in reached.items() if distance == steps - 1}
        reached |= {n: steps for n, ends in enumerate(graph.edges) if n not in reached and before & set(ends)}
    assert len(graph.edges) == len(reached) == 21
    assert graph.distances() == reached


def test_random_walks_keep_to_the_graph(walks: ModuleType) -> None:
    graph, draw = walks.random_graph(), random.Random(1)
    drawn = [graph.random_walk(draw) for _ in range(200)]
    assert {walk[0] for walk in drawn} == set(range(1, 21))
    for walk in drawn:
        assert all(b in graph.edges[a] for a, b in pairwise(walk))
        assert walk[-1] == 0 or len(walk) == 11
        assert (graph.optimality(walk) > 0) == (walk[-1] == 0)


def test_the_end_mark_belongs_to_no_walk(walks: ModuleType) -> None:
    schema = pytest.importorskip("dressage.schema")
    start = schema.Prompt((), tokens=(1,))
    answers = {(0, 4): "stop", (0,): "length", (2, 0, 4): "stop", (4,): "stop"}
    rollouts = [
        schema.Rollout(start, schema.Completion(tokens, (0.0,) * len(tokens), finish), "", 0)
        for tokens, finish in answers.items()
    ]
    scorer = walks.Optimality(walks.Graph(EDGES, longest=3))
    assert [reward.total for reward in scorer.score(rollouts)] == [1.0, 1.0, 0.5, 0.0]
    assert scorer.scored == 4


def test_it_runs_learns_and_skips_what_is_done(
    walks: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Out of node 1 two of three edges lead astray: random walks are far from the shortest.
    graph = walks.Graph(((), (0, 2, 3), (1,), (1,)), longest=5)
    sizes = walks.Sizes(walks=200, epochs=40, layers=1, width=64, heads=2, rounds=25, answers_per_prompt=4)
    arguments = ["--methods", "ppo", "grpo", "--seeds", "1", "--out", str(tmp_path)]
    walks.main(arguments, sizes, graph)
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    for method in ("ppo", "grpo"):
        result = found[method]["1"]
        assert result["after"]["drawn"] > result["before"]["drawn"] + 0.1, method
        assert len(result["rounds"]) == 25 and result["samples"] == 25 * 3 * 4
    assert found["ppo"]["1"]["before"] == found["grpo"]["1"]["before"]
    picture = ElementTree.fromstring((tmp_path / "curves.svg").read_text(encoding="utf-8"))
    assert len(picture.findall(".//{*}path")) == 2 + 2  # of each promised method its seed, and both together
    printed = capsys.readouterr().out
    walks.main(arguments, sizes, graph)
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == found
    # The table at the end, and no line of a new run before it.
    assert capsys.readouterr().out == printed[printed.index("| method") :]

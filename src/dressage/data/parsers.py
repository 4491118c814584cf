"""From a row of a file to its records: parsers made of the names of columns, and parsers of one kind of file each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any, TypeVar

from dressage.data.values import (
    LARGEST_GRADE,
    BadRow,
    answer_of,
    conversation_of,
    dense_ranks,
    exact_text,
    filled_text,
    grade_of,
    joined,
    list_of,
    object_of,
    question_of,
    stripped_text,
    to_answer,
    turn_of,
    turns_of,
)
from dressage.schema import Demonstration, Message, Prompt, Ranking, Rating, Role

Row = Mapping[str, Any]
Prompts = Callable[[Row], Iterable[Prompt]]
Demonstrations = Callable[[Row], Iterable[Demonstration]]
Rankings = Callable[[Row], Iterable[Ranking]]
Ratings = Callable[[Row], Iterable[Rating]]
T = TypeVar("T")


def _ranking(prompt: Prompt, answers: Sequence[str], places: Sequence[int]) -> Ranking:
    """Places may have gaps or begin anywhere; ranks are 0, 1, ... with ties."""
    return Ranking(prompt, tuple(answers), dense_ranks(places))


def _graded(prompt: Prompt, answers: Sequence[str], grades: Sequence[float]) -> Ranking:
    return Ranking(prompt, tuple(answers), dense_ranks([-grade for grade in grades]), grades=tuple(grades))


def ask(*columns: str) -> Callable[[Row], Prompt]:
    """A prompt of these columns, one below the other, after the row's `system` and `history` where it has them."""

    def prompt(row: Row) -> Prompt:
        parts = [stripped_text(row[column], column) for column in columns if row.get(column) is not None]
        words = "\n".join(part for part in parts if part)
        turns: list[tuple[Role, str]] = []
        if row.get("system"):
            turns.append(("system", stripped_text(row["system"], "system")))
        for pair in list_of(row.get("history") or (), "history"):
            asked, answered = [*list_of(pair, "a turn of history"), None, None][:2]
            turns += [("user", filled_text(asked, "prompt")), ("assistant", filled_text(answered, "answer"))]
        return Prompt(conversation_of([*turns, ("user", words)]))

    return prompt


def column(name: str) -> Callable[[Row], Prompt]:
    """A prompt that one column holds, as a text, a dialogue or a list of turns."""
    return lambda row: question_of(row[name])


def one(of: Callable[[Row], T]) -> Callable[[Row], Iterable[T]]:
    """A parser of rows that hold one record."""
    return lambda row: (of(row),)


def answered(prompt: Callable[[Row], Prompt], name: str) -> Demonstrations:
    """A demonstration: the prompt, and the answer in column `name`."""

    def parse(row: Row) -> Iterator[Demonstration]:
        yield Demonstration((*prompt(row).messages, Message("assistant", answer_of(row[name]))))

    return parse


def compared(prompt: Callable[[Row], Prompt], chosen: str, rejected: str) -> Rankings:
    """A comparison: the prompt, and two columns with the better and the worse answer; perhaps by how much it won."""

    def parse(row: Row) -> Iterator[Ranking]:
        pair = Ranking.of_pair(prompt(row), answer_of(row[chosen]), answer_of(row[rejected]))
        yield replace(pair, grades=_pair_grades(row))

    return parse


def _pair_grades(row: Row) -> tuple[float, ...]:
    """Of the better and the worse answer, in the ways that people write them; empty: the row has none."""
    if row.get("margin") is not None:
        return (max(0.0, grade_of(row["margin"], "margin")), 0.0)
    for better, worse in (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")):
        if row.get(better) is not None and row.get(worse) is not None:
            grades = grade_of(row[better], better), grade_of(row[worse], worse)
            # Some sets hold pairs whose grades do not say which is better: the order is then all that is known.
            return grades if grades[0] >= grades[1] else ()
    return ()


def preferred(prompt: Callable[[Row], Prompt], first: str, second: str, strength: str) -> Rankings:
    """A comparison whose column `strength` says which answer is better, the second if above 0, and by how much."""

    def parse(row: Row) -> Iterator[Ranking]:
        answers = answer_of(row[first]), answer_of(row[second])
        yield _graded(prompt(row), answers, (0.0, grade_of(row[strength], strength)))

    return parse


def graded_completions(prompt: Callable[[Row], Prompt]) -> Rankings:
    """K answers, each with the grade that a judge gave it."""

    def parse(row: Row) -> Iterator[Ranking]:
        tried = [object_of(completion, "a completion") for completion in list_of(row["completions"], "completions")]
        if len(tried) < 2:
            raise BadRow("fewer than two answers")
        answers = [answer_of(completion.get("response")) for completion in tried]
        grades = [grade_of(completion.get("overall_score"), "overall_score") for completion in tried]
        yield _graded(prompt(row), answers, grades)

    return parse


def ranked(
    prompt: Callable[[Row], Prompt], first: str, second: str, places: Callable[[Row], Sequence[int]]
) -> Rankings:
    """A comparison that a label decides."""

    def parse(row: Row) -> Iterator[Ranking]:
        yield _ranking(prompt(row), (answer_of(row[first]), answer_of(row[second])), places(row))

    return parse


def split_apart(rankings: Rankings) -> Ratings:
    """Of each ranking the best answers, which are good, and the worst, which are not; those between say nothing."""

    def parse(row: Row) -> Iterator[Rating]:
        for ranking in rankings(row):
            finished = ranking.finished or (True,) * len(ranking.answers)
            best, worst = min(ranking.ranks), max(ranking.ranks)
            for answer, rank, end in zip(ranking.answers, ranking.ranks, finished, strict=True):
                if best < worst and rank in (best, worst):
                    yield Rating(ranking.prompt, answer, rank == best, end)

    return parse


def prompts_of(rankings: Rankings) -> Prompts:
    """The prompts of rankings whose prompt cannot be read without the answers."""
    return lambda row: [ranking.prompt for ranking in rankings(row)]


def _label(value: object, places: Mapping[int, Sequence[int]]) -> Sequence[int]:
    if isinstance(value, bool) or not isinstance(value, int) or value not in places:
        raise BadRow("a label that is none of 0, 1, 2", repr(value)[:40])
    return places[value]


_FIRST_IS_ZERO = {0: (0, 1), 1: (1, 0), 2: (0, 0)}
_FIRST_IS_ONE = {0: (0, 0), 1: (0, 1), 2: (1, 0)}


def autoj_label(row: Row) -> Sequence[int]:
    """0, 1: the first or the second answer is better; 2: neither."""
    return _label(row["label"], _FIRST_IS_ZERO)


def majority(row: Row) -> Sequence[int]:
    """What at least two of three annotators say; a tie where each says something else."""
    votes = Counter(tuple(_label(row[f"annotator{n}"], _FIRST_IS_ONE)) for n in (1, 2, 3))
    places, count = votes.most_common(1)[0]
    return places if count >= 2 else (0, 0)


def completed(row: Row) -> Iterator[Demonstration]:
    """OpenAI's fine-tuning rows, in which the end mark of GPT-3 is written out."""
    value = row["completion"]
    words = value.removesuffix("<|endoftext|>") if isinstance(value, str) else value
    yield Demonstration((*question_of(row["prompt"]).messages, Message("assistant", answer_of(words))))


def rated(row: Row) -> Iterator[Rating]:
    """An answer that is good or not, and perhaps was cut off."""
    if not isinstance(row["label"], bool):
        raise BadRow("a label that is not true or false", repr(row["label"])[:40])
    if not isinstance(row.get("finished", True), bool):
        raise BadRow("finished is not true or false")
    yield Rating(question_of(row["prompt"]), answer_of(row["completion"]), row["label"], row.get("finished", True))


def worth_imitating(row: Row) -> Iterable[Demonstration]:
    """The good one among answers that are good or not."""
    return () if row["label"] is False else completed(row)


def talk(name: str) -> Demonstrations:
    """A conversation to imitate; turns after the assistant's last teach nothing and are left out."""

    def parse(row: Row) -> Iterator[Demonstration]:
        messages = conversation_of(turns_of(row[name], name))
        if messages[-1].role == "user":
            messages = messages[:-1]
        if not any(message.role == "assistant" for message in messages):
            raise BadRow("no assistant's turn")
        yield Demonstration(messages)

    return parse


def talk_prompt(name: str) -> Callable[[Row], Prompt]:
    """A conversation without the answer it may end in."""
    return lambda row: to_answer(conversation_of(turns_of(row[name], name)))


def shared_dialogue(row: Row) -> Iterator[Ranking]:
    """Two conversations that are one but for their last answers."""
    chosen, rejected = (joined(turns_of(row[name], name)) for name in ("chosen", "rejected"))
    if len(chosen) != len(rejected) or chosen[:-1] != rejected[:-1]:
        raise BadRow("chosen and rejected differ in more than the last answer")
    if not chosen or chosen[-1].role != "assistant" or rejected[-1].role != "assistant":
        raise BadRow("no assistant's turn at the end")
    prompt = Prompt(conversation_of((m.role, m.content) for m in chosen[:-1]))
    yield Ranking.of_pair(prompt, answer_of(chosen[-1].content), answer_of(rejected[-1].content))


def _instances(row: Row) -> Iterator[tuple[Prompt, Any]]:
    for item in list_of(row["instances"], "instances"):
        instance = object_of(item, "an instance")
        prompt = ask("instruction", "input")({"instruction": row["instruction"], "input": instance.get("input")})
        yield prompt, instance.get("output")


def seed_task_prompts(row: Row) -> Iterable[Prompt]:
    """A task's prompts, one for each instance."""
    return [prompt for prompt, _ in _instances(row)]


def seed_tasks(row: Row) -> Iterator[Demonstration]:
    """A task's instances, with their answers."""
    for prompt, output in _instances(row):
        yield Demonstration((*prompt.messages, Message("assistant", answer_of(output))))


def message_tree(row: Row) -> Iterator[Ranking]:
    """Every turn of a user that has at least two ranked replies."""
    waiting: list[tuple[tuple[tuple[Role, str], ...], Mapping[str, Any]]] = [((), object_of(row["prompt"], "prompt"))]
    while waiting:
        path, node = waiting.pop()
        name = node.get("role")
        path = (*path, turn_of({"role": name, "content": node.get("text")}))
        replies = [object_of(reply, "a reply") for reply in list_of(node.get("replies") or (), "replies")]
        best = [reply for reply in replies if type(reply.get("rank")) is int]
        if path[-1][0] == "user" and len(best) >= 2:
            prompt = Prompt(conversation_of(path))
            yield _ranking(prompt, [answer_of(reply.get("text")) for reply in best], [reply["rank"] for reply in best])
        waiting += [(path, reply) for reply in reversed(replies)]


SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def solutions(row: Row) -> Iterator[Ranking]:
    """Right solutions before wrong ones, ties among each."""
    tried = [object_of(row[solver], solver) for solver in SOLVERS]
    if not all(isinstance(solution.get("is_correct"), bool) for solution in tried):
        raise BadRow("is_correct is not a boolean")
    answers = [answer_of(solution.get("solution")) for solution in tried]
    yield _ranking(ask("question")(row), answers, [0 if solution["is_correct"] else 1 for solution in tried])


def own_prompt(row: Row) -> Prompt:
    """Messages as Dressage wrote them, to the letter; a text is a user's turn."""
    if isinstance(row["prompt"], str):
        return Prompt.of(exact_text(row["prompt"], "prompt"))
    turns = [object_of(turn, "a turn") for turn in list_of(row["prompt"], "prompt")]
    for turn in turns:
        if turn.get("role") not in ("system", "user", "assistant"):
            raise BadRow("a turn of unknown role", repr(turn.get("role"))[:40])
    if not turns or turns[-1]["role"] != "user":
        raise BadRow("the prompt does not end with a user's turn")
    return Prompt(tuple(Message(turn["role"], exact_text(turn.get("content"), "a turn")) for turn in turns))


def own_ranking(row: Row) -> Iterator[Ranking]:
    """Answers and ranks as Dressage wrote them, to the letter."""
    answers = tuple(exact_text(answer, "answer") for answer in list_of(row["answers"], "answers"))
    ranks, finished = tuple(list_of(row["ranks"], "ranks")), tuple(list_of(row.get("finished") or (), "finished"))
    if len(answers) < 2 or len(ranks) != len(answers) or len(finished) not in (0, len(answers)):
        raise BadRow("answers, ranks and finished do not match, or fewer than two answers")
    if not all(type(rank) is int and 0 <= rank < LARGEST_GRADE for rank in ranks):
        raise BadRow("ranks are not whole numbers from 0")
    if not all(type(end) is bool for end in finished):
        raise BadRow("finished is not true or false")
    grades = tuple(grade_of(grade, "a grade") for grade in list_of(row.get("grades") or (), "grades"))
    if len(grades) not in (0, len(answers)):
        raise BadRow("answers and grades do not match")
    pairs = permutations(zip(ranks, grades, strict=False), 2)
    if any(rank < other and grade < higher for (rank, grade), (other, higher) in pairs):
        raise BadRow("a worse rank has a higher grade")
    yield Ranking(own_prompt(row), answers, ranks, finished, grades)


def own_answers(row: object) -> tuple[Prompt, Sequence[Mapping[str, Any]]]:
    """A row of Dressage's own answers.jsonl: the prompt, and its answers with their text and why they ended."""
    found = object_of(row, "the row")
    answers = [object_of(answer, "an answer") for answer in list_of(found.get("answers"), "answers")]
    if not answers:
        raise BadRow("no answers")
    for answer in answers:
        exact_text(answer.get("text"), "answer")
        if answer.get("finish") not in ("stop", "length"):
            raise BadRow("finish is neither stop nor length")
    return own_prompt({"prompt": list_of(found.get("prompt"), "prompt")}), answers


def first_turn(row: Row) -> Prompt:
    """What a user asks first, of several questions in turn."""
    turns = list_of(row["turns"], "turns")
    return Prompt.of(filled_text(turns[0] if turns else "", "prompt"))


def judged(row: Row) -> Prompt:
    """The instruction inside a judge's task description."""
    words = stripped_text(row["instruction"], "instruction")
    found = re.search(r"###The instruction to evaluate:\n(.*?)\n\n###Response to evaluate:", words, re.DOTALL)
    if not found:
        raise BadRow("no instruction inside the judge's task")
    return Prompt.of(filled_text(found[1], "prompt"))


TARGETS = ("target", "answer", "solution", "ground_truth")
"""Columns that may hold what the right answer is, the first that does."""


def aimed(prompts: Prompts) -> Prompts:
    """The same prompts with the row's target, where it has one: a text or a number."""

    def parse(row: Row) -> Iterator[Prompt]:
        held = next((row[name] for name in TARGETS if row.get(name) is not None), None)
        plain = isinstance(held, str | int | float) and not isinstance(held, bool)
        target = str(held).strip() if plain else ""
        for prompt in prompts(row):
            yield replace(prompt, target=target or None)

    return parse

"""How a row of each known kind of file becomes records: one table, `FORMATS`, at the end of this file.

White space around a turn is how a file was laid out, not what was said, and is stripped; only Dressage's own files
keep their texts to the letter, because sampled answers are compared with what the policy wrote.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any, TypeVar

from dressage.schema import Demonstration, Message, Prompt, Ranking, Rating, Role

Row = Mapping[str, Any]
Prompts = Callable[[Row], Iterable[Prompt]]
Demonstrations = Callable[[Row], Iterable[Demonstration]]
Rankings = Callable[[Row], Iterable[Ranking]]
Ratings = Callable[[Row], Iterable[Rating]]
T = TypeVar("T")


class BadRow(Exception):
    """A row that is not a record; `reason` is the same for all rows with this fault, the message may say more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


@dataclass(frozen=True)
class Format:
    """One kind of file: the columns that all its rows have, and what can be read from a row."""

    name: str
    columns: frozenset[str]
    prompts: Prompts
    demonstrations: Demonstrations | None = None
    rankings: Rankings | None = None
    own_ratings: Ratings | None = None

    @property
    def ratings(self) -> Ratings | None:
        """Answers judged one by one; rankings give theirs, split apart."""
        return self.own_ratings or (None if self.rankings is None else split_apart(self.rankings))


# --- values -----------------------------------------------------------------------------------------------------------

ROLES: Mapping[object, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}


def _kind(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case list() | tuple():
            return "a list"
        case Mapping():
            return "an object"
        case str():
            return "text"
    return f"a {type(value).__name__}"


def _exact(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{what} is {_kind(value)}, not text")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise BadRow(f"{what} is not valid Unicode")
    return value


def _text(value: object, what: str) -> str:
    return _exact(value, what).strip()


def _filled(value: object, what: str) -> str:
    text = _text(value, what)
    if not text:
        raise BadRow(f"empty {what}")
    return text


def _items(value: object, what: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise BadRow(f"{what} is {_kind(value)}, not a list")
    return value


def _object(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BadRow(f"{what} is {_kind(value)}, not an object")
    return value


# --- conversations ----------------------------------------------------------------------------------------------------


def _turn(value: object) -> tuple[Role, str]:
    """A turn written {"role", "content"} or {"from", "value"}."""
    turn = _object(value, "a turn")
    name, words = (turn.get("from"), turn.get("value")) if "from" in turn else (turn.get("role"), turn.get("content"))
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise BadRow("a turn of unknown role", repr(name)[:40])
    return role, _text(words, "a turn")


def _joined(turns: Iterable[tuple[Role, str]]) -> tuple[Message, ...]:
    """Neighbouring turns of one speaker are one turn: chat templates want speakers to alternate."""
    messages: list[Message] = []
    for role, words in turns:
        if messages and messages[-1].role == role:
            messages[-1] = Message(role, f"{messages[-1].content}\n\n{words}".strip())
        else:
            messages.append(Message(role, words))
    return tuple(messages)


def _conversation(turns: Iterable[tuple[Role, str]]) -> tuple[Message, ...]:
    """Checked: perhaps a system turn, then user and assistant in turn, the user first, nobody silent."""
    messages = _joined(turns)
    if messages and messages[0] == Message("system", ""):
        messages = messages[1:]
    spoken = messages[1:] if messages and messages[0].role == "system" else messages
    if not spoken or spoken[0].role != "user":
        raise BadRow("the conversation does not begin with a user's turn")
    for message in spoken:
        if message.role == "system":
            raise BadRow("a system turn inside the conversation")
        if not message.content:
            raise BadRow("empty answer" if message.role == "assistant" else "empty prompt")
    return messages


def _dialogue(text: str) -> list[tuple[Role, str]]:
    r"""Turns of "\n\nHuman: ...\n\nAssistant: ..."; an empty last turn is where the answer goes."""
    before, *rest = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if before.strip() or not rest:
        raise BadRow("not a dialogue of Human: and Assistant: turns")
    turns = zip(rest[::2], rest[1::2], strict=True)
    return [("user" if name == "Human" else "assistant", words.strip()) for name, words in turns]


def _turns(value: object, what: str) -> list[tuple[Role, str]]:
    """Turns of a conversation, written as a list of turns or as a dialogue in one text."""
    if isinstance(value, str):
        return _dialogue(_exact(value, what))
    return [_turn(item) for item in _items(value, what)]


def _question(value: object) -> Prompt:
    """A prompt in whatever way people write one: a text, a dialogue in a text, a list of turns."""
    if isinstance(value, str) and not re.match(r"\s*Human:", value):
        return Prompt.of(_filled(value, "prompt"))
    turns = _turns(value.lstrip() if isinstance(value, str) else value, "prompt")
    while turns and turns[-1] == ("assistant", ""):
        turns.pop()
    return _to_answer(_conversation(turns))


def _answer(value: object) -> str:
    """An answer in whatever way people write one: a text, a turn, a list of turns that ends in it."""
    if isinstance(value, list | tuple) and value:
        value = value[-1]
    if isinstance(value, Mapping):
        role, words = _turn(value)
        if role != "assistant":
            raise BadRow("the answer is not the assistant's")
        value = words
    return _filled(value, "answer")


def _to_answer(messages: tuple[Message, ...]) -> Prompt:
    return Prompt(messages[:-1] if messages[-1].role == "assistant" else messages)


def _ranking(prompt: Prompt, answers: Sequence[str], places: Sequence[int]) -> Ranking:
    """Places may have gaps or begin anywhere; ranks are 0, 1, ... with ties."""
    return Ranking(prompt, tuple(answers), dense_ranks(places))


def dense_ranks(places: Sequence[float]) -> tuple[int, ...]:
    """0 for the lowest, then 1, 2, ...; equal places are a tie."""
    order = {place: rank for rank, place in enumerate(sorted(set(places)))}
    return tuple(order[place] for place in places)


def _graded(prompt: Prompt, answers: Sequence[str], grades: Sequence[float]) -> Ranking:
    return Ranking(prompt, tuple(answers), dense_ranks([-grade for grade in grades]), grades=tuple(grades))


LARGEST_GRADE = 1e15
"""Beyond, a grade's square leaves float32, and nothing can be learnt from it."""


def _grade(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"{what} is {_kind(value)}, not a finite number")
    if not abs(value) <= LARGEST_GRADE:  # NaN is not either
        raise BadRow(f"{what} is no finite number, or too large", f"{value:.3g}" if isinstance(value, float) else "")
    return float(value)


# --- parsers and the makers of parsers --------------------------------------------------------------------------------


def ask(*columns: str) -> Callable[[Row], Prompt]:
    """A prompt of these columns, one below the other, after the row's `system` and `history` where it has them."""

    def prompt(row: Row) -> Prompt:
        parts = [_text(row[column], column) for column in columns if row.get(column) is not None]
        words = "\n".join(part for part in parts if part)
        turns: list[tuple[Role, str]] = []
        if row.get("system"):
            turns.append(("system", _text(row["system"], "system")))
        for pair in _items(row.get("history") or (), "history"):
            asked, answered = [*_items(pair, "a turn of history"), None, None][:2]
            turns += [("user", _filled(asked, "prompt")), ("assistant", _filled(answered, "answer"))]
        return Prompt(_conversation([*turns, ("user", words)]))

    return prompt


def column(name: str) -> Callable[[Row], Prompt]:
    """A prompt that one column holds, as a text, a dialogue or a list of turns."""
    return lambda row: _question(row[name])


def one(of: Callable[[Row], T]) -> Callable[[Row], Iterable[T]]:
    """A parser of rows that hold one record."""
    return lambda row: (of(row),)


def answered(prompt: Callable[[Row], Prompt], name: str) -> Demonstrations:
    """A demonstration: the prompt, and the answer in column `name`."""

    def parse(row: Row) -> Iterator[Demonstration]:
        yield Demonstration((*prompt(row).messages, Message("assistant", _answer(row[name]))))

    return parse


def compared(prompt: Callable[[Row], Prompt], chosen: str, rejected: str) -> Rankings:
    """A comparison: the prompt, and two columns with the better and the worse answer; perhaps by how much it won."""

    def parse(row: Row) -> Iterator[Ranking]:
        pair = Ranking.of_pair(prompt(row), _answer(row[chosen]), _answer(row[rejected]))
        yield replace(pair, grades=_pair_grades(row))

    return parse


def _pair_grades(row: Row) -> tuple[float, ...]:
    """Of the better and the worse answer, in the ways that people write them; empty: the row has none."""
    if row.get("margin") is not None:
        return (max(0.0, _grade(row["margin"], "margin")), 0.0)
    for better, worse in (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")):
        if row.get(better) is not None and row.get(worse) is not None:
            grades = _grade(row[better], better), _grade(row[worse], worse)
            # Some sets hold pairs whose grades do not say which is better: the order is then all that is known.
            return grades if grades[0] >= grades[1] else ()
    return ()


def preferred(prompt: Callable[[Row], Prompt], first: str, second: str, strength: str) -> Rankings:
    """A comparison whose column `strength` says which answer is better, the second if above 0, and by how much."""

    def parse(row: Row) -> Iterator[Ranking]:
        answers = _answer(row[first]), _answer(row[second])
        yield _graded(prompt(row), answers, (0.0, _grade(row[strength], strength)))

    return parse


def _graded_completions(row: Row) -> Iterator[Ranking]:
    """K answers, each with the grade that a judge gave it."""
    tried = [_object(completion, "a completion") for completion in _items(row["completions"], "completions")]
    if len(tried) < 2:
        raise BadRow("fewer than two answers")
    answers = [_answer(completion.get("response")) for completion in tried]
    grades = [_grade(completion.get("overall_score"), "overall_score") for completion in tried]
    yield _graded(_instruction(row), answers, grades)


def ranked(
    prompt: Callable[[Row], Prompt], first: str, second: str, places: Callable[[Row], Sequence[int]]
) -> Rankings:
    """A comparison that a label decides."""

    def parse(row: Row) -> Iterator[Ranking]:
        yield _ranking(prompt(row), (_answer(row[first]), _answer(row[second])), places(row))

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


def _autoj_label(row: Row) -> Sequence[int]:
    return _label(row["label"], _FIRST_IS_ZERO)


def _majority(row: Row) -> Sequence[int]:
    """What at least two of three annotators say; a tie where each says something else."""
    votes = Counter(tuple(_label(row[f"annotator{n}"], _FIRST_IS_ONE)) for n in (1, 2, 3))
    places, count = votes.most_common(1)[0]
    return places if count >= 2 else (0, 0)


def _completion(row: Row) -> Iterator[Demonstration]:
    """OpenAI's fine-tuning rows, in which the end mark of GPT-3 is written out."""
    value = row["completion"]
    words = value.removesuffix("<|endoftext|>") if isinstance(value, str) else value
    yield Demonstration((*_question(row["prompt"]).messages, Message("assistant", _answer(words))))


def _rated(row: Row) -> Iterator[Rating]:
    if not isinstance(row["label"], bool):
        raise BadRow("a label that is not true or false", repr(row["label"])[:40])
    if not isinstance(row.get("finished", True), bool):
        raise BadRow("finished is not true or false")
    yield Rating(_question(row["prompt"]), _answer(row["completion"]), row["label"], row.get("finished", True))


def _worth_imitating(row: Row) -> Iterable[Demonstration]:
    return () if row["label"] is False else _completion(row)


def _talk(name: str) -> Demonstrations:
    """A conversation to imitate; turns after the assistant's last teach nothing and are left out."""

    def parse(row: Row) -> Iterator[Demonstration]:
        messages = _conversation(_turns(row[name], name))
        if messages[-1].role == "user":
            messages = messages[:-1]
        if not any(message.role == "assistant" for message in messages):
            raise BadRow("no assistant's turn")
        yield Demonstration(messages)

    return parse


def _talk_prompt(name: str) -> Callable[[Row], Prompt]:
    return lambda row: _to_answer(_conversation(_turns(row[name], name)))


def _shared_dialogue(row: Row) -> Iterator[Ranking]:
    """Two conversations that are one but for their last answers."""
    chosen, rejected = (_joined(_turns(row[name], name)) for name in ("chosen", "rejected"))
    if len(chosen) != len(rejected) or chosen[:-1] != rejected[:-1]:
        raise BadRow("chosen and rejected differ in more than the last answer")
    if not chosen or chosen[-1].role != "assistant" or rejected[-1].role != "assistant":
        raise BadRow("no assistant's turn at the end")
    prompt = Prompt(_conversation((m.role, m.content) for m in chosen[:-1]))
    yield Ranking.of_pair(prompt, _answer(chosen[-1].content), _answer(rejected[-1].content))


def _instances(row: Row) -> Iterator[tuple[Prompt, Any]]:
    for item in _items(row["instances"], "instances"):
        instance = _object(item, "an instance")
        prompt = ask("instruction", "input")({"instruction": row["instruction"], "input": instance.get("input")})
        yield prompt, instance.get("output")


def _seed_tasks(row: Row) -> Iterator[Demonstration]:
    for prompt, output in _instances(row):
        yield Demonstration((*prompt.messages, Message("assistant", _answer(output))))


def _tree(row: Row) -> Iterator[Ranking]:
    """Every turn of a user that has at least two ranked replies."""
    waiting: list[tuple[tuple[tuple[Role, str], ...], Mapping[str, Any]]] = [((), _object(row["prompt"], "prompt"))]
    while waiting:
        path, node = waiting.pop()
        name = node.get("role")
        path = (*path, _turn({"role": name, "content": node.get("text")}))
        replies = [_object(reply, "a reply") for reply in _items(node.get("replies") or (), "replies")]
        best = [reply for reply in replies if type(reply.get("rank")) is int]
        if path[-1][0] == "user" and len(best) >= 2:
            prompt = Prompt(_conversation(path))
            yield _ranking(prompt, [_answer(reply.get("text")) for reply in best], [reply["rank"] for reply in best])
        waiting += [(path, reply) for reply in reversed(replies)]


_SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def _solutions(row: Row) -> Iterator[Ranking]:
    """Right solutions before wrong ones, ties among each."""
    tried = [_object(row[solver], solver) for solver in _SOLVERS]
    if not all(isinstance(solution.get("is_correct"), bool) for solution in tried):
        raise BadRow("is_correct is not a boolean")
    answers = [_answer(solution.get("solution")) for solution in tried]
    yield _ranking(ask("question")(row), answers, [0 if solution["is_correct"] else 1 for solution in tried])


def _own_prompt(row: Row) -> Prompt:
    """Messages as Dressage wrote them, to the letter; a text is a user's turn."""
    if isinstance(row["prompt"], str):
        return Prompt.of(_exact(row["prompt"], "prompt"))
    turns = [_object(turn, "a turn") for turn in _items(row["prompt"], "prompt")]
    for turn in turns:
        if turn.get("role") not in ("system", "user", "assistant"):
            raise BadRow("a turn of unknown role", repr(turn.get("role"))[:40])
    if not turns or turns[-1]["role"] != "user":
        raise BadRow("the prompt does not end with a user's turn")
    return Prompt(tuple(Message(turn["role"], _exact(turn.get("content"), "a turn")) for turn in turns))


def _own_ranking(row: Row) -> Iterator[Ranking]:
    answers = tuple(_exact(answer, "answer") for answer in _items(row["answers"], "answers"))
    ranks, finished = tuple(_items(row["ranks"], "ranks")), tuple(_items(row.get("finished") or (), "finished"))
    if len(answers) < 2 or len(ranks) != len(answers) or len(finished) not in (0, len(answers)):
        raise BadRow("answers, ranks and finished do not match, or fewer than two answers")
    if not all(type(rank) is int and 0 <= rank < LARGEST_GRADE for rank in ranks):
        raise BadRow("ranks are not whole numbers from 0")
    if not all(type(end) is bool for end in finished):
        raise BadRow("finished is not true or false")
    grades = tuple(_grade(grade, "a grade") for grade in _items(row.get("grades") or (), "grades"))
    if len(grades) not in (0, len(answers)):
        raise BadRow("answers and grades do not match")
    pairs = permutations(zip(ranks, grades, strict=False), 2)
    if any(rank < other and grade < higher for (rank, grade), (other, higher) in pairs):
        raise BadRow("a worse rank has a higher grade")
    yield Ranking(_own_prompt(row), answers, ranks, finished, grades)


def own_answers(row: object) -> tuple[Prompt, Sequence[Mapping[str, Any]]]:
    """A row of Dressage's own answers.jsonl: the prompt, and its answers with their text and why they ended."""
    found = _object(row, "the row")
    answers = [_object(answer, "an answer") for answer in _items(found.get("answers"), "answers")]
    if not answers:
        raise BadRow("no answers")
    for answer in answers:
        _exact(answer.get("text"), "answer")
        if answer.get("finish") not in ("stop", "length"):
            raise BadRow("finish is neither stop nor length")
    return _own_prompt({"prompt": _items(found.get("prompt"), "prompt")}), answers


def _first_turn(row: Row) -> Prompt:
    turns = _items(row["turns"], "turns")
    return Prompt.of(_filled(turns[0] if turns else "", "prompt"))


def _judged(row: Row) -> Prompt:
    """The instruction inside a judge's task description."""
    words = _text(row["instruction"], "instruction")
    found = re.search(r"###The instruction to evaluate:\n(.*?)\n\n###Response to evaluate:", words, re.DOTALL)
    if not found:
        raise BadRow("no instruction inside the judge's task")
    return Prompt.of(_filled(found[1], "prompt"))


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


# --- the table --------------------------------------------------------------------------------------------------------


def _columns(*names: str) -> frozenset[str]:
    return frozenset(names)


_instruction = ask("instruction", "input")
_asked = ask("question")

FORMATS: tuple[Format, ...] = (
    # The first whose columns are all there is meant, so a format stands above those whose columns it contains.
    Format("Dressage rankings", _columns("prompt", "answers", "ranks"), one(_own_prompt), rankings=_own_ranking),
    Format("Dressage answers", _columns("prompt", "answers"), one(_own_prompt)),
    Format(
        "HelpSteer2 preferences",
        _columns("prompt", "response_1", "response_2", "preference_strength"),
        one(column("prompt")),
        rankings=preferred(column("prompt"), "response_1", "response_2", "preference_strength"),
    ),
    Format(
        "HelpSteer3 preferences",
        _columns("context", "response1", "response2", "overall_preference"),
        one(column("context")),
        rankings=preferred(column("context"), "response1", "response2", "overall_preference"),
    ),
    Format(
        "UltraFeedback completions",
        _columns("instruction", "completions"),
        one(ask("instruction")),
        rankings=_graded_completions,
    ),
    Format("OASST trees", _columns("message_tree_id", "prompt"), prompts_of(_tree), rankings=_tree),
    Format(
        "PandaLM judgements",
        _columns("instruction", "response1", "response2", "annotator1", "annotator2", "annotator3"),
        one(_instruction),
        rankings=ranked(_instruction, "response1", "response2", _majority),
    ),
    Format(
        "Auto-J judgements",
        _columns("prompt", "response 1", "response 2", "label"),
        one(column("prompt")),
        rankings=ranked(column("prompt"), "response 1", "response 2", _autoj_label),
    ),
    Format("GSM8K solutions", _columns("question", *_SOLVERS), one(_asked), rankings=_solutions),
    Format(
        "persona statements",
        _columns("question", "answer_matching_behavior", "answer_not_matching_behavior"),
        one(_asked),
        rankings=compared(_asked, "answer_matching_behavior", "answer_not_matching_behavior"),
    ),
    Format(
        "question, response_chosen, response_rejected",
        _columns("question", "response_chosen", "response_rejected"),
        one(_asked),
        rankings=compared(_asked, "response_chosen", "response_rejected"),
    ),
    Format(
        "question, response_j, response_k",
        _columns("question", "response_j", "response_k"),
        one(_asked),
        rankings=compared(_asked, "response_j", "response_k"),
    ),
    Format(
        "question, chosen, rejected",
        _columns("question", "chosen", "rejected"),
        one(_asked),
        rankings=compared(_asked, "chosen", "rejected"),
    ),
    Format(
        "instruction, chosen, rejected",
        _columns("instruction", "chosen", "rejected"),
        one(_instruction),
        rankings=compared(_instruction, "chosen", "rejected"),
    ),
    Format(
        "ShareGPT comparisons",
        _columns("conversations", "chosen", "rejected"),
        one(_talk_prompt("conversations")),
        rankings=compared(_talk_prompt("conversations"), "chosen", "rejected"),
    ),
    Format(
        "prompt, chosen, rejected",
        _columns("prompt", "chosen", "rejected"),
        one(column("prompt")),
        rankings=compared(column("prompt"), "chosen", "rejected"),
    ),
    Format("hh dialogues", _columns("chosen", "rejected"), prompts_of(_shared_dialogue), rankings=_shared_dialogue),
    Format(
        "prompt, completion, label",
        _columns("prompt", "completion", "label"),
        one(column("prompt")),
        demonstrations=_worth_imitating,
        own_ratings=_rated,
    ),
    Format(
        "prompt, completion",
        _columns("prompt", "completion"),
        one(column("prompt")),
        demonstrations=_completion,
    ),
    Format(
        "self-instruct tasks",
        _columns("instruction", "instances"),
        lambda row: [prompt for prompt, _ in _instances(row)],
        demonstrations=_seed_tasks,
    ),
    # Held out by those who made them, or not all worth imitating: prompts only.
    Format("self-instruct predictions", _columns("prompt", "instruction", "response", "target"), one(_instruction)),
    Format("judge tasks", _columns("instruction", "response_source", "gpt4_score"), one(_judged)),
    Format("labelled messages", _columns("messages", "label"), one(_talk_prompt("messages"))),
    Format(
        "instruction, output",
        _columns("instruction", "output"),
        one(_instruction),
        demonstrations=answered(_instruction, "output"),
    ),
    Format(
        "prompt, response",
        _columns("prompt", "response"),
        one(column("prompt")),
        demonstrations=answered(column("prompt"), "response"),
    ),
    Format("messages", _columns("messages"), one(_talk_prompt("messages")), demonstrations=_talk("messages")),
    Format(
        "ShareGPT conversations",
        _columns("conversations"),
        one(_talk_prompt("conversations")),
        demonstrations=_talk("conversations"),
    ),
    Format(
        "body, question, answer",
        _columns("body", "question", "answer"),
        one(ask("body", "question")),
        demonstrations=answered(ask("body", "question"), "answer"),
    ),
    Format("question, answer", _columns("question", "answer"), one(_asked), demonstrations=answered(_asked, "answer")),
    Format("turns", _columns("turns"), one(_first_turn)),
    Format("prompt", _columns("prompt"), one(column("prompt"))),
    Format("instruction", _columns("instruction"), one(_instruction)),
    Format("question", _columns("question"), one(_asked)),
    Format("text", _columns("text"), one(column("text"))),
)

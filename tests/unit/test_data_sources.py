"""Files -> records: every format, every kind of broken row, and the real files with their traps."""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dressage.data.formats import FORMATS
from dressage.data.sources import read_demonstrations, read_prompts, read_rankings, read_ratings
from dressage.data.values import BadRow
from dressage.errors import DataError
from dressage.schema import Demonstration, Message, Prompt, Ranking, Rating

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_rows(*rows: object, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return str(path)

    return write_rows


def gpt(*texts: str) -> list[dict[str, str]]:
    """Turns as ShareGPT writes them: human, gpt, human, ..."""
    return [{"from": "gpt" if n % 2 else "human", "value": text} for n, text in enumerate(texts)]


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


def talk(*texts: str) -> tuple[Message, ...]:
    """User, assistant, user, ..."""
    return tuple((assistant if index % 2 else user)(text) for index, text in enumerate(texts))


# --- formats by hand --------------------------------------------------------------------------------------------------

DEMONSTRATIONS = {
    "prompt, completion": (
        {"prompt": "Say hi\n\n###\n\n", "completion": " hi <|endoftext|>"},
        talk("Say hi\n\n###", "hi"),
    ),
    "only one end of text goes": (
        {"prompt": "a", "completion": "b<|endoftext|><|endoftext|>"},
        talk("a", "b<|endoftext|>"),
    ),
    "alpaca": (
        {"instruction": "Translate", "input": "cat", "output": "Katze"},
        talk("Translate\ncat", "Katze"),
    ),
    "alpaca without input": ({"instruction": "Say hi", "input": "", "output": "hi"}, talk("Say hi", "hi")),
    "alpaca, no column input": ({"instruction": "Say hi", "output": "hi"}, talk("Say hi", "hi")),
    "alpaca with history": (
        {"instruction": "c", "input": None, "output": "d", "history": [["a", "b"]], "system": "s"},
        (Message("system", "s"), *talk("a", "b", "c", "d")),
    ),
    "chinese": ({"instruction": "翻译", "input": "猫", "output": "cat"}, talk("翻译\n猫", "cat")),
    "prompt, response": ({"prompt": "a", "response": "b"}, talk("a", "b")),
    "messages": (
        {"messages": [{"role": role, "content": text}
                      for role, text in (("system", "s"), ("user", "a"), ("assistant", "b"))]},
        (Message("system", "s"), *talk("a", "b")),
    ),
    "sharegpt": (
        {"conversations": gpt("a", "b")},
        talk("a", "b"),
    ),
    "sharegpt that ends with a question": (
        {"conversations": gpt("a", "b", "c")},
        talk("a", "b"),
    ),
    "one speaker twice": (
        {"conversations": [*gpt("a"), *gpt("b", "c")]},
        talk("a\n\nb", "c"),
    ),
    "gsm8k": ({"question": "1+1?", "answer": "#### 2"}, talk("1+1?", "#### 2")),
    "asdiv": ({"body": "One.", "question": "How many?", "answer": "1 (one)"}, talk("One.\nHow many?", "1 (one)")),
}  # fmt: skip


@pytest.mark.parametrize("case", DEMONSTRATIONS)
def test_a_demonstration(case: str, write: Write) -> None:
    row, messages = DEMONSTRATIONS[case]
    assert read_demonstrations(write(row)).records == (Demonstration(messages),)


def test_a_task_has_as_many_demonstrations_as_instances(write: Write) -> None:
    instances = [{"input": "", "output": "x"}, {"input": "2", "output": "y"}]
    loaded = read_demonstrations(write({"instruction": "do", "instances": instances, "name": "n"}))
    assert loaded.records == (Demonstration(talk("do", "x")), Demonstration(talk("do\n2", "y")))
    assert loaded.rows == 1


PAIRS = {
    "hh": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: good",
         "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: bad"},
        talk("a", "b", "c"),
    ),
    "hh, lines inside a turn": (
        {"chosen": "\n\nHuman: a\n\nmore\n\nAssistant: good", "rejected": "\n\nHuman: a\n\nmore\n\nAssistant: bad"},
        talk("a\n\nmore"),
    ),
    "lists of turns": (
        {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "good"}],
         "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bad"}]},
        talk("a"),
    ),
    "rm-static": (
        {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "response": " good", "chosen": " good",
         "rejected": " bad"},
        talk("a", "b", "c"),
    ),
    "prompt and two conversations": (
        {"prompt": "a", "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "good"}],
         "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bad"}]},
        talk("a"),
    ),
    "question, chosen": ({"question": "a", "chosen": "good", "rejected": "bad"}, talk("a")),
    "instruction, chosen": ({"instruction": "a", "input": "b", "chosen": "good", "rejected": "bad"}, talk("a\nb")),
    "j and k": ({"question": "a", "response_j": "good", "response_k": "bad"}, talk("a")),
    "system and history": (
        {"system": "s", "history": [["a", "b"]], "question": "c", "response_chosen": "good",
         "response_rejected": "bad"},
        (Message("system", "s"), *talk("a", "b", "c")),
    ),
    "system and history, empty": (
        {"system": "", "history": [], "question": "c", "response_chosen": "good", "response_rejected": "bad"},
        talk("c"),
    ),
    "sharegpt, texts": (
        {"conversations": gpt("a"), "chosen": "good", "rejected": "bad"},
        talk("a"),
    ),
    "sharegpt, objects": (
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}],
         "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}},
        (Message("system", "s"), *talk("a")),
    ),
    "persona": (
        {"question": "a", "statement": "z", "label_confidence": 0.9, "answer_matching_behavior": " good",
         "answer_not_matching_behavior": " bad"},
        talk("a"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS)
def test_a_comparison(case: str, write: Write) -> None:
    row, messages = PAIRS[case]
    source = write(row)
    assert read_rankings(source).records == (Ranking(Prompt(messages), ("good", "bad"), (0, 1)),)
    assert read_prompts(source).records == (Prompt(messages),)


def test_hh_answers_that_differ_in_turns_are_whole_answers(write: Write) -> None:
    """In real rows one side goes on in a second Assistant: turn."""
    row = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c\n\nAssistant: d"}
    assert read_rankings(write(row)).records == (Ranking(Prompt.of("a"), ("b", "c\n\nd"), (0, 1)),)


@pytest.mark.parametrize(
    ("votes", "ranks"),
    [((1, 1, 2), (0, 1)), ((2, 0, 2), (1, 0)), ((0, 0, 0), (0, 0)), ((0, 0, 1), (0, 0)), ((0, 1, 2), (0, 0))],
)
def test_pandalm_takes_the_majority(votes: Sequence[int], ranks: tuple[int, int], write: Write) -> None:
    row = {"instruction": "a", "input": "b", "response1": "x", "response2": "y"}
    row |= {f"annotator{n}": vote for n, vote in enumerate(votes, start=1)}
    assert read_rankings(write(row)).records == (Ranking(Prompt.of("a\nb"), ("x", "y"), ranks),)


@pytest.mark.parametrize(("label", "ranks"), [(0, (0, 1)), (1, (1, 0)), (2, (0, 0))])
def test_autoj_labels(label: int, ranks: tuple[int, int], write: Write) -> None:
    row = {"scenario": "s", "label": label, "prompt": "a", "response 1": " x", "response 2": "y"}
    assert read_rankings(write(row)).records == (Ranking(Prompt.of("a"), ("x", "y"), ranks),)


@pytest.mark.parametrize(
    ("correct", "ranks"),
    [((False, True, False, True), (1, 0, 1, 0)), ((False,) * 4, (0,) * 4), ((True,) * 4, (0,) * 4)],
)
def test_right_solutions_rank_before_wrong_ones(correct: Sequence[bool], ranks: tuple[int, ...], write: Write) -> None:
    solvers = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    tried = {name: {"is_correct": right, "solution": name} for name, right in zip(solvers, correct, strict=True)}
    loaded = read_rankings(write({"question": "a", "ground_truth": "b", **tried}))
    assert loaded.records == (Ranking(Prompt.of("a"), solvers, ranks),)


def test_oasst_every_node_with_two_ranked_replies(write: Write) -> None:
    def node(role: str, text: str, *replies: object, rank: int | None = None) -> dict[str, Any]:
        return {"role": role, "text": text, "replies": list(replies)} | ({} if rank is None else {"rank": rank})

    deep = node("prompter", "c", node("assistant", "y", rank=2), node("assistant", "x", rank=0),
                node("assistant", "unranked"), node("assistant", "unranked too") | {"rank": None})  # fmt: skip
    single = node("prompter", "d", node("assistant", "only"))
    tree = node("prompter", "a", node("assistant", "b0", deep, rank=0), node("assistant", "b1", single, rank=1))
    loaded = read_rankings(write({"message_tree_id": "1", "tree_state": "ready", "prompt": tree}))
    assert loaded.records == (
        Ranking(Prompt(talk("a")), ("b0", "b1"), (0, 1)),
        Ranking(Prompt(talk("a", "b0", "c")), ("y", "x"), (1, 0)),
    )
    nothing = read_rankings(write({"message_tree_id": "1", "prompt": single}))
    assert (nothing.records, [row.reason for row in nothing.dropped]) == ((), ["no rankings in it"])


def test_own_rankings_are_read_to_the_letter(write: Write) -> None:
    messages = [{"role": "user", "content": " a\n"}]
    row = {"prompt": messages, "answers": [" x ", "", "z"], "ranks": [0, 1, 1], "finished": [True, True, False],
           "annotator": "simulated: brief", "simulated": True}  # fmt: skip
    ranking = Ranking(Prompt.of(" a\n"), (" x ", "", "z"), (0, 1, 1), (True, True, False))
    assert read_rankings(write(row)).records == (ranking,)


GRADED = {
    "own": (
        {"prompt": "a", "answers": ["x", "y", "z"], "ranks": [1, 0, 1], "grades": [2, 3.5, 2]},
        ("x", "y", "z"), (1, 0, 1), (2.0, 3.5, 2.0),
    ),
    "UltraFeedback binarized": (
        {"prompt": "a", "chosen": "x", "rejected": "y", "score_chosen": 8.5, "score_rejected": 6},
        ("x", "y"), (0, 1), (8.5, 6.0),
    ),
    "a margin": (
        {"prompt": "a", "chosen": "x", "rejected": "y", "margin": 3}, ("x", "y"), (0, 1), (3.0, 0.0),
    ),
    "scores that contradict": (
        {"prompt": "a", "chosen": "x", "rejected": "y", "chosen_score": 1, "rejected_score": 2},
        ("x", "y"), (0, 1), (),
    ),
    "UltraFeedback": (
        {"instruction": "a",
         "completions": [{"response": r, "overall_score": s} for r, s in (("x", 7), ("y", 9), ("z", 7))]},
        ("x", "y", "z"), (1, 0, 1), (7.0, 9.0, 7.0),
    ),
    "HelpSteer2, the second": (
        {"prompt": "a", "response_1": "x", "response_2": "y", "preference_strength": 2}, ("x", "y"), (1, 0), (0.0, 2.0),
    ),
    "HelpSteer2, a tie": (
        {"prompt": "a", "response_1": "x", "response_2": "y", "preference_strength": 0}, ("x", "y"), (0, 0), (0.0, 0.0),
    ),
    "HelpSteer3, the first": (
        {"context": [{"role": "user", "content": "a"}], "response1": "x", "response2": "y", "overall_preference": -1},
        ("x", "y"), (0, 1), (0.0, -1.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GRADED)
def test_how_strongly_an_answer_won(case: str, write: Write) -> None:
    row, answers, ranks, grades = GRADED[case]
    assert read_rankings(write(row)).records == (Ranking(Prompt.of("a"), answers, ranks, grades=grades),)


def test_ratings_and_what_is_worth_imitating_among_them(write: Write) -> None:
    source = write(*({"prompt": "a", "completion": answer, "label": answer == "b"} for answer in "bc"))
    assert read_ratings(source).records == (Rating(Prompt.of("a"), "b", True), Rating(Prompt.of("a"), "c", False))
    assert read_demonstrations(source).records == (Demonstration(talk("a", "b")),)
    assert read_prompts(source).records == (Prompt.of("a"),)
    with pytest.raises(DataError, match=r":1: a label that is not true or false \('good'\)"):
        read_ratings(write({"prompt": "a", "completion": "b", "label": "good"}))


def test_rankings_split_apart_into_ratings(write: Write) -> None:
    """The best are good, the worst are not, the middle says nothing; where all are tied nothing is said."""
    own = {"prompt": "p", "answers": ["a", "b", "c", "d"], "ranks": [1, 0, 2, 0], "finished": [True, False, True, True]}
    rated = (
        Rating(Prompt.of("p"), "b", True, False),
        Rating(Prompt.of("p"), "c", False),
        Rating(Prompt.of("p"), "d", True),
    )
    assert read_ratings(write(own)).records == rated
    tied = read_ratings(write({"prompt": "p", "answers": ["a", "b"], "ranks": [1, 1]}))
    assert tied.records == () and tied.dropped[0].reason == "no ratings in it"
    pair = read_ratings(write({"prompt": "p", "chosen": "x", "rejected": "y"}))
    assert [(rating.answer, rating.good) for rating in pair.records] == [("x", True), ("y", False)]


def test_own_answers_give_prompts(write: Write) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "a\n"}]
    row = {"prompt": messages, "prompt_id": "0" * 16, "answers": [{"text": "x", "tokens": 2, "finish": "stop"}],
           "model": "m", "sampling": {}}  # fmt: skip
    prompt = Prompt.of("a\n", system="s")
    assert read_prompts(write(row)).records == (prompt,)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": " a "}, "a"),
        ({"instruction": "a"}, "a"),
        ({"instruction": "a", "input": "b"}, "a\nb"),
        ({"question": "a"}, "a"),
        ({"turns": ["a", "b"], "category": "c"}, "a"),
        ({"text": "a"}, "a"),
        ("a", "a"),
        ({"prompt": "p", "completion": "<|endoftext|>"}, "p"),
        ({"prompt": "x", "instruction": "a\n", "input": "b", "response": "c", "target": "d"}, "a\nb"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "label": True}, "a"),
        ({"instruction": "###The instruction to evaluate:\na\n\n###Response to evaluate:\nb",
          "response_source": "m", "gpt4_score": [1]}, "a"),
    ],
)  # fmt: skip
def test_a_prompt(row: object, text: str, write: Write) -> None:
    assert read_prompts(write(row)).records == (Prompt.of(text),)


def test_a_prompt_may_be_a_conversation(write: Write) -> None:
    dialogue = write({"prompt": "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"})
    assert read_prompts(dialogue).records == (Prompt(talk("a", "b", "c")),)
    turns = write({"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]})
    assert read_prompts(turns).records == (Prompt.of("a", system="s"),)


# --- files ------------------------------------------------------------------------------------------------------------

ROWS = [{"instruction": f"问 {n}", "input": "", "output": f"答 {n}"} for n in range(3)]
READ = tuple(Demonstration(talk(f"问 {n}", f"答 {n}")) for n in range(3))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_json_and_json_lines_gzipped_or_not(packed: bool, listed: bool, mark: bytes, tmp_path: Path) -> None:
    """The name says nothing: what a file is, its content tells."""
    text = json.dumps(ROWS, indent=2) if listed else "\r\n\n".join(json.dumps(row) for row in ROWS)
    path = tmp_path / "rows.data"
    path.write_bytes(gzip.compress(mark + text.encode()) if packed else mark + text.encode())
    loaded = read_demonstrations(str(path))
    assert (loaded.records, loaded.rows, loaded.dropped, loaded.format) == (READ, 3, (), "instruction, output")


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "rows.bin"
    chats = [{"conversations": gpt("a", str(n))} for n in range(2)]
    parquet.write_table(arrow.Table.from_pylist(chats), path)
    assert [record.messages[-1].content for record in read_demonstrations(str(path)).records] == ["0", "1"]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match="not readable as Parquet"):
        read_demonstrations(str(path))


def test_a_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is a stand-in here; that it is asked for the right name and split is ours to answer for."""
    asked = []

    class Hub:
        @staticmethod
        def load_dataset(name: str, split: str) -> list[dict[str, str]]:
            asked.append((name, split))
            if name == "nobody/nothing":
                raise RuntimeError("no such\ndata set")
            return ROWS

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    assert read_demonstrations("someone/a-set.v2").records == READ
    assert read_demonstrations("someone/a-set:test[:10%]").records == READ
    assert asked == [("someone/a-set.v2", "train"), ("someone/a-set", "test[:10%]")]
    with pytest.raises(DataError, match=r"nobody/nothing:train: .*no such data set"):
        read_demonstrations("nobody/nothing")


def test_limit_stops_reading(write: Write) -> None:
    source = write(*ROWS, b"broken")
    loaded = read_demonstrations(source, limit=2)
    assert (loaded.records, loaded.rows) == (READ[:2], 2)


@pytest.mark.parametrize("name", ["no-such-file", "data/train.jsonl", "./no/such", "/no/such/file.json", "a/b/c"])
def test_a_missing_file_is_named(name: str) -> None:
    with pytest.raises(DataError, match=f"{name}: no such file"):
        read_prompts(name)


def test_what_is_no_file_of_rows(tmp_path: Path, write: Write) -> None:
    with pytest.raises(DataError, match="is a folder"):
        read_prompts(str(tmp_path))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n \n")
    with pytest.raises(DataError, match="has no rows"):
        read_prompts(str(empty))
    table = tmp_path / "table.csv"
    table.write_text("prompt,answer\na,b\n")
    with pytest.raises(DataError, match=r"table\.csv:1: not valid JSON"):
        read_prompts(str(table))
    half = tmp_path / "half.gz"
    half.write_bytes(gzip.compress(json.dumps(ROWS).encode() * 50)[:-20])
    with pytest.raises(DataError, match=r"half\.gz: cannot be read"):
        read_demonstrations(str(half))
    broken = tmp_path / "broken.json"
    broken.write_text('[{"prompt": "a"},\n {"prompt": }]')
    with pytest.raises(DataError, match=r"broken\.json:2: not valid JSON"):
        read_prompts(str(broken))


def test_an_unknown_format_names_columns_and_the_nearest(write: Write) -> None:
    with pytest.raises(DataError) as caught:
        read_rankings(write({"ask": "a", "chosen": "b", "rejectd": "c"}))
    message = str(caught.value)
    assert "columns ask, chosen, rejectd are no known format" in message
    assert "the nearest that has rankings, 'hh dialogues', also needs rejected" in message


def test_a_known_format_of_another_kind(write: Write) -> None:
    with pytest.raises(
        DataError, match="columns input, instruction, output are 'instruction, output', which has no rankings"
    ):
        read_rankings(write(*ROWS))
    with pytest.raises(DataError, match="columns chosen, rejected are 'hh dialogues', which has no demonstrations"):
        read_demonstrations(write(PAIRS["hh"][0]))
    with pytest.raises(DataError, match=r"are 'question', .* 'question, chosen, rejected', also needs rejected"):
        read_rankings(write({"question": "a", "chosen": "b", "rejectd": "c"}))


def test_recognised_columns_are_unambiguous() -> None:
    """No format hides one that stands below it."""
    for form in FORMATS:
        assert next(other for other in FORMATS if other.columns <= form.columns) is form, form.name


@pytest.mark.parametrize(
    ("row", "target"),
    [
        ({"question": "How many?", "answer": "3 + 2 = <<3+2=5>>5 \n#### 5"}, "3 + 2 = <<3+2=5>>5 \n#### 5"),
        ({"prompt": "How many?", "solution": 5}, "5"),
        ({"prompt": "How many?", "answer": "no", "target": "five"}, "five"),  # the name that says it comes first
        ({"prompt": "How many?", "target": None, "answer": " 5 "}, "5"),
        ({"body": "Two apples.", "question": "How many?", "answer": "2 (apples)"}, "2 (apples)"),
        ({"prompt": "How many?", "completion": "5"}, None),
        ({"prompt": "How many?", "target": True}, None),
        ({"prompt": "How many?", "target": ["5"]}, None),
        ({"prompt": "How many?", "target": "  "}, None),
    ],
)
def test_a_prompt_brings_its_target(row: object, target: str | None, write: Write) -> None:
    assert [prompt.target for prompt in read_prompts(write(row)).records] == [target]


# --- broken rows ------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
HH = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
PANDA = {"instruction": "a", "response1": "x", "response2": "y", "annotator1": 1, "annotator2": 1, "annotator3": 1}
OWN = {"prompt": [{"role": "user", "content": "a"}], "answers": ["x", "y"], "ranks": [0, 1]}

BROKEN = [
    (GOOD, b'{"prompt": "a\\d"}', "not valid JSON"),
    (GOOD, b"[1, 2]", "neither an object nor a text"),
    (GOOD, b"17", "neither an object nor a text"),
    (GOOD, b'{"prompt": "\xff"}', "not UTF-8"),
    (GOOD, b"[" * 100_000, "not valid JSON"),
    (GOOD, {"prompt": "a", "chosen": "b"}, "no column 'rejected'"),
    (GOOD, {"prompt": "a", "chosen": "b", "rejected": "  "}, "empty answer"),
    (GOOD, {"prompt": " ", "chosen": "b", "rejected": "c"}, "empty prompt"),
    (GOOD, {"prompt": "a", "chosen": True, "rejected": "c"}, "answer is a boolean, not text"),
    (GOOD, {"prompt": None, "chosen": "b", "rejected": "c"}, "prompt is nothing, not a list"),
    (GOOD, {"prompt": "a", "chosen": 3.5, "rejected": "c"}, "answer is a number, not text"),
    (GOOD, {"prompt": "a", "chosen": "\ud83d", "rejected": "c"}, "answer is not valid Unicode"),
    (GOOD, {"prompt": "a", "chosen": {"role": "user", "content": "b"}, "rejected": "c"},
     "the answer is not the assistant's"),
    (HH, {"chosen": "b", "rejected": "c"}, "not a dialogue of Human: and Assistant: turns"),
    (HH, {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: z\n\nAssistant: c"},
     "chosen and rejected differ in more than the last answer"),
    (HH, {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"}, "empty answer"),
    (HH, {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"}, "no assistant's turn at the end"),
    (TALK, {"messages": "a"}, "not a dialogue of Human: and Assistant: turns"),
    (TALK, {"messages": []}, "the conversation does not begin with a user's turn"),
    (TALK, {"messages": [{"role": "assistant", "content": "a"}]},
     "the conversation does not begin with a user's turn"),
    (TALK, {"messages": [{"role": "tool", "content": "a"}]}, "a turn of unknown role"),
    (TALK, {"messages": [{"role": "user", "content": "a"}]}, "no assistant's turn"),
    (TALK, {"messages": ["a"]}, "a turn is text, not an object"),
    (TALK, {"messages": [*TALK["messages"], {"role": "system", "content": "s"}]},
     "a system turn inside the conversation"),
    (TALK, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}, "empty answer"),
    (PANDA, PANDA | {"annotator2": 3}, "a label that is none of 0, 1, 2"),
    (PANDA, PANDA | {"annotator2": True}, "a label that is none of 0, 1, 2"),
    (OWN, OWN | {"ranks": [0]}, "answers, ranks and finished do not match, or fewer than two answers"),
    (OWN, OWN | {"ranks": [0, -1]}, "ranks are not whole numbers from 0"),
    (OWN, OWN | {"grades": [1]}, "answers and grades do not match"),
    (OWN, OWN | {"grades": [1, "2"]}, "a grade is text, not a finite number"),
    (OWN, OWN | {"grades": [1, 2]}, "a worse rank has a higher grade"),
    (GOOD, GOOD | {"score_chosen": True, "score_rejected": 1}, "score_chosen is a boolean, not a finite number"),
    (OWN, OWN | {"prompt": [{"role": "assistant", "content": "a"}]}, "the prompt does not end with a user's turn"),
]  # fmt: skip


@pytest.mark.parametrize(("good", "bad", "reason"), BROKEN)
def test_a_broken_row(good: dict[str, Any], bad: object, reason: str, write: Write) -> None:
    read: Callable[..., Any] = read_demonstrations if good is TALK else read_rankings
    if isinstance(bad, dict):
        bad = json.dumps(bad).encode()
    source = write(good, b"", bad)
    with pytest.raises(DataError) as caught:
        read(source)
    message = str(caught.value)
    assert message.startswith(f"{source}:3: {reason}")
    assert "data.on_bad_row=drop" in message
    assert message.count("\n") == 0
    loaded = read(source, on_bad_row="drop")
    assert len(loaded.records) == 1
    assert [(row.where, row.reason) for row in loaded.dropped] == [(f"{source}:3", reason)]
    assert loaded.rows == 2
    assert loaded.summary().endswith(f"; left out 1: 1 {reason}")


def test_in_a_list_rows_are_counted(write: Write) -> None:
    source = write([GOOD, {"prompt": ""}, GOOD | {"prompt": ""}], name="rows.json")
    with pytest.raises(DataError, match=r"rows\.json:2: no column 'chosen'"):
        read_rankings(source)
    dropped = read_rankings(source, on_bad_row="drop").dropped
    assert [row.where.rpartition(":")[2] for row in dropped] == ["2", "3"]


def test_equal_answers_and_duplicates_always_go(write: Write) -> None:
    source = write(GOOD, GOOD | {"chosen": "c "}, GOOD | {"extra": 1}, GOOD | {"prompt": "b"})
    loaded = read_rankings(source)
    assert len(loaded.records) == 2
    assert loaded.summary() == (
        "2 records of 4 rows (prompt, chosen, rejected); left out 2: 1 all answers the same, 1 duplicate"
    )


def test_the_format_is_that_of_most_rows(write: Write) -> None:
    source = write({"note": "made by hand"}, *ROWS)
    assert read_demonstrations(source, on_bad_row="drop").records == READ


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 3)
    | st.floats()
    | st.sampled_from(["", "a", "b", "Human: a", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "content",
                    "from",
                    "value",
                    "text",
                    "replies",
                    "rank",
                    "is_correct",
                    "solution",
                    "output",
                    "input",
                ]
            ),
            inner | st.sampled_from(["user", "assistant", "prompter", "gpt", "human"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_row_breaks_a_parser(data: st.DataObject) -> None:
    """Whatever stands in the columns, a parser gives valid records or says what is wrong."""
    form = data.draw(st.sampled_from(FORMATS), label="format")
    columns = sorted({*form.columns, "input", "system", "history", "finished"})
    row = data.draw(st.fixed_dictionaries({name: json_values for name in columns}))
    for parse in (form.prompts, form.demonstrations, form.rankings, form.ratings):
        if parse is None:
            continue
        try:
            records = list(parse(row))
        except BadRow:
            continue
        for record in records:
            hash(record)
            prompt = record.prompt if isinstance(record, Ranking | Rating) else record
            if isinstance(record, Demonstration):
                assert record.messages[-1].role == "assistant"
            else:
                assert isinstance(prompt, Prompt) and prompt.messages[-1].role == "user"
                assert len(prompt.id) == 16


# --- real files -------------------------------------------------------------------------------------------------------

Left = dict[str, int]
T0 = "sft/selfinstruct_t0_"

# File, format, rows (of SOURCES.md), what is left out and why.
REAL_DEMONSTRATIONS: list[tuple[str, str, int, Left]] = [
    (f"{T0}common_gen_Given_concepts_type_2.jsonl", "prompt, completion", 200, {}),
    (f"{T0}ag_news_classify.jsonl", "prompt, completion", 200, {}),
    (f"{T0}app_reviews_generate_review.jsonl", "prompt, completion", 200, {}),
    (f"{T0}sciq_Multiple_Choice_Closed_Book_.jsonl", "prompt, completion", 200, {}),
    (f"{T0}gigaword_TLDR.jsonl", "prompt, completion", 200, {"duplicate": 15}),
    (f"{T0}glue_qqp_duplicate.jsonl", "prompt, completion", 200, {}),
    (f"{T0}commonsense_qa_question_answering.jsonl", "prompt, completion", 200, {}),
    (f"{T0}quartz_answer_question_based_on.jsonl", "prompt, completion", 200, {}),
    (f"{T0}samsum_Summarize_.jsonl", "prompt, completion", 200, {}),
    (f"{T0}trec_trec1.jsonl", "prompt, completion", 200, {"empty answer": 200}),
    ("sft/selfinstruct_seed_tasks.jsonl", "self-instruct tasks", 175, {}),
    ("sft/alpaca_5000.shared.json", "instruction, output", 4000, {"empty answer": 2}),
    ("sft/alpaca_gpt4_en_demo.shared.json", "instruction, output", 798, {"duplicate": 9}),
    ("sft/alpaca_gpt4_zh_demo.shared.json", "instruction, output", 802, {"duplicate": 7}),
    ("sft/dolly_2000.shared.json", "instruction, output", 1570, {"duplicate": 1}),
    ("sft/sharegpt_zh_1K.shared.jsonl.gz", "ShareGPT conversations", 300, {}),
    ("kwise/selfinstruct_t0_app_reviews_convert_to_rating.jsonl", "prompt, completion", 200, {}),
    ("verifiable/gsm8k_train.shared.jsonl.gz", "question, answer", 2500, {}),
    ("verifiable/gsm8k_test.shared.jsonl", "question, answer", 1051, {}),
    ("verifiable/asdiv_test.shared.jsonl", "body, question, answer", 800, {}),
    ("verifiable/cmath_test_zh.shared.jsonl", "question, answer", 484, {}),
]
REAL_RANKINGS: list[tuple[str, str, int, Left]] = [
    # SOURCES.md counts the traps of the whole splits; these slices hold fewer.
    ("preference/hh_harmless_base_test.shared.jsonl.gz", "hh dialogues", 1842, {"empty answer": 2}),
    ("preference/hh_helpful_base_test.shared.jsonl.gz", "hh dialogues", 1899,
     {"empty answer": 4, "all answers the same": 1}),
    ("preference/hh_helpful_rejection_sampled_test.shared.jsonl.gz", "hh dialogues", 1400,
     {"all answers the same": 18}),
    ("preference/dpo_en_demo.shared.json", "ShareGPT comparisons", 247, {"duplicate": 5}),
    ("preference/dpo_zh_demo.shared.json", "ShareGPT comparisons", 250, {"duplicate": 10}),
    ("preference/dpo_zh_500.shared.jsonl", "ShareGPT comparisons", 394, {}),
    ("preference/zh_question_response_chosen_rejected.shared.jsonl", "question, response_chosen, response_rejected",
     150, {}),
    ("preference/stack_exchange_paired_tiny.json", "question, response_j, response_k", 25, {}),
    ("preference/pandalm_testset-v1.shared.json", "PandaLM judgements", 821,
     {"duplicate": 59, "empty answer": 22, "answer is a boolean, not text": 6}),
    ("preference/autoj_pairwise.shared.jsonl.gz", "Auto-J judgements", 700, {"all answers the same": 5}),
    *((f"preference/persona_{trait}.jsonl", "persona statements", 1000, {})
      for trait in ("agreeableness", "conscientiousness", "extraversion", "neuroticism", "openness")),
    ("kwise/gsm8k_example_model_solutions.shared.jsonl.gz", "GSM8K solutions", 600, {}),
]  # fmt: skip
REAL_PROMPTS: list[tuple[str, str, int, Left]] = [
    ("prompts/instinwild_seed_prompts_en.jsonl", "instruction", 429, {}),
    ("prompts/instinwild_seed_prompts_ch.jsonl", "instruction", 429, {}),
    ("prompts/instinwild_v2_user_2.jsonl", "instruction", 248, {"not valid JSON": 2, "duplicate": 1}),
    ("prompts/mt_bench_question.jsonl", "turns", 80, {}),
    ("prompts/vicuna_bench_question.jsonl", "turns", 80, {}),
    ("prompts/oasst_prompt_lottery_en_250.jsonl", "text", 250, {}),
    ("prompts/user_oriented_instructions.jsonl", "self-instruct tasks", 252, {}),
    *((f"prompts/user_oriented_predictions_{model}.jsonl", "self-instruct predictions", 252, {})
      for model in ("davinci-self-instruct", "text-davinci-001", "text-davinci-003")),
    ("kwise/vicuna_eval.json", "judge tasks", 320, {"duplicate": 240}),
    ("preference/kto_en_demo.shared.json", "labelled messages", 234, {"duplicate": 3}),
    (f"{T0}trec_trec1.jsonl", "prompt, completion", 200, {}),
    ("preference/hh_helpful_rejection_sampled_test.shared.jsonl.gz", "hh dialogues", 1400, {}),
]  # fmt: skip
REAL = [
    *((read_demonstrations, *rest) for rest in REAL_DEMONSTRATIONS),
    *((read_rankings, *rest) for rest in REAL_RANKINGS),
    *((read_prompts, *rest) for rest in REAL_PROMPTS),
]


@pytest.mark.parametrize(("read", "name", "form", "rows", "left"), REAL)
def test_a_real_file(read: Callable[..., Any], name: str, form: str, rows: int, left: Left, shared_data: Path) -> None:
    loaded = read(str(shared_data / name), on_bad_row="drop")
    assert (loaded.format, loaded.rows) == (form, rows)
    assert Counter(row.reason for row in loaded.dropped) == left
    assert len(loaded.records) == rows - sum(left.values())


@pytest.mark.parametrize(
    ("read", "name", "said"),
    [
        (read_prompts, "prompts/instinwild_v2_user_2.jsonl", r"user_2.jsonl:134: not valid JSON \(Invalid \\escape"),
        (read_demonstrations, "sft/selfinstruct_t0_trec_trec1.jsonl", "trec1.jsonl:1: empty answer"),
        (read_rankings, "preference/hh_helpful_base_test.shared.jsonl.gz", "jsonl.gz:107: empty answer"),
        (read_rankings, "preference/pandalm_testset-v1.shared.json", "json:127: answer is a boolean"),
        (read_prompts, "prompts/mt_bench_reference_gpt4.jsonl", "columns answer_id, choices, model_id, question_id"),
        (read_prompts, "kwise/instructgpt_truthful_qa_samples.shared.csv.gz", "csv.gz:1: not valid JSON"),
    ],
)
def test_a_real_trap_is_an_error_that_says_where(
    read: Callable[..., Any], name: str, said: str, shared_data: Path
) -> None:
    with pytest.raises(DataError, match=said):
        read(str(shared_data / name))


def test_oasst_nodes_and_their_sizes(shared_data: Path) -> None:
    """165 nodes of these 77 trees have two or more ranked replies; counted apart from this code."""
    loaded = read_rankings(str(shared_data / "kwise/oasst_en_100_tree.shared.jsonl"))
    sizes = Counter(len(ranking.answers) for ranking in loaded.records)
    assert (loaded.rows, loaded.dropped) == (77, ())
    assert sizes == {2: 41, 3: 94, 4: 23, 5: 1, 6: 5, 8: 1}
    assert all(sorted(ranking.ranks) == list(range(len(ranking.ranks))) for ranking in loaded.records)


def test_what_real_records_look_like(shared_data: Path) -> None:
    persona = read_rankings(str(shared_data / "preference/persona_openness.jsonl")).records
    assert Counter(ranking.answers for ranking in persona) == {("Yes", "No"): 500, ("No", "Yes"): 500}
    chats = read_rankings(str(shared_data / "preference/dpo_en_demo.shared.json")).records
    assert Counter(ranking.prompt.messages[0].role for ranking in chats)["system"] > 50
    news = read_demonstrations(str(shared_data / "sft/selfinstruct_t0_ag_news_classify.jsonl")).records
    assert all("<|endoftext|>" not in record.messages[-1].content for record in news)
    judged = read_prompts(str(shared_data / "prompts/user_oriented_instructions.jsonl")).records
    answered = read_prompts(str(shared_data / "prompts/user_oriented_predictions_text-davinci-001.jsonl")).records
    assert len(set(judged) & set(answered)) > 240


def test_hh_length_bias_is_the_one_known(shared_data: Path) -> None:
    """Were chosen and rejected swapped anywhere, these shares of SOURCES.md would turn round."""
    shares = {}
    for name in ("helpful_base", "harmless_base", "helpful_rejection_sampled"):
        file = shared_data / f"preference/hh_{name}_test.shared.jsonl.gz"
        pairs = [ranking.answers for ranking in read_rankings(str(file), on_bad_row="drop").records]
        shares[name] = sum(len(better) > len(worse) for better, worse in pairs) / len(pairs)
    assert shares["helpful_base"] == pytest.approx(0.59, abs=0.02)
    assert shares["helpful_rejection_sampled"] == pytest.approx(0.56, abs=0.02)
    assert shares["harmless_base"] == pytest.approx(0.45, abs=0.02)

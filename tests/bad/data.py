"""Files of data that are not what they should be."""

from __future__ import annotations

import gzip
import io
import json
from typing import Any

from bad.case import Case, Content, lines

GOOD = [{"prompt": f"How are you, {name}?", "completion": "Well, thank you."} for name in ("Ann", "Ben", "Cem", "Dao")]
PAIR = {"prompt": "Hello", "chosen": "Hi, you!", "rejected": "Go away."}
RANKED = {"prompt": "Hello", "answers": ["Hi", "Go"], "ranks": [0, 1]}
ANSWERED = {"prompt": [{"role": "user", "content": "Hello"}], "answers": [{"text": "Hi", "finish": "stop"}]}
SFT = "sft model.name=tiny data.sources=[{}] --out out"
RANK = "rank rankings={} --out out"
KTO = "dpo algorithm=kto model.name=tiny data.sources=[{}] --out out"


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow.parquet import write_table

    file = io.BytesIO()
    write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def _third(wrong: str, row: object, *names: str, good: object = GOOD[0], command: str = SFT) -> Case:
    """A bad row on line 3 of a good file."""
    second = json.loads(json.dumps(good).replace("Hello", "Good day").replace("Ann", "Eve"))
    return Case(
        wrong,
        command.format("data.jsonl"),
        ("data.jsonl:3", *names),
        {"data.jsonl": lines(good, second, row, *GOOD[1:0])},
    )


def _whole(wrong: str, content: Content, *names: str, command: str = SFT, name: str = "data.jsonl") -> Case:
    """A file that is wrong as a whole."""
    return Case(wrong, command.format(name), (name, *names) if "regression" not in command else names, {name: content})


def _demonstration(wrong: str, row: object, *names: str) -> Case:
    return _third(wrong, row, *names, good={"messages": _talk("Hello", "Hi")}, command=SFT)


def _ranking(wrong: str, row: object, *names: str, good: object = RANKED) -> Case:
    return _third(wrong, row, *names, good=good, command=RANK)


def _answers(wrong: str, row: object, *names: str) -> Case:
    return Case(
        wrong,
        "evaluate model.name=tiny before=one.jsonl after=two.jsonl --out out",
        ("two.jsonl:2", "dressage sample", *names),
        {"one.jsonl": lines(ANSWERED), "two.jsonl": lines(ANSWERED, row)},
    )


def _talk(*texts: object) -> list[dict[str, object]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def _with(row: dict[str, Any], **changes: object) -> dict[str, Any]:
    return row | changes


def _without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


GSM8K = {"question": "Hello"} | {
    name: {"solution": name, "is_correct": n < 2}
    for n, name in enumerate(("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"))
}
PANDALM = {"instruction": "Hello", "input": "", "response1": "Hi", "response2": "Go"} | {
    f"annotator{n}": 1 for n in (1, 2, 3)
}
TREE = {
    "message_tree_id": "Hello",
    "prompt": {
        "text": "Hello",
        "role": "prompter",
        "replies": [{"text": text, "role": "assistant", "rank": rank, "replies": []} for rank, text in enumerate("ab")],
    },
}
AUTOJ = {"prompt": "Hello", "response 1": "Hi", "response 2": "Go", "label": 0}
ULTRA = {
    "instruction": "Hello",
    "completions": [{"response": "Hi", "overall_score": 4.0}, {"response": "Go", "overall_score": 1.0}],
}
HELPSTEER = {"prompt": "Hello", "response_1": "Hi", "response_2": "Go", "preference_strength": -2}
HELPSTEER3 = {"context": _talk("Hello"), "response1": "Hi", "response2": "Go", "overall_preference": -2}
HH = {"chosen": "\n\nHuman: Hello\n\nAssistant: Hi", "rejected": "\n\nHuman: Hello\n\nAssistant: Go"}
TASK = {"instruction": "Hello", "instances": [{"input": "", "output": "Hi"}]}

CASES = (
    # --- files as a whole
    Case("a file that is not there", SFT.format("absent.jsonl"), ("absent.jsonl", "no such file")),
    Case(
        "a file in a folder that is not there", SFT.format("no/such/data.jsonl"), ("no/such/data.jsonl", "no such file")
    ),
    Case("no name of a file", "sft model.name=tiny 'data.sources=[\"\"]' --out out", ("data.sources", "empty")),
    Case("a folder in the place of a file", SFT.format("tiny"), ("tiny", "folder", "give one file")),
    Case("a device in the place of a file", SFT.format("/dev/zero"), ("/dev/zero", "file")),
    Case("the home of nobody", SFT.format("~nobody-there/data.jsonl"), ("~nobody-there/data.jsonl", "no such file")),
    Case("a file name of 300 letters", SFT.format("x" * 300 + ".jsonl"), ("xxx", "no such file")),
    Case(
        "a file name with a zero byte",
        "sft model.name=tiny 'data.sources=[\"a\\\\0b.jsonl\"]' --out out",
        ("b.jsonl", "no such file"),
    ),
    Case(
        "a material that is not shipped", SFT.format("'material:demos.jsonl'"), ("demos.jsonl", "demonstrations.jsonl")
    ),
    Case("a way out of the shipped material", SFT.format("'material:../config.py'"), ("config.py", "ships")),
    Case(
        "a data set of the hub, offline",
        SFT.format("nobody/has-this-set"),
        ("nobody/has-this-set", "no such file"),
        theirs=True,
    ),
    Case(
        "a URL in the place of a file",
        SFT.format("'https://example.com/data.jsonl'"),
        ("https://example.com/data.jsonl", "no such file"),
    ),
    Case("no file at all", "sft model.name=tiny data.sources=[] --out out", ("data.sources", "at least 1")),
    Case(
        "one file, not in a list",
        "sft model.name=tiny data.sources=data.jsonl --out out",
        ("data.sources", "list", "[data.jsonl]"),
    ),
    _whole("an empty file", "", "no rows"),
    _whole("a file of empty lines", "\n\n  \n", "no rows"),
    _whole("an empty list", "[]", "no rows"),
    _whole("an empty file, gzipped", lambda: gzip.compress(b""), "no rows"),
    _whole("a byte order mark and nothing else", b"\xef\xbb\xbf", "no rows"),
    _whole("zero bytes", b"\x00" * 64, "not valid JSON"),
    _whole("text as Windows writes it (UTF-16)", lines(GOOD[0]).decode().encode("utf-16"), "not UTF-8"),
    _whole(
        "text in an old encoding (GBK)",
        '{"prompt": "你好", "completion": "好"}\n'.encode("gbk"),
        "data.jsonl:1",
        "not UTF-8",
    ),
    _whole(
        "a list in an old encoding (Latin-1)", '[{"prompt": "Grüße", "completion": "x"}]'.encode("latin-1"), "UTF-8"
    ),
    _whole("a table (CSV)", "prompt,completion\nHello,Hi\n", "not valid JSON", name="data.csv"),
    _whole("a table (TSV) under another name", "prompt\tcompletion\nHello\tHi\n", "not valid JSON"),
    _whole("plain text", "Hello, how are you?\nFine.\n", "not valid JSON", name="data.txt"),
    _whole("YAML", "- prompt: Hello\n  completion: Hi\n", "not valid JSON"),
    _whole("XML", "<rows><row/></rows>\n", "not valid JSON"),
    _whole("a page of the web", "<!doctype html><html><body>404</body></html>", "not valid JSON"),
    _whole("a Python list", "[{'prompt': 'Hello', 'completion': 'Hi'}]", "data.jsonl:1", "not valid JSON"),
    _whole("a zip archive", b"PK\x03\x04" + bytes(range(256)), "JSON"),
    _whole("a picture", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "JSON"),
    _whole("a pickle", b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x06prompt\x94\x8c\x02hi\x94s.", "JSON"),
    _whole("a gzip file that ends early", lambda: gzip.compress(lines(*GOOD * 50))[:60], "damaged"),
    _whole("a gzip file with a damaged middle", lambda: _damaged(gzip.compress(lines(*GOOD))), "damaged"),
    _whole("no gzip behind its mark", b"\x1f\x8bhello", "damaged"),
    _whole("Parquet that ends early", lambda: parquet(GOOD)[:100], "Parquet", name="data.parquet", command=SFT),
    _whole(
        "Parquet with a damaged foot", lambda: parquet(GOOD)[:-12] + b"x" * 8 + b"PAR1", "Parquet", name="data.parquet"
    ),
    _whole("nothing but Parquet's mark", b"PAR1", "Parquet", name="data.parquet"),
    _whole(
        "Parquet of other columns",
        lambda: parquet([{"question_id": 1, "image": b"x"}]),
        "question_id",
        name="data.parquet",
    ),
    _whole(
        "Parquet with numbers for texts",
        lambda: parquet([{"prompt": 1, "completion": 2}]),
        "data.parquet:1",
        "number",
        name="data.parquet",
    ),
    _whole(
        "Parquet without rows",
        lambda: parquet([{"prompt": "a", "completion": "b"}][:0]),
        "no rows",
        name="data.parquet",
    ),
    _whole(
        "a broken list",
        '[\n{"prompt": "Hello", "completion": "Hi"},\n{"prompt": }\n]',
        "data.jsonl:3",
        "not valid JSON",
    ),
    _whole("a list that is not closed", '[{"prompt": "Hello", "completion": "Hi"},', "data.jsonl:1", "not valid JSON"),
    _whole("a list with a comma too many", '[{"prompt": "Hello", "completion": "Hi"},]', "not valid JSON"),
    _whole(
        "two lists, one after the other", '[{"prompt": "a", "completion": "b"}]\n[]', "data.jsonl:2", "not valid JSON"
    ),
    _whole("one object over many lines", json.dumps(GOOD[0], indent=2), "data.jsonl:1", "one"),
    _whole("rows inside an object", json.dumps({"data": GOOD}), "columns data"),
    _whole("a list of lists", json.dumps([["Hello", "Hi"]] * 3), "neither"),
    _whole("a list of numbers", "[1, 2, 3]", "neither"),
    _whole("numbers", "1\n2\n3\n", "neither"),
    _whole("nothing but null", "null\nnull\n", "neither"),
    _whole("brackets nested too deep", "[" * 5000, "not valid JSON"),
    _whole("objects nested too deep", '{"a":' * 5000, "not valid JSON"),
    _whole("columns nobody knows", lines({"promt": "Hello", "anser": "Hi"}), "promt", "nearest", "prompt"),
    _whole(
        "columns in capitals", lines({"Prompt": "Hello", "Completion": "Hi"}), "Prompt", "also needs completion, prompt"
    ),
    _whole("columns in Chinese", lines({"问题": "你好", "回答": "好"}), "问题"),
    _whole("a thousand columns", lines({f"column {n}": n for n in range(1000)}), "columns", "988 more"),
    _whole("columns that would colour the terminal", lines({"\x1b[31mred": 1, "a\nb": 2}), "red"),
    _whole("prompts where answers are wanted", lines({"prompt": "Hello"}), "has no demonstrations", "completion"),
    _whole("rankings where demonstrations are wanted", lines(RANKED), "Dressage rankings", "demonstrations"),
    _whole("demonstrations where rankings are wanted", lines(*GOOD), "rankings", command=RANK),
    _whole("demonstrations where ratings are wanted", lines(*GOOD), "ratings", command=KTO),
    _whole("ratings where rankings are wanted", lines(GOOD[0] | {"label": True}), "rankings", command=RANK),
    _whole("texts where demonstrations are wanted", '"Hello"\n"Good day"\n', "text", "demonstrations"),
    _whole("an unknown kind of file for rank", lines({"a": 1}), "columns a", command=RANK),
    Case(
        "a good file and a bad one",
        SFT.format("good.jsonl,bad.jsonl"),
        ("bad.jsonl:1",),
        {"good.jsonl": lines(*GOOD), "bad.jsonl": lines({"prompt": "a", "completion": 1})},
    ),
    Case(
        "a bad file to measure on",
        SFT.format("good.jsonl") + " data.heldout=[bad.jsonl]",
        ("bad.jsonl:1",),
        {"good.jsonl": lines(*GOOD), "bad.jsonl": lines({"prompt": "a", "completion": ""})},
    ),
    Case(
        "nothing is left: all too long",
        SFT.format("data.jsonl") + " data.max_tokens=3",
        ("data.jsonl", "no row is left", "too long"),
        {"data.jsonl": lines(*GOOD)},
    ),
    Case(
        "nothing is left: all held out",
        SFT.format("data.jsonl") + " data.heldout_fraction=0.99",
        ("data.jsonl", "no row is left"),
        {"data.jsonl": lines(*GOOD)},
    ),
    Case(
        "nothing is left: all rows bad, and left out",
        SFT.format("data.jsonl") + " data.on_bad_row=drop",
        ("data.jsonl", "no row is left", "empty answer"),
        {"data.jsonl": lines(*({"prompt": "a", "completion": ""},) * 3)},
    ),
    Case(
        "nothing is left: only thumbs down to imitate",
        SFT.format("data.jsonl"),
        ("data.jsonl", "no row is left"),
        {"data.jsonl": lines(*(row | {"label": False} for row in GOOD))},
    ),
    Case(
        "a record over a limit that is an error",
        SFT.format("data.jsonl") + " data.max_tokens=50 data.on_too_long=error",
        ("record 1", "How are you", "50 tokens", "data.on_too_long=drop"),
        {"data.jsonl": lines(*GOOD)},
    ),
    # --- one row of demonstrations
    _third("a line that ends early", '{"prompt": "Hello", "completion": ', "not valid JSON", "data.on_bad_row=drop"),
    _third("a line with single quotes", "{'prompt': 'Hello', 'completion': 'Hi'}", "not valid JSON", "column 2"),
    _third("two objects on a line", json.dumps(GOOD[0]) * 2, "not valid JSON"),
    _third("a comma after a line", json.dumps(GOOD[0]) + ",", "not valid JSON"),
    _third("a word without quotes", '{"prompt": Hello, "completion": "Hi"}', "not valid JSON"),
    _third("a comment", "# from here on by Ben", "not valid JSON"),
    _third("a line break inside a text", '{"prompt": "Hel\nlo", "completion": "Hi"}', "not valid JSON"),
    _third("a tab inside a text", '{"prompt": "Hel\tlo", "completion": "Hi"}', "not valid JSON"),
    _third("an unknown escape", r'{"prompt": "C:\data", "completion": "Hi"}', "not valid JSON"),
    _third("a number of 5000 digits", '{"prompt": ' + "9" * 5000 + ', "completion": "Hi"}', "not valid JSON"),
    _third("a row nested too deep", "[" * 5000 + "]" * 5000, "not valid JSON"),
    _third("a row that is a list", '["Hello", "Hi"]', "neither an object nor a text"),
    _third("a row that is a number", "7", "neither an object nor a text"),
    _third("a row that is null", "null", "neither an object nor a text"),
    _third("a column that is missing", {"prompt": "Hello"}, "no column 'completion'"),
    _third("a row of another kind", {"question": "Hello", "answer": "Hi"}, "no column"),
    _third("an empty prompt", {"prompt": "", "completion": "Hi"}, "empty prompt"),
    _third("a prompt of white space", {"prompt": " \n\t", "completion": "Hi"}, "empty prompt"),
    _third("an empty answer", {"prompt": "Hello", "completion": ""}, "empty answer"),
    _third("an answer of white space", {"prompt": "Hello", "completion": "\u3000\n"}, "empty answer"),
    _third("an answer that is a number", {"prompt": "Hello", "completion": 7}, "answer is a number, not text"),
    _third("an answer that is null", {"prompt": "Hello", "completion": None}, "answer is nothing, not text"),
    _third("an answer that is true", {"prompt": "Hello", "completion": True}, "answer is a boolean, not text"),
    _third("an answer that is an object", {"prompt": "Hello", "completion": {"text": "Hi"}}, "unknown role"),
    _third("an answer that is an empty list", {"prompt": "Hello", "completion": []}, "answer is a list, not text"),
    _third("an answer by the user", {"prompt": "Hello", "completion": _talk("Hi")}, "not the assistant's"),
    _third("a prompt that is a number", {"prompt": 7, "completion": "Hi"}, "prompt is a number"),
    _third("a prompt that is an object", {"prompt": {"text": "Hello"}, "completion": "Hi"}, "prompt is an object"),
    _third("half a character (a lone surrogate)", '{"prompt": "\\ud83d", "completion": "Hi"}', "not valid Unicode"),
    _third("half a character in an answer", '{"prompt": "Hello", "completion": "\\udc00"}', "not valid Unicode"),
    _third("bytes that are not UTF-8", b'{"prompt": "\xff", "completion": "Hi"}', "not UTF-8"),
    _demonstration("no turns", {"messages": []}, "user's turn"),
    _demonstration("turns that are a number", {"messages": 7}, "messages is a number, not a list"),
    _demonstration("turns that are null", {"messages": None}, "messages is nothing, not a list"),
    _demonstration("a turn that is a text", {"messages": ["Hello", "Hi"]}, "a turn is text, not an object"),
    _demonstration("a turn by nobody", {"messages": [{"content": "Hello"}]}, "unknown role", "None"),
    _demonstration(
        "a turn by a stranger", {"messages": [{"role": "narrator", "content": "x"}]}, "unknown role", "'narrator'"
    ),
    _demonstration("a turn whose role is a number", {"messages": [{"role": 1, "content": "x"}]}, "unknown role", "1"),
    _demonstration(
        "a turn of pictures", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a turn is a list"
    ),
    _demonstration("a turn without words", {"messages": [{"role": "user"}]}, "a turn is nothing"),
    _demonstration("an assistant that begins", {"messages": _talk("Hello", "Hi")[1:]}, "user's turn"),
    _demonstration(
        "a system turn in the middle",
        {"messages": [*_talk("Hello", "Hi"), {"role": "system", "content": "x"}]},
        "system turn inside",
    ),
    _demonstration(
        "nothing but a system turn", {"messages": [{"role": "system", "content": "Be kind."}]}, "user's turn"
    ),
    _demonstration("a talk in which nobody answers", {"messages": _talk("Hello")}, "no assistant's turn"),
    _demonstration("a silent assistant", {"messages": _talk("Hello", "")}, "empty answer"),
    _demonstration("a silent user", {"messages": _talk("", "Hi")}, "empty prompt"),
    _third(
        "an instruction that is a list",
        {"instruction": ["a"], "output": "Hi"},
        "instruction is a list",
        good={"instruction": "Hello", "output": "Hi"},
    ),
    _third(
        "history that is a text",
        {"instruction": "a", "output": "Hi", "history": "Hello"},
        "history is text",
        good={"instruction": "Hello", "output": "Hi"},
    ),
    _third(
        "history with an empty turn",
        {"instruction": "a", "output": "Hi", "history": [["", "x"]]},
        "empty prompt",
        good={"instruction": "Hello", "output": "Hi"},
    ),
    _third("tasks without instances", _with(TASK, instances=None), "instances is nothing", good=TASK),
    _third("an instance that is a text", _with(TASK, instances=["Hi"]), "an instance is text", good=TASK),
    # --- one row of rankings
    _ranking("a ranking of one answer", _with(RANKED, answers=["Hi"], ranks=[0]), "fewer than two answers"),
    _ranking("a ranking of no answers", _with(RANKED, answers=[], ranks=[]), "fewer than two answers"),
    _ranking("more answers than ranks", _with(RANKED, ranks=[0]), "do not match"),
    _ranking("a rank that is a text", _with(RANKED, ranks=["best", "worst"]), "ranks are not whole numbers"),
    _ranking("a rank that is a fraction", _with(RANKED, ranks=[0.5, 1]), "ranks are not whole numbers"),
    _ranking("a rank that is true", _with(RANKED, ranks=[True, False]), "ranks are not whole numbers"),
    _ranking(
        "a rank that is NaN",
        '{"prompt": "Hello", "answers": ["a", "b"], "ranks": [NaN, 1]}',
        "ranks are not whole numbers",
    ),
    _ranking("a rank below 0", _with(RANKED, ranks=[-1, 0]), "from 0"),
    _ranking("ranks in an object", _with(RANKED, ranks={"Hi": 0}), "ranks is an object"),
    _ranking("answers in one text", _with(RANKED, answers="Hi / Go"), "answers is text"),
    _ranking("a ranked answer that is a number", _with(RANKED, answers=["Hi", 2]), "answer is a number"),
    _ranking("a mark of the end that is a text", _with(RANKED, finished=["yes", "no"]), "finished"),
    _ranking("too few marks of the end", _with(RANKED, finished=[True]), "finished"),
    _ranking(
        "a grade that is NaN",
        '{"prompt": "Hello", "answers": ["a", "b"], "ranks": [0, 1], "grades": [NaN, 1]}',
        "finite number",
    ),
    _ranking(
        "a grade that is endless",
        '{"prompt": "Hello", "answers": ["a", "b"], "ranks": [0, 1], "grades": [Infinity, 1]}',
        "finite number",
    ),
    _ranking("a grade of 400 digits", _with(RANKED, grades=[10**400, 1]), "finite number"),
    _ranking("a grade beyond what can be learnt", _with(RANKED, grades=[1e300, 1]), "finite number"),
    _ranking("a grade that is a text", _with(RANKED, grades=["good", "bad"]), "a grade is text"),
    _ranking("too few grades", _with(RANKED, grades=[1]), "answers and grades do not match"),
    _ranking("a worse rank with a higher grade", _with(RANKED, grades=[1, 2]), "a worse rank has a higher grade"),
    _ranking("a prompt that ends with the assistant", _with(RANKED, prompt=_talk("Hello", "Hi")), "user's turn"),
    _ranking("a prompt that is null", _with(RANKED, prompt=None), "prompt is nothing"),
    _ranking(
        "a turn of the prompt by a stranger",
        _with(RANKED, prompt=[{"role": "bot", "content": "x"}]),
        "unknown role",
        "'bot'",
    ),
    _ranking("a pair without the worse answer", _without(PAIR, "rejected"), "no column 'rejected'", good=PAIR),
    _ranking("a pair whose better answer is empty", _with(PAIR, chosen=""), "empty answer", good=PAIR),
    _ranking("a pair whose worse answer is null", _with(PAIR, rejected=None), "answer is nothing", good=PAIR),
    _ranking("a margin that is a text", _with(PAIR, margin="much"), "margin is text", good=PAIR),
    _ranking("a margin that is endless", json.dumps(_with(PAIR, margin=float("inf"))), "margin", good=PAIR),
    _ranking("a score that is a text", _with(PAIR, score_chosen="9", score_rejected=1), "score_chosen", good=PAIR),
    _ranking("no dialogue", _with(HH, chosen="Hello there", rejected="Go"), "Human:", good=HH),
    _ranking(
        "dialogues that differ early",
        _with(HH, rejected=HH["rejected"].replace("Hello", "Bye")),
        "more than the last answer",
        good=HH,
    ),
    _ranking(
        "dialogues that end with the user",
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: d"},
        "assistant's turn",
        good=HH,
    ),
    _ranking(
        "an annotator's vote that is unknown",
        _with(PANDALM, annotator2=7),
        "label that is none of 0, 1, 2",
        good=PANDALM,
    ),
    _ranking("a label that is unknown", _with(AUTOJ, label=3), "label that is none of 0, 1, 2", good=AUTOJ),
    _ranking("a judge's label that is true", _with(AUTOJ, label=True), "label that is none of 0, 1, 2", good=AUTOJ),
    _ranking("a label that is a list", _with(AUTOJ, label=[0]), "label that is none of 0, 1, 2", good=AUTOJ),
    _ranking(
        "solutions not marked right or wrong",
        _with(GSM8K, **{"6b_finetuning": {"solution": "x"}}),
        "is_correct",
        good=GSM8K,
    ),
    _ranking("a solution that is a text", _with(GSM8K, **{"6b_finetuning": "x"}), "6b_finetuning is text", good=GSM8K),
    _ranking(
        "one graded completion",
        _with(ULTRA, completions=ULTRA["completions"][:1]),
        "fewer than two answers",
        good=ULTRA,
    ),
    _ranking(
        "a completion without a grade",
        _with(ULTRA, completions=[{"response": "a"}, {"response": "b"}]),
        "overall_score is nothing",
        good=ULTRA,
    ),
    _ranking("completions in an object", _with(ULTRA, completions={"a": 1}), "completions is an object", good=ULTRA),
    _ranking(
        "a preference without a number",
        _with(HELPSTEER, preference_strength=None),
        "preference_strength is nothing",
        good=HELPSTEER,
    ),
    _ranking(
        "a preference in words",
        _with(HELPSTEER3, overall_preference="first"),
        "overall_preference is text",
        good=HELPSTEER3,
    ),
    _ranking("a tree whose root is a text", _with(TREE, prompt="Hello"), "prompt is text", good=TREE),
    _ranking(
        "a tree whose replies are a text",
        _with(TREE, prompt={"text": "a", "role": "prompter", "replies": "b"}),
        "replies is text",
        good=TREE,
    ),
    _whole(
        "rankings whose answers are all the same",
        lines(_with(RANKED, answers=["Hi", "Hi"])),
        "no ranking is left",
        command=RANK,
    ),
    _whole(
        "rankings that are all ties, to learn a reward from",
        lines(*(_with(RANKED, prompt=f"Q{n}", ranks=[0, 0]) for n in range(6))),
        "tie",
        command="reward model.name=tiny data.sources=[{}] training.steps=1 --out out",
    ),
    _whole(
        "rankings that are all ties, to learn a policy from",
        lines(*(_with(RANKED, prompt=f"Q{n}", ranks=[0, 0]) for n in range(6))),
        "tie",
        command="dpo model.name=tiny data.sources=[{}] training.steps=1 --out out",
    ),
    _whole(
        "grades that are all the same, to learn by regression",
        lines(*(_with(RANKED, prompt=f"Q{n}", grades=[3, 3]) for n in range(6))),
        "loss=regression",
        "same grade",
        command="reward loss=regression model.name=tiny data.sources=[{}] training.steps=1 --out out",
    ),
    _whole(
        "rankings without grades, to learn by regression",
        lines(*(_with(RANKED, prompt=f"Q{n}") for n in range(6))),
        "loss=regression",
        "no grades",
        command="reward loss=regression model.name=tiny data.sources=[{}] training.steps=1 --out out",
    ),
    _third(
        "a thumb that is a number",
        GOOD[1] | {"label": 1},
        "label that is not true or false",
        good=GOOD[0] | {"label": True},
        command=KTO,
    ),
    _third(
        "a thumb that is a text",
        GOOD[1] | {"label": "up"},
        "label that is not true or false",
        good=GOOD[0] | {"label": True},
        command=KTO,
    ),
    _third("a thumb that is missing", GOOD[1], "no column 'label'", good=GOOD[0] | {"label": True}, command=KTO),
    # --- answers to compare
    _answers(
        "answers that are no JSON",
        "{",
    ),
    _answers("answers that are a list", [ANSWERED]),
    _answers("answers without a prompt", _without(ANSWERED, "prompt")),
    _answers("answers to a text", _with(ANSWERED, prompt="Hello")),
    _answers("answers to nothing", _with(ANSWERED, prompt=[])),
    _answers("answers to a turn without a role", _with(ANSWERED, prompt=[{"content": "Hello"}])),
    _answers("answers to a turn that is a text", _with(ANSWERED, prompt=["Hello"])),
    _answers("answers to a turn that is a number", _with(ANSWERED, prompt=[{"role": "user", "content": 1}])),
    _answers("no answer among the answers", _with(ANSWERED, answers=[])),
    _answers("answers that are texts", _with(ANSWERED, answers=["Hi"])),
    _answers("an answer whose text is a number", _with(ANSWERED, answers=[{"text": 1, "finish": "stop"}])),
    _answers(
        "an answer whose text is half a character", _with(ANSWERED, answers=[{"text": "\ud83d", "finish": "stop"}])
    ),
    _answers("an answer without an end", _with(ANSWERED, answers=[{"text": "Hi"}])),
    _answers("an answer with an unknown end", _with(ANSWERED, answers=[{"text": "Hi", "finish": "tired"}])),
    _answers("answers that are not UTF-8", b'{"prompt": "\xff"}'),
    Case(
        "answers to rank that are not there", "rank answers=absent.jsonl --out out", ("absent.jsonl", "dressage sample")
    ),
    Case("a folder of answers to rank", "rank answers=tiny --out out", ("tiny", "dressage sample")),
    Case(
        "one answer to rank",
        "rank answers=one.jsonl --out out",
        ("one.jsonl:1", "two answers"),
        {"one.jsonl": lines(ANSWERED)},
    ),
    Case(
        "an empty file of answers to rank",
        "rank answers=one.jsonl --out out",
        ("one.jsonl", "no ranking is left"),
        {"one.jsonl": ""},
    ),
    Case(
        "an empty file of answers to compare",
        "evaluate model.name=tiny before=one.jsonl after=one.jsonl --out out",
        ("one.jsonl", "holds no answers"),
        {"one.jsonl": ""},
    ),
    Case(
        "answers to other prompts",
        "evaluate model.name=tiny before=one.jsonl after=two.jsonl --out out",
        ("one.jsonl", "two.jsonl", "same prompts"),
        {"one.jsonl": lines(ANSWERED), "two.jsonl": lines(_with(ANSWERED, prompt=_talk("Bye")))},
    ),
    Case(
        "prompts without targets, to verify by",
        "rl grpo model.name=tiny prompts.sources=[data.jsonl] reward_model=null rewards.right.type=number --out out",
        ("data.jsonl", "4 of 4 prompts have no target", "rewards.right"),
        {"data.jsonl": lines(*GOOD)},
    ),
    Case(
        "targets without numbers, to verify by",
        "rl grpo model.name=tiny prompts.sources=[data.jsonl] reward_model=null rewards.right.type=number --out out",
        ("data.jsonl", "hold no number", "type exact"),
        {"data.jsonl": lines(*({"question": f"{n}?", "answer": "yes"} for n in range(6)))},
    ),
)


def _damaged(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 8]) + content[middle + 8 :]

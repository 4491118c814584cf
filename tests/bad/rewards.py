"""Parts of a reward that fail before a run could earn anything: functions, rules, classifiers, servers, judges."""

from __future__ import annotations

import json

from bad.case import Case, lines
from bad.data import ANSWERED, GOOD

FILES = {
    "data.jsonl": lines(*GOOD),
    "mine.py": """
import math, sys, time
NOTHING = None
def right(answers, **_): return [1.0 for _ in answers]
def short(answers, **_): return [1.0]
def nan(answers, **_): return [math.nan for _ in answers]
def words(answers, **_): return ["good" for _ in answers]
def number(answers, **_): return 1.0
def none(answers, **_): return None
def raises(answers, **_): raise KeyError("gold")
def hangs(answers, **_): time.sleep(60)
def leaves(answers, **_): sys.exit(3)
def positional(answers): return [1.0 for _ in answers]
def huge(answers, **_): return [1e300 for _ in answers]
""",
    "broken.py": "def right(:\n",
    "needs.py": "import a_package_that_is_not_there\n",
}
RL = (
    "rl ppo model.name=tiny prompts.sources=[data.jsonl] reward_model=null value.start=zero training.steps=1"
    " rewards.mine={} --out out"
)

ELSEWHERE = ("ensemble", "classifier")
"""Parts that name their models instead."""


def _part(wrong: str, names: tuple[str, ...], **settings: object) -> Case:
    at = () if settings.get("type") in ELSEWHERE or isinstance(settings.get("model"), dict) else ("rewards.mine",)
    return Case(wrong, RL.format("'" + json.dumps(settings) + "'"), (*at, *names), FILES)


def _function(wrong: str, function: str, *names: str, **settings: object) -> Case:
    return _part(wrong, names, type="function", function=function, **settings)


def _server(wrong: str, path: str, *names: str, seconds: float = 0.4) -> Case:
    return _part(wrong, names, type="remote", url=f"http://SERVER{path}", timeout_seconds=seconds)


def _judge(wrong: str, path: str, *names: str, **settings: object) -> Case:
    return _part(wrong, names, type="judge", url=f"http://SERVER{path}", timeout_seconds=0.4, **settings)


def _pairs(wrong: str, settings: str, *names: str) -> Case:
    return Case(
        wrong,
        f"evaluate model.name=tiny before=one.jsonl after=one.jsonl judge=model {settings} --out out",
        names,
        {"one.jsonl": lines(ANSWERED)},
    )


CASES = (
    _part("a part of no type", ("type", "must be set"), weight=1),
    _part("a part of an unknown type", ("type", "'verifier'"), type="verifier"),
    _part("a part with a slip", ("wieght", "did you mean weight?"), type="number", wieght=2),
    _part("a weight that is a word", ("weight", "'much'"), type="number", weight="much"),
    Case(
        "a weight without end",
        RL.format('\'{"type": "number", "weight": .inf}\''),
        ("rewards.mine.weight", "finite"),
        FILES,
    ),
    Case(
        "a part's name with a space",
        RL.replace("rewards.mine", "'rewards.my part'").format('\'{"type": "number"}\''),
        ("rewards.my part", "letters"),
        FILES,
    ),
    Case("parts in a list", RL.replace("rewards.mine", "rewards").format("[number]"), ("rewards", "section"), FILES),
    # --- functions
    _function("a function without a name", "mine.py", "function", "package.module:name"),
    _function("a function's file that is not there", "absent.py:right", "absent.py"),
    _function("a package that is not there", "no.such.package:right", "No module named"),
    _function("a function that is not there", "mine.py:wrong", "wrong"),
    _function("a value for a function", "mine.py:NOTHING", "no function"),
    _function("a file with a fault", "broken.py:right", "SyntaxError", "broken.py"),
    _function("a file that needs what is not there", "needs.py:right", "a_package_that_is_not_there"),
    _function("a function that raises", "mine.py:raises", "KeyError", "gold"),
    _function("a function with too few scores", "mine.py:short", "1 scores for 2 answers"),
    _function("a function that gives NaN", "mine.py:nan", "nan", "no finite number"),
    _function("a function that gives words", "mine.py:words", "ValueError"),
    _function("a function that gives one number", "mine.py:number", "TypeError"),
    _function("a function that gives nothing", "mine.py:none", "TypeError"),
    _function("a function that gives too much", "mine.py:huge", "1e+300"),
    _function("a function that takes too little", "mine.py:positional", "unexpected keyword"),
    _function("a function that hangs", "mine.py:hangs", "no answer in 0.3 s", timeout_seconds=0.3),
    _function("a function that ends its process", "mine.py:leaves", "SystemExit"),
    _function("a function that has no time", "mine.py:right", "timeout_seconds", timeout_seconds=0),
    # --- rules
    _part("a pattern that is none", ("pattern", "not a regular expression"), type="pattern", pattern="(a"),
    _part("lengths upside down", ("low=9", "high=3"), type="length", low=9, high=3),
    _part("a length below 0", ("low", "at least 0"), type="length", low=-1, high=3),
    _part("a length in letters", ("unit", "characters"), type="length", high=3, unit="letters"),
    _part("an ensemble of one", ("folders", "at least 2"), type="ensemble", folders=["made/reward/reward"]),
    _part("an ensemble of nobody", ("absent",), type="ensemble", folders=["made/reward/reward", "./absent"]),
    _part("a classifier that is not there", ("./absent",), type="classifier", model="./absent", label="good"),
    _part("a classifier with a class that is a list", ("label",), type="classifier", model="tiny", label=["good"]),
    _part(
        "a classifier without the class", ("tiny", "'good'", "LABEL_0"), type="classifier", model="tiny", label="good"
    ),
    _part(
        "a classifier whose head nobody trained",
        ("tiny", "weights", "score"),
        type="classifier",
        model="tiny",
        label="LABEL_1",
    ),
    # --- servers
    _part("a server without http", ("url",), type="remote", url="127.0.0.1:8000"),
    _part("a server of another kind (file)", ("url",), type="remote", url="file:///etc/passwd"),
    _part("a server of another kind (ftp)", ("url",), type="remote", url="ftp://example.com/x"),
    _part("a server with a secret in its address", ("url",), type="remote", url="http://me:secret@example.com/"),
    _part("a server at no port", ("url", "Port"), type="remote", url="http://127.0.0.1:99999/x"),
    _part("a server at a port of letters", ("url", "Port"), type="remote", url="http://127.0.0.1:http/x"),
    _part("a server at half an address", ("url", "not a URL"), type="remote", url="http://[::1/x"),
    _part("a server's address with a line break", ("url",), type="remote", url="http://127.0.0.1/a\r\nX-Evil: 1"),
    _part(
        "a server's address in Chinese",
        ("url", "%E4"),
        type="remote",
        url="http://127.0.0.1:9/评分",
        timeout_seconds=0.3,
    ),
    _part(
        "a server that is not there",
        ("127.0.0.1:9",),
        type="remote",
        url="http://127.0.0.1:9/score",
        timeout_seconds=0.3,
    ),
    _server("a server that fails", "/500", "SERVER/500", "HTTP 500"),
    _server("a server that refuses", "/403", "HTTP 403"),
    _server("a server that knows no such page", "/404", "HTTP 404"),
    _server("a server that sends elsewhere", "/redirect", "SERVER/redirect", "HTTP 302", "elsewhere"),
    _server("a server that is busy", "/429", "HTTP 429"),
    _server("a server that speaks no JSON", "/text", "SERVER/text", "not JSON"),
    _server("a server that speaks bytes", "/bytes", "not JSON"),
    _server("a server that nests too deep", "/deep", "not JSON"),
    _server("a server that sends a list", "/list", "no list of rewards"),
    _server("a server that sends nothing", "/empty", "not JSON"),
    _server("a server with too few rewards", "/few", "1 rewards for 2 answers"),
    _server("a server whose rewards are words", "/words", "'good'", "no finite number"),
    _server("a server whose rewards are NaN", "/nan", "nan", "no finite number"),
    _server("a server whose rewards are null", "/null", "None", "no finite number"),
    _server("a server that sends 17 MiB", "/long", "16 MiB", seconds=20),
    _server("a server that trickles", "/slow", "no answer in time"),
    _server("a server that hangs up", "/gone", "SERVER/gone", "no reply in HTTP"),
    _server("a server that speaks no HTTP", "/noise", "SERVER/noise", "no reply in HTTP"),
    # --- judges
    _judge("a judge that fails", "/500", "HTTP 500"),
    _judge("a judge that is no chat", "/list", "no chat completion"),
    _judge("a judge whose key is not set", "/chat", "NO_SUCH_KEY", "environment variable", key_variable="NO_SUCH_KEY"),
    _judge(
        "a judge whose key has a line break", "/chat", "BROKEN_KEY", "environment variable", key_variable="BROKEN_KEY"
    ),
    _judge("a judge whose grades go down", "", "low=9", "high=3", low=9, high=3),
    _part("a key for a judge without a server", ("key_variable",), type="judge", key_variable="NO_SUCH_KEY"),
    _part("a judge whose model is not there", ("absent",), type="judge", model={"name": "./absent"}),
    _pairs(
        "a judge of pairs that fails",
        "pair_judge.url=http://SERVER/500 pair_judge.timeout_seconds=0.4",
        "pair_judge",
        "SERVER/500",
        "HTTP 500",
    ),
    _pairs(
        "a judge of pairs whose key is not set",
        "pair_judge.url=http://SERVER/chat pair_judge.key_variable=NO_SUCH_KEY",
        "pair_judge",
        "NO_SUCH_KEY",
    ),
    _pairs("a judge of pairs whose model is not there", "pair_judge.model.name=./absent", "./absent"),
)

"""Requests that a server must turn away: by whom, to whom, of what, and what is said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

TOKEN = "the-token-of-the-tests-0123456789"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
ASK, VOTE = "/v1/chat/completions", "/v1/feedback"


@dataclass(frozen=True)
class Asked:
    """A wrong request, as it goes over the wire. ANSWER in it stands for an answer of this server's, with two texts."""

    wrong: str
    status: int
    names: tuple[str, ...]
    """What the reply must name."""
    path: str = ASK
    body: object = None
    """JSON; a text or bytes as they are."""
    method: str = "POST"
    headers: Mapping[str, str | None] = field(default_factory=dict)
    """In place of those of a right request; none: left out."""
    theirs: bool = False
    """The message ends in a library's words, which change with its version."""


def _ask(wrong: str, *names: str, theirs: bool = True, **change: object) -> Asked:
    return Asked(wrong, 400, names, body=HELLO | change, theirs=theirs)


def _turns(wrong: str, *names: str, turns: object, theirs: bool = False) -> Asked:
    return Asked(wrong, 400, names, body={"messages": turns}, theirs=theirs)


def _vote(wrong: str, status: int, *names: str, theirs: bool = False, **said: object) -> Asked:
    body = {"id": "ANSWER", "consent": "en"} | said
    kept = {name: value for name, value in body.items() if value is not None}
    return Asked(wrong, status, names, VOTE, kept, theirs=theirs)


def _turn(role: str, content: object = "Hello") -> dict[str, object]:
    return {"role": role, "content": content}


CASES = (
    # who asks
    Asked("no token", 401, ("token",), body=HELLO, headers={"Authorization": None}),
    Asked("an empty token", 401, ("token",), body=HELLO, headers={"Authorization": "Bearer "}),
    Asked("another token", 401, ("token",), body=HELLO, headers={"Authorization": "Bearer " + TOKEN[:-1] + "x"}),
    Asked("the beginning of the token", 401, ("token",), body=HELLO, headers={"Authorization": "Bearer " + TOKEN[:8]}),
    Asked("the token and more", 401, ("token",), body=HELLO, headers={"Authorization": f"Bearer {TOKEN}0"}),
    Asked("the token as a password", 401, ("token",), body=HELLO, headers={"Authorization": f"Basic {TOKEN}"}),
    Asked("the token in the address", 401, ("token",), f"{ASK}?token={TOKEN}", HELLO, headers={"Authorization": None}),
    Asked("the token as a cookie", 401, ("token",), body=HELLO, headers={"Authorization": None, "Cookie": TOKEN}),
    Asked("a token of other letters", 401, ("token",), body=HELLO, headers={"Authorization": "Bearer \xe9\xff"}),
    Asked(
        "the model's name without a token", 401, ("token",), "/v1/models", method="GET", headers={"Authorization": None}
    ),
    Asked(
        "a page that is no page, without a token",
        401,
        ("token",),
        "/admin",
        method="GET",
        headers={"Authorization": None},
    ),
    Asked("a page sent to, without a token", 401, ("token",), "/", HELLO, headers={"Authorization": None}),
    # under which name, and from where
    Asked("another host", 403, ("--allow-host",), body=HELLO, headers={"Host": "evil.example"}),
    Asked(
        "a host that begins like ours", 403, ("--allow-host",), body=HELLO, headers={"Host": "127.0.0.1.evil.example"}
    ),
    Asked("a host that ends like ours", 403, ("--allow-host",), body=HELLO, headers={"Host": "evil.localhost"}),
    Asked("a host with a user", 403, ("--allow-host",), body=HELLO, headers={"Host": "127.0.0.1@evil.example"}),
    Asked("an empty host", 403, ("--allow-host",), body=HELLO, headers={"Host": ""}),
    Asked("another host for the page", 403, ("--allow-host",), "/", method="GET", headers={"Host": "evil.example"}),
    Asked("a page of another site", 403, ("another site",), body=HELLO, headers={"Origin": "https://evil.example"}),
    Asked("a page of another port", 403, ("another site",), body=HELLO, headers={"Origin": "http://127.0.0.1:1"}),
    Asked("a page of no site", 403, ("another site",), body=HELLO, headers={"Origin": "null"}),
    Asked(
        "a page of a site whose name has ours in it",
        403,
        ("another site",),
        body=HELLO,
        headers={"Origin": "http://SERVER.evil.example"},
    ),
    Asked(
        "a question before the real one",
        403,
        ("another site",),
        method="OPTIONS",
        headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"},
    ),
    # what for
    Asked("a place that is not there", 404, ("Not Found",), "/v1/weights", {}),
    Asked("new weights", 404, ("Not Found",), "/v1/models/packaged", {"path": "/tmp/weights"}),
    Asked("another method", 405, ("Method Not Allowed",), ASK, method="GET"),
    Asked("deleting the model", 405, ("Method Not Allowed",), "/v1/models", method="DELETE"),
    Asked("reading what others said", 405, ("Method Not Allowed",), VOTE, method="GET"),
    Asked("a path out of the folder", 404, ("Not Found",), "/../../etc/passwd", method="GET"),
    Asked(
        "a path out of the folder, written in percents", 404, ("Not Found",), "/%2e%2e/%2e%2e/etc/passwd", method="GET"
    ),
    Asked("a path with backslashes", 404, ("Not Found",), "/..\\..\\secret", method="GET"),
    Asked("a path with a zero byte", 404, ("Not Found",), "/chat.js%00.html", method="GET"),
    Asked("the server's own files", 404, ("Not Found",), "/server.py", method="GET"),
    # in what form
    Asked(
        "a form",
        415,
        ("application/json",),
        body="messages=hello",
        headers={"Content-Type": "application/x-www-form-urlencoded"},
    ),
    Asked(
        "a plain text, as a page of another site may send it",
        415,
        ("application/json",),
        body=json.dumps(HELLO),
        headers={"Content-Type": "text/plain"},
    ),
    Asked("no type", 415, ("application/json",), body=HELLO, headers={"Content-Type": None}),
    Asked("more than is read", 413, ("KiB",), body=HELLO | {"user": "x" * 300_000}),
    Asked("a length that is a lie", 413, ("KiB",), body="{}", headers={"Content-Length": "99999999"}),
    Asked("no body", 400, ("Invalid JSON",), body="", theirs=True),
    Asked("no JSON", 400, ("Invalid JSON",), body="hello", theirs=True),
    Asked("half of it", 400, ("Invalid JSON",), body='{"messages": [', theirs=True),
    Asked("bytes", 400, ("Invalid JSON",), body=b"\xff\xfe\x00", theirs=True),
    Asked("nested too deep", 400, ("Invalid JSON",), body="[" * 100_000, theirs=True),
    Asked("a list", 400, ("object",), body=[HELLO], theirs=True),
    Asked("a number", 400, ("object",), body=7, theirs=True),
    Asked("a body of nothing", 400, ("object",), body="null", theirs=True),
    # of what
    Asked("no messages", 400, ("messages",), body={}, theirs=True),
    _turns("messages that are a text", "messages", turns="Hello", theirs=True),
    _turns("an empty conversation", "messages", turns=[], theirs=True),
    _turns("201 turns", "messages", turns=[_turn("user")] * 201, theirs=True),
    _turns("a turn without a role", "messages.0", turns=["Hello"], theirs=True),
    _turns("a turn of a role alone", "messages.0.content", turns=[{"role": "user"}], theirs=True),
    _turns("an empty turn", "messages.0.content", turns=[_turn("user", "")], theirs=True),
    _turns("words that are a number", "messages.0.content", turns=[_turn("user", 7)], theirs=True),
    _turns("words that are nothing", "messages.0.content", turns=[_turn("user", None)], theirs=True),
    _turns("a turn with a picture", "messages.0.content", turns=[_turn("user", [{"type": "image_url"}])], theirs=True),
    _turns("a role that is none", "messages.0.role", turns=[_turn("tool")], theirs=True),
    _turns("a turn with more in it", "messages.0.name", "leave it out", turns=[_turn("user") | {"name": "Anna"}]),
    _turns(
        "a conversation that ends with an answer", "ends with a user's turn", turns=[_turn("user"), _turn("assistant")]
    ),
    _turns("a conversation of a system turn", "ends with a user's turn", turns=[_turn("system")]),
    _turns("half a character", "Invalid JSON", turns=[_turn("user", "\ud800")], theirs=True),
    _turns("a conversation longer than the model", "positions", turns=[_turn("user", "word " * 400)]),
    _ask("a field nobody knows", "max_token", "leave it out", theirs=False, max_token=4),
    _ask("tools", "tools", "leave it out", theirs=False, tools=[]),
    _ask("a temperature that is a word", "temperature", temperature="hot"),
    _ask("a question's temperature below 0", "temperature", temperature=-1),
    _ask("a temperature that overflows", "at least 0.001", temperature=1e-40),
    _ask("a temperature of 1000", "temperature", temperature=1000),
    _ask("a share of nothing", "top_p", top_p=0),
    _ask("a share of more than all", "top_p", top_p=1.5),
    _ask("no answers", "n: ", n=0),
    _ask("a thousand answers", "n: ", n=1000),
    _ask("half an answer", "n: ", n=0.5),
    _ask("an answer of no tokens", "max_tokens", max_tokens=0),
    _ask("an answer of true tokens", "max_tokens", max_tokens=True),
    _ask("a seed below 0", "seed", seed=-1),
    _ask("a seed without end", "seed", seed=10**40),
    _ask("a stream that is a word", "stream", stream="yes"),
    Asked(
        "a question whose temperature is no number",
        400,
        ("temperature",),
        body=json.dumps(HELLO)[:-1] + ', "temperature": NaN}',
        theirs=True,
    ),
    Asked(
        "a question whose temperature has no end",
        400,
        ("temperature",),
        body=json.dumps(HELLO)[:-1] + ', "temperature": 1e999}',
        theirs=True,
    ),
    # votes
    _vote("a vote without consent", 400, "consent", ranks=[0, 1], consent=None, theirs=True),
    _vote("a vote with a consent that is no", 400, "consent", ranks=[0, 1], consent=False, theirs=True),
    _vote("a vote that agrees to something else", 400, "consent", ranks=[0, 1], consent="yes", theirs=True),
    _vote("a vote that says nothing", 400, "one of ranks, good and better", theirs=True),
    _vote("a vote that says two things", 400, "one of ranks, good and better", ranks=[0, 1], good=True, theirs=True),
    _vote("a vote on nothing", 400, "id", id=None, ranks=[0, 1], theirs=True),
    _vote("a vote on an answer nobody gave", 404, "no such answer", id="chatcmpl-0", ranks=[0, 1]),
    _vote("a vote with a path for a name", 404, "no such answer", id="../../etc/passwd", ranks=[0, 1]),
    _vote("a vote that brings its own answers", 400, "answers", "leave it out", ranks=[0, 1], answers=["a", "b"]),
    _vote("a vote that is in quarantine or not", 400, "state", "leave it out", ranks=[0, 1], state="kept"),
    _vote("three ranks for two answers", 400, "3 ranks for 2 answers", ranks=[0, 1, 2]),
    _vote("no ranks", 400, "0 ranks for 2 answers", ranks=[]),
    _vote("ranks below 0", 400, "ranks.0", ranks=[-1, 0], theirs=True),
    _vote("ranks that are words", 400, "ranks.0", ranks=["good", "bad"], theirs=True),
    _vote("a thumb that is 1", 400, "good", good=1, theirs=True),
    _vote("a thumb for an answer that is not there", 400, "no answer number 2", good=True, index=2),
    _vote("a thumb for an answer below 0", 400, "index", good=True, index=-1, theirs=True),
    _vote("a better answer of blanks", 400, "no words", better=" \n", theirs=True),
    _vote("a better answer of nothing", 400, "better", better="", theirs=True),
    _vote("a better answer of 20,001 letters", 400, "better", better="x" * 20_001, theirs=True),
    _vote("a name of 65 letters", 400, "annotator", good=True, annotator="x" * 65, theirs=True),
    _vote("a name that steers a terminal", 400, "printable", good=True, annotator="\x1b[2J", theirs=True),
    Asked("taking back what nobody said", 404, ("no such feedback",), f"{VOTE}/0123456789abcdef", method="DELETE"),
    Asked("taking back everything", 405, ("Method Not Allowed",), VOTE, method="DELETE"),
    Asked("taking back with a wildcard", 404, ("no such feedback",), f"{VOTE}/%25", method="DELETE"),
)

"""`dressage serve`: what is answered, what is kept of votes, and that nobody can hold it up or come in."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from dressage.schema import Message, Prompt, Sampling
from server import TOKEN, Served, serving

ASK, VOTE = "/v1/chat/completions", "/v1/feedback"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def served(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tiny_model, tmp_path_factory.mktemp("served") / "feedback.db") as served:
        yield served


@pytest.fixture
def empty(served: Served) -> Served:
    served.store.delete(ids=[one.id for one in served.store.read()])
    return served


def ask(served: Served, **question: Any) -> Any:
    reply = served.ask("POST", ASK, {"messages": HELLO, "max_tokens": 6, "seed": 3} | question)
    assert reply.status == 200, reply.text
    return reply


# --- answers ----------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_engine(served: Served) -> None:
    """Known from `generate`, which tests of its own hold against transformers'."""
    prompt = served.desk.encode([Message("user", "Hello")])
    sampling = Sampling(6, temperature=0.9, top_p=0.8, seed=3)
    completions = served.desk.engine.generate([prompt, prompt], sampling)
    told = ask(served, n=2, temperature=0.9, top_p=0.8).json()
    texts = [served.desk.template.decode(completion.tokens) for completion in completions]
    assert [choice["message"]["content"] for choice in told["choices"]] == texts and texts[0] != texts[1]
    assert [choice["finish_reason"] for choice in told["choices"]] == [one.finish for one in completions]
    drawn = sum(len(one.tokens) for one in completions)
    assert told["usage"] == {
        "prompt_tokens": len(prompt.tokens), "completion_tokens": drawn, "total_tokens": len(prompt.tokens) + drawn,
    }  # fmt: skip
    assert ask(served, n=2, temperature=0.9, top_p=0.8, seed=4).json()["choices"] != told["choices"]


def test_a_stream_says_the_same(served: Served) -> None:
    whole = ask(served, n=2).json()
    reply = ask(served, n=2, stream=True)
    events = reply.events()
    texts, finishes = ["", ""], [None, None]
    for event in events:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        finishes[choice["index"]] = choice["finish_reason"] or finishes[choice["index"]]
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert finishes == [choice["finish_reason"] for choice in whole["choices"]]
    assert {event["id"] for event in events} == {events[0]["id"]} != {whole["id"]}
    assert reply.headers["content-type"].startswith("text/event-stream")


def test_nobody_gets_longer_answers_than_the_server_allows(served: Served) -> None:
    assert ask(served, max_tokens=10_000).json()["usage"]["completion_tokens"] <= 32
    assert ask(served, max_tokens=None).status == 200
    assert ask(served, max_completion_tokens=2, max_tokens=9).json()["usage"]["completion_tokens"] <= 2


def test_the_system_turn_is_the_servers_unless_the_conversation_has_one(tiny_model: Path) -> None:
    with serving(tiny_model, None, system="Be brief.") as served:
        own = [Message("system", "Be long."), Message("user", "Hi")]
        assert served.desk.encode(own[1:]).messages == (Message("system", "Be brief."), own[1])
        assert served.desk.encode(own).messages == tuple(own)


def test_what_the_page_has_to_know(served: Served, tiny_model: Path) -> None:
    (told,) = served.ask("GET", "/v1/models").json()["data"]
    assert told["id"] == "tiny" and told["feedback"] is True and set(told["consent"]) == {"en", "zh"}
    with serving(tiny_model, None) as silent:
        assert silent.ask("GET", "/v1/models").json()["data"][0]["feedback"] is False
        refused = silent.ask("POST", VOTE, {"id": "x", "consent": "en", "good": True})
        assert refused.status == 404 and "--feedback" in refused.text


def test_many_at_once_get_each_their_own(served: Served) -> None:
    asked = [f"Question {number}" for number in range(6)]
    found: dict[str, Any] = {}

    def one(words: str) -> None:
        found[words] = ask(served, messages=[{"role": "user", "content": words}], temperature=0).json()

    threads = [threading.Thread(target=one, args=(words,)) for words in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for words in asked:
        alone = ask(served, messages=[{"role": "user", "content": words}], temperature=0).json()
        assert found[words]["choices"] == alone["choices"]


# --- votes ------------------------------------------------------------------------------------------------------------


def test_a_vote_is_kept_with_all_that_the_server_knows(empty: Served) -> None:
    told = ask(empty, n=2, temperature=0.5).json()
    vote = {"id": told["id"], "annotator": " Anna ", "consent": "zh", "ranks": [1, 0]}
    kept = empty.ask("POST", VOTE, vote)
    assert kept.status == 201 and kept.json()["state"] == "kept"
    (record,) = empty.store.read()
    assert record.id == kept.json()["id"] and record.annotator == "Anna" and record.kind == "ranking"
    assert record.prompt == (Message("user", "Hello"),) and record.verdict == (1, 0)
    assert list(record.answers) == [choice["message"]["content"] for choice in told["choices"]]
    assert list(record.finished) == [choice["finish_reason"] == "stop" for choice in told["choices"]]
    assert record.model == {"name": "tiny", "sha256": "0" * 64} and "训练" in record.consent
    assert record.sampling == {"temperature": 0.5, "top_p": 1.0, "top_k": 0, "max_new_tokens": 6, "seed": 3}


def test_a_thumb_and_a_better_answer(empty: Served) -> None:
    told = ask(empty, n=2).json()
    second = told["choices"][1]["message"]["content"]
    for said in ({"good": False, "index": 1}, {"good": True, "index": 0}, {"better": "Hi!", "index": 1}):
        assert empty.ask("POST", VOTE, {"id": told["id"], "consent": "en"} | said).status == 201
    first = told["choices"][0]["message"]["content"]
    found = {(one.kind, one.answers, one.verdict, one.annotator) for one in empty.store.read()}
    assert found == {
        ("rating", (second,), (0,), "anonymous"),
        ("rating", (first,), (1,), "anonymous"),
        ("demonstration", ("Hi!",), (), "anonymous"),
    }


def test_nobody_says_two_things_of_one_answer(empty: Served) -> None:
    """Contradictory pairs would teach noise: who has changed their mind takes the first back."""
    vote = {"id": ask(empty, n=2).json()["id"], "consent": "en", "annotator": "Anna"}
    first = empty.ask("POST", VOTE, vote | {"ranks": [0, 1]})
    assert empty.ask("POST", VOTE, vote | {"ranks": [1, 0]}).status == 409
    assert empty.ask("POST", VOTE, vote | {"ranks": [1, 0], "index": 1}).status == 409
    assert empty.ask("POST", VOTE, vote | {"ranks": [1, 0], "annotator": "Bo"}).status == 201
    assert empty.ask("DELETE", f"{VOTE}/{first.json()['id']}").status == 204
    assert empty.ask("POST", VOTE, vote | {"ranks": [1, 0]}).status == 201
    assert {(one.annotator, one.verdict) for one in empty.store.read()} == {("Anna", (1, 0)), ("Bo", (1, 0))}


def test_a_store_that_cannot_is_told_without_its_place(tiny_model: Path, tmp_path: Path, capfd: Any) -> None:
    place = tmp_path / "f.db"
    with serving(tiny_model, place) as served:
        vote = {"id": ask(served, n=2).json()["id"], "consent": "en", "ranks": [0, 1]}
        aside = place.rename(tmp_path / "aside.db")
        place.mkdir()
        refused = served.ask("POST", VOTE, vote)
        assert refused.status == 503 and "f.db" not in refused.text and "try again" in refused.text
        assert "f.db" in capfd.readouterr().err
        place.rmdir()
        aside.rename(place)  # and it is whole again
        assert served.ask("POST", VOTE, vote).status == 201


def test_what_was_said_can_be_taken_back_by_who_said_it(empty: Served) -> None:
    told = ask(empty, n=2).json()
    kept = empty.ask("POST", VOTE, {"id": told["id"], "consent": "en", "ranks": [0, 0]}).json()
    other = kept["id"][:-1] + ("0" if kept["id"][-1] != "0" else "1")
    assert empty.ask("DELETE", f"{VOTE}/{other}").status == 404
    assert empty.ask("DELETE", f"{VOTE}/{kept['id']}").status == 204
    assert list(empty.store.read()) == []
    assert empty.ask("DELETE", f"{VOTE}/{kept['id']}").status == 404


def test_votes_may_have_to_wait(tiny_model: Path, tmp_path: Path) -> None:
    with serving(tiny_model, tmp_path / "f.db", arriving="quarantined") as served:
        told = ask(served, n=2).json()
        kept = served.ask("POST", VOTE, {"id": told["id"], "consent": "en", "ranks": [0, 1]})
        assert kept.json()["state"] == "quarantined"
        assert list(served.store.read(state="kept")) == [] and len(list(served.store.read())) == 1


# --- who holds it up --------------------------------------------------------------------------------------------------


@dataclass
class Slow:
    """Says "a" for ever, a letter every few milliseconds; in place of an engine."""

    letter: int
    seconds: float = 0.01
    began: int = 0
    ended: int = 0
    says: list[Sampling] = field(default_factory=list)

    def stream_several(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[tuple[int, int]]:
        self.began += 1
        try:
            while True:
                time.sleep(self.seconds)
                yield 0, self.letter
        finally:
            self.ended += 1


@pytest.fixture
def slow(served: Served) -> Slow:
    return Slow(served.desk.template.tokenizer.convert_tokens_to_ids("a"))


def eventually(true: Any) -> None:
    ends = time.monotonic() + 10
    while not true():
        assert time.monotonic() < ends, "never"
        time.sleep(0.01)


def test_an_answer_that_takes_too_long_is_cut(tiny_model: Path, slow: Slow) -> None:
    with serving(tiny_model, None, engine=slow, seconds=0.2) as served:
        (choice,) = ask(served).json()["choices"]
        assert choice["finish_reason"] == "length" and set(choice["message"]["content"]) == {"a"}
        eventually(lambda: slow.ended == 1)


def asking(served: Served, **question: Any) -> socket.socket:
    """A question whose answer nobody reads."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    connection.request("POST", ASK, json.dumps({"messages": HELLO} | question).encode(), headers)
    assert connection.sock is not None
    return connection.sock


def leave(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@pytest.mark.parametrize(("stream", "silent"), [(True, False), (False, False), (True, True)])
def test_who_goes_away_frees_the_model(tiny_model: Path, slow: Slow, stream: bool, silent: bool) -> None:
    with serving(tiny_model, None, engine=slow, seconds=60) as served:
        if silent:  # tokens without any text
            slow.letter = served.desk.template.tokenizer.convert_tokens_to_ids("<|im_start|>")
        connection = asking(served, stream=stream)
        eventually(lambda: slow.began == 1)
        leave(connection)
        eventually(lambda: slow.ended == 1)


def test_who_goes_away_leaves_the_queue(tiny_model: Path, slow: Slow) -> None:
    with serving(tiny_model, None, engine=slow, seconds=60) as served:
        first = asking(served)
        eventually(lambda: slow.began == 1)
        waiting = [asking(served) for _ in range(8)]
        eventually(lambda: served.desk._waiting == 8)
        for connection in waiting:
            leave(connection)
        eventually(lambda: served.desk._waiting == 0)
        leave(first)
        eventually(lambda: slow.ended == 1)
        time.sleep(0.1)
        assert slow.began == 1  # nobody's turn came after they had left


def test_who_does_not_read_is_put_out(tiny_model: Path, slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dressage.serving.guard.SECONDS", 0.3)
    slow.seconds = 0
    with serving(tiny_model, None, engine=slow, seconds=60, guard={"seconds": 0.3}, buffer=4096) as served:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.port))
        body = json.dumps({"messages": HELLO, "stream": True})
        head = f"POST {ASK} HTTP/1.1\r\nHost: {served.host}\r\nAuthorization: Bearer {TOKEN}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        connection.sendall(head.encode())
        eventually(lambda: slow.ended == 1)
        eventually(lambda: not served.server.server_state.connections)
        connection.close()


def test_too_many_are_told_to_come_again(tiny_model: Path, slow: Slow) -> None:
    with serving(tiny_model, None, engine=slow, seconds=1) as served:
        statuses: list[int] = []

        def one() -> None:
            statuses.append(served.ask("POST", ASK, {"messages": HELLO}).status)

        threads = [threading.Thread(target=one) for _ in range(12)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(statuses) == 3)
        # One is answered, eight wait, three are told so at once.
        assert statuses == [503] * 3
        slow.stream_several = lambda *_: iter(())  # type: ignore[method-assign]
        for thread in threads:
            thread.join()
        assert statuses[3:] == [200] * 9


def test_who_sends_slowly_or_nothing_is_not_waited_for(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dressage.serving.guard.SECONDS", 0.3)
    with serving(tiny_model, None, guard={"seconds": 0.3}) as served:
        head = f"POST {ASK} HTTP/1.1\r\nHost: {served.host}\r\nAuthorization: Bearer {TOKEN}\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        for sent, reply in {head: b"HTTP/1.1 408", head[:40]: b"", "": b""}.items():
            with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
                connection.sendall(sent.encode())
                assert connection.recv(12) == reply


def test_what_is_no_http_is_turned_away(served: Served) -> None:
    for sent in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", served.port), timeout=15) as connection:
            connection.sendall(sent)
            assert connection.recv(12) == b"HTTP/1.1 400"


def test_two_hosts_in_a_request_are_one_too_many(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=15) as connection:
        connection.sendall(f"GET / HTTP/1.1\r\nHost: {served.host}\r\nHost: evil.example\r\n\r\n".encode())
        assert connection.recv(12) in (b"HTTP/1.1 400", b"HTTP/1.1 403")


# --- pages ------------------------------------------------------------------------------------------------------------


def test_pages_hold_no_script_and_load_nothing_from_elsewhere(served: Served) -> None:
    for path in ("/", "/chat.js", "/style.css"):
        page = served.ask("GET", path, headers={"Authorization": None})
        policy = dict(rule.strip().partition(" ")[::2] for rule in page.headers["content-security-policy"].split(";"))
        assert page.status == 200 and policy["default-src"] == "'none'" and policy["script-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'" and "unsafe" not in str(policy)
        assert page.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"https?://|//cdn", page.text)
    html = served.ask("GET", "/", headers={"Authorization": None}).text
    assert re.findall(r"<script(?![^>]* src=)|\son\w+=|\sstyle=|<style", html) == []
    script = served.ask("GET", "/chat.js", headers={"Authorization": None}).text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|Function\(", script)


def test_the_page_speaks_both_languages(served: Served) -> None:
    script = served.ask("GET", "/chat.js").text
    html = served.ask("GET", "/").text
    english, chinese = script[script.index("  en: {") : script.index("};\n")].split("  zh: {")
    names = [re.findall(r"(?:^\s*|,\s*)(\w+): \"", part, re.MULTILINE) for part in (english, chinese)]
    assert sorted(names[0]) == sorted(names[1]) and len(names[0]) > 20
    wanted = re.findall(r'data-say="(\w+)"', html) + re.findall(r'\b(?:say|button)\("(\w+)"', script)
    assert len(wanted) > 15 and set(wanted) <= set(names[0])


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_verb_serves_until_it_is_told_to_stop(tiny_model: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "dressage", "serve", str(tiny_model), "--port", "0", "--feedback", "votes/f.db"]
    environment = {name: value for name, value in os.environ.items() if name != "DRESSAGE_TOKEN"}
    run = subprocess.Popen(
        arguments, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert run.stdout is not None
        shown = [run.stdout.readline() for _ in range(3)]
        port, token = re.search(r"http://127\.0\.0\.1:(\d+)/#token=(\S+)", shown[0]).groups()  # type: ignore[union-attr]
        assert len(token) >= 32 and "Ctrl-C" in shown[1] and "votes/f.db" in shown[2]
        served = Served(int(port), token)
        told = ask(served, n=2).json()
        assert told["model"] == str(tiny_model)
        assert served.ask("POST", VOTE, {"id": told["id"], "consent": "en", "ranks": [0, 1]}).status == 201
        assert replace(served, token=token[:-1]).ask("GET", "/v1/models").status == 401
        run.send_signal(signal.SIGINT)
        rest, errors = run.communicate(timeout=30)
    finally:
        run.kill()
    assert run.returncode == 0, errors
    assert rest == "" and token not in errors and "Traceback" not in errors
    assert (tmp_path / "votes/f.db").is_file()


def test_a_token_of_ones_own_is_not_printed(tiny_model: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "dressage", "serve", str(tiny_model), "--port", "0", "--feedback", "none"]
    environment = os.environ | {"DRESSAGE_TOKEN": TOKEN}
    run = subprocess.Popen(arguments, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout is not None
        shown = run.stdout.readline()
        port = re.search(r"http://127\.0\.0\.1:(\d+)/", shown)[1]  # type: ignore[index]
        assert TOKEN not in shown
        assert Served(int(port), TOKEN).ask("GET", "/v1/models").status == 200
    finally:
        run.terminate()
        run.wait(20)


@pytest.mark.parametrize(
    "token", ["short", "with spaces in it, and long", "十分长的令牌" * 4, "plus+and&amper%sand=too"]
)
def test_a_token_has_to_be_one(token: str, dressage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRESSAGE_TOKEN", token)
    ran = dressage("serve", "packaged", "--port", "0")
    assert ran.exit_code == 2 and "DRESSAGE_TOKEN" in ran.stderr and token not in ran.output


def test_without_the_extra_it_says_what_to_install(dressage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for command in (("serve", "packaged"), ("feedback", "list")):
        ran = dressage(*command)
        assert ran.exit_code == 2 and "pip install 'dressage[serve]'" in ran.stderr


def test_votes_become_weights(empty: Served, tiny_model: Path, tmp_path: Path, dressage: Any) -> None:
    """All the way round: what people prefer on the page is what `dressage dpo` learns."""
    for number in range(4):
        told = ask(empty, n=2, messages=[{"role": "user", "content": f"Question {number}"}], seed=number).json()
        vote = {"id": told["id"], "consent": "en", "ranks": [number % 2, 1 - number % 2]}
        assert empty.ask("POST", VOTE, vote).status == 201
    votes = tmp_path / "votes.jsonl"
    assert dressage("feedback", "export", "rankings", empty.store.name, "--out", votes).exit_code == 0
    ran = dressage(
        "dpo", f"model.name={tiny_model}", f"data.sources=[{votes}]", "data.heldout_fraction=0", "lora.rank=2",
        "training.steps=1", "training.batch_size=2", "--out", tmp_path / "dpo",
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    assert "4 records of 4 rows (Dressage rankings)" in ran.output
    assert (tmp_path / "dpo/policy/adapter_model.safetensors").is_file()

"""A good file, recipe or request with something changed by chance is read, or refused in a line; nothing more."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bad.data import GOOD, HH, PAIR, RANKED, TREE, ULTRA
from bad.requests import ASK, HELLO, TOKEN, VOTE
from dressage.data.sources import read_demonstrations, read_prompts, read_rankings, read_ratings
from dressage.errors import DressageError
from dressage.recipe import load_pipeline, load_stage, recipes
from dressage.stages.answers import lines_of
from server import Served, serving

TRIES = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
ROWS: list[dict[str, Any]] = [
    *GOOD[:1],
    PAIR,
    RANKED,
    ULTRA,
    HH,
    TREE,
    {"messages": [{"role": "user", "content": "a"}]},
]
ROWS += [{"prompt": [{"role": "user", "content": "Hello"}], "answers": [{"text": "Hi", "finish": "stop"}]}]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from([10**400, 1e308]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
SPLICES = st.binary(max_size=6) | st.sampled_from(
    [b"\x00", b"\xff", b"[", b"}", b'"', b"\\", b"\n", b"&a *a", b"\xed\xa0\x80"]
)


def changed(value: Any, data: st.DataObject) -> Any:
    """The value with something inside it taken out, doubled or replaced."""
    if isinstance(value, dict) and value and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(value)))
        if data.draw(st.integers(0, 5)) == 0:
            return {name: one for name, one in value.items() if name != key}
        return value | {key: changed(value[key], data)}
    if isinstance(value, list) and value and data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(value) - 1))
        return [*value[:place], changed(value[place], data), *value[place + data.draw(st.integers(0, 1)) :]]
    return data.draw(VALUES)


def spliced(content: bytes, data: st.DataObject) -> bytes:
    """Bytes with some taken out and others put in."""
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 8)))
    return content[:start] + data.draw(SPLICES) + content[end:]


def read_or_refused(read: Callable[[], object]) -> None:
    try:
        read()
    except DressageError as error:
        assert error.exit_code == 2 and str(error) and len(str(error).splitlines()) <= 2


@pytest.mark.parametrize("read", [read_demonstrations, read_rankings, read_ratings, read_prompts])
@TRIES
@given(data=st.data())
def test_rows(read: Callable[[str], object], tmp_path: Path, data: st.DataObject) -> None:
    row = data.draw(st.sampled_from(ROWS))
    content = "\n".join([json.dumps(row), json.dumps(changed(row, data))]).encode()
    if data.draw(st.booleans()):
        content = spliced(content, data)
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    read_or_refused(lambda: read(str(path)))
    read_or_refused(lambda: [*lines_of(path)])


@TRIES
@given(data=st.data())
def test_recipes(tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["sft", "reward", "dpo", "ppo", "sample", "rank", "evaluate", "quickstart"]))
    path = tmp_path / "recipe.yaml"
    path.write_bytes(spliced(spliced(recipes()[name].read_bytes(), data), data))
    if name == "quickstart":
        read_or_refused(lambda: load_pipeline(str(path)))
    else:
        read_or_refused(lambda: load_stage(name, str(path)))


@TRIES
@given(data=st.data())
def test_overrides(data: st.DataObject) -> None:
    sections = ["training", "optimizer", "kl", "rollout", "value", "rewards.mine", "model", "lora", "prompts", "seed"]
    name = data.draw(st.sampled_from(sections))
    more = data.draw(st.sampled_from(["", ".steps", ".name", ".coef", ".type", ".learning_rate", ".sources", ".start"]))
    value = data.draw(VALUES.map(lambda one: json.dumps(one)) | st.text(max_size=12))
    read_or_refused(lambda: load_stage("ppo", "ppo", [f"{name}{more}={value}"]))


@pytest.mark.parametrize(
    "file", ["made/sft/policy/role.json", "made/sft/policy/adapter_config.json", "made/sft/stage.json"]
)
@TRIES
@given(data=st.data())
def test_files_of_a_run(ready: Path, file: str, data: st.DataObject, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `report`, `doctor` and `chat` read first."""
    from dressage.models.files import saved_model
    from dressage.models.pretrained import lineage
    from dressage.monitor.run_folder import read_stages

    path = ready / file
    good = path.read_bytes()
    here = os.getcwd()
    try:
        os.chdir(ready)
        value = changed(json.loads(good), data)
        path.write_bytes(
            spliced(json.dumps(value).encode(), data) if data.draw(st.booleans()) else json.dumps(value).encode()
        )
        for read in (lineage, lambda name: saved_model(Path(name)), lambda name: read_stages(Path(name).parent)):
            read_or_refused(lambda read=read: read("made/sft/policy"))
    finally:
        os.chdir(here)
        path.write_bytes(good)


@pytest.fixture(scope="module")
def served(tiny_model: Path) -> Iterator[Served]:
    with serving(tiny_model, tiny_model.with_name("feedback.db"), token=TOKEN) as served:
        yield served


@pytest.mark.parametrize("path", [ASK, VOTE])
@TRIES
@given(data=st.data())
def test_requests(path: str, served: Served, data: st.DataObject) -> None:
    if path == VOTE:
        answered = served.ask("POST", ASK, HELLO | {"n": 2}).json()["id"]
        body: dict[str, Any] = {"id": answered, "consent": "en", "annotator": "Anna", "ranks": [0, 1], "index": 0}
    else:
        body = HELLO | {"n": 2, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stream": False}
    sent = json.dumps(changed(body, data)).encode("utf-8", "surrogatepass")
    reply = served.ask("POST", path, spliced(sent, data) if data.draw(st.booleans()) else sent)
    assert reply.status in (200, 201, 400, 404), reply.text
    if reply.status >= 400:
        error = reply.json()["error"]
        assert error["code"] == reply.status and len(error["message"]) < 600 and "Traceback" not in error["message"]
    elif reply.headers["content-type"] == "application/json":
        assert reply.json()["id"]
    else:
        assert all("error" not in event for event in reply.events())

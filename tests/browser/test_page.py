"""The chat page in a real browser: answers, votes, taking them back, two languages; what a model says stays text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dressage.schema import Prompt, Sampling
from server import TOKEN, Served, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
ATTACK = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@dataclass
class Scripted:
    """Says what it is told to, one text an answer; in place of an engine."""

    template: Any
    texts: list[str] = field(default_factory=list)
    asked: list[Prompt] = field(default_factory=list)

    def stream_several(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[tuple[int, int]]:
        self.asked.append(prompts[0])
        for number, text in enumerate(self.texts[: len(prompts)]):
            for token in self.template.tokenizer(text, add_special_tokens=False)["input_ids"]:
                yield number, token
            yield number, self.template.end_token


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def served(tiny_model: Path, tmp_path: Path) -> Iterator[Served]:
    with serving(tiny_model, tmp_path / "feedback.db") as served:
        served.desk.engine = Scripted(served.desk.template, ["Good. 好。", ATTACK])
        yield served


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    context = browser.new_context(locale="en-GB", viewport={"width": 1000, "height": 760})
    page = context.new_page()
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("dialog", lambda dialog: (page.faults.append("a dialog"), dialog.dismiss()))
    page.on("console", lambda said: said.type == "error" and page.faults.append(said.text))
    page.goto(f"http://{served.host}/#token={TOKEN}")
    page.get_by_text("tiny", exact=True).wait_for()
    yield page
    assert page.faults == []
    context.close()


def ask(page: Any, words: str) -> None:
    page.locator("#words").fill(words)
    page.keyboard.press("Enter")


def told(page: Any, text: str) -> None:
    page.locator("#told", has_text=text).wait_for()


def test_a_vote_goes_all_the_way_and_back(page: Any, served: Served) -> None:
    ask(page, "Which?")
    page.get_by_role("button", name="The first is better").wait_for()
    assert page.locator(".answer p").all_inner_texts() == ["Good. 好。", ATTACK]
    assert page.locator(".answer img").count() == 0  # what a model says is text
    page.locator("#consent").check()
    page.locator("#who").fill("Anna")
    page.get_by_role("button", name="The first is better").click()
    told(page, "Kept")
    (record,) = served.store.read()
    assert (record.annotator, record.verdict, record.answers) == ("Anna", (0, 1), ("Good. 好。", ATTACK))
    page.get_by_role("button", name="Take it back").click()
    told(page, "deleted")
    assert list(served.store.read()) == []
    # The conversation goes on with what was chosen.
    ask(page, "And now?")
    page.get_by_role("button", name="Equally good").wait_for()
    turns = [(message.role, message.content) for message in served.desk.engine.asked[-1].messages]
    assert turns == [("user", "Which?"), ("assistant", "Good. 好。"), ("user", "And now?")]


def test_nothing_is_kept_without_consent(page: Any, served: Served) -> None:
    ask(page, "Which?")
    page.get_by_role("button", name="The second is better").click()
    told(page, "Nothing was kept")
    assert list(served.store.read()) == []


def test_one_answer_a_thumb_and_a_better_one(page: Any, served: Served) -> None:
    page.locator("#two").uncheck()
    page.locator("#consent").check()
    ask(page, "Hello")
    page.get_by_role("button", name="Bad", exact=True).click()
    told(page, "Kept")
    ask(page, "Again")
    page.get_by_role("button", name="Write a better one").click()
    page.locator(".answer textarea").fill("Better!")
    page.get_by_role("button", name="Keep this").click()
    page.get_by_text("Better!").wait_for()
    told(page, "Kept")
    found = [(one.kind, one.answers, one.verdict) for one in served.store.read()]
    assert sorted(found) == [("demonstration", ("Better!",), ()), ("rating", ("Good. 好。",), (0,))]
    ask(page, "On")
    page.get_by_role("button", name="Good", exact=True).wait_for()
    assert [message.content for message in served.desk.engine.asked[-1].messages][-2:] == ["Better!", "On"]


def test_what_nobody_decides_goes_on_with_the_first(page: Any, served: Served) -> None:
    ask(page, "One")
    page.get_by_role("button", name="Other answers").click()
    page.get_by_role("button", name="The first is better").wait_for()
    ask(page, "Two")
    page.get_by_role("button", name="The first is better").wait_for()
    asked = [[message.content for message in prompt.messages] for prompt in served.desk.engine.asked]
    assert asked == [["One"], ["One"], ["One", "Good. 好。", "Two"]]


def test_the_other_language(page: Any) -> None:
    page.get_by_role("button", name="中文").click()
    assert page.get_by_role("button", name="发送").is_visible()
    assert "训练此模型" in page.locator("#agreed").inner_text()
    assert page.evaluate("document.documentElement.lang") == "zh"


def test_the_token_does_not_stay_in_the_address(page: Any, served: Served) -> None:
    assert TOKEN not in page.url
    page.reload()  # and is known all the same
    page.get_by_text("tiny", exact=True).wait_for()


def test_without_a_token_it_says_so(browser: Any, served: Served) -> None:
    context = browser.new_context(locale="en-GB")
    page = context.new_page()
    page.goto(f"http://{served.host}/")
    told(page, "needs the address with the token")
    context.close()


def test_a_server_that_is_gone_is_told(page: Any, served: Served) -> None:
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "Hello?")
    told(page, "cannot be reached")
    assert page.locator("#words").input_value() == "Hello?"  # nothing that was written is lost
    page.faults.clear()  # the browser's own line about it

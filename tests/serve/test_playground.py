"""The playground in a real browser, against a server that says what it is told to."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from llmkit.serve.page import FOLDER, HEADERS, PATHS, page
from tests.serve.browser import DRIVER, Browser, browser
from tests.serve.scripted import ATTACK, WORDS, Scripted, running

needs_browser = pytest.mark.skipif(DRIVER is None, reason="no chromedriver: apt-get install chromium chromium-driver")
TEXTS = "return [...document.querySelectorAll('.assistant .text')].map((one) => one.textContent)"
IDLE = "return document.querySelector('#stop').disabled && document.querySelectorAll('#columns option').length > 0"


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as made:
        yield made


@pytest.fixture
def server() -> Iterator[Scripted]:
    made = Scripted()
    with running(made.app) as made.url:
        yield made
        made.go.set()


@pytest.fixture
def talk(window: Browser, server: Scripted) -> Browser:
    window.size(1200, 900)
    window.open(server.url + "/")
    window.until(IDLE)
    window.complaints()
    return window


def ask(window: Browser, text: str) -> None:
    window.type("#prompt", text)
    window.press("Enter")


def test_nothing_comes_from_elsewhere_and_no_markup_holds_code() -> None:
    for path, name in PATHS.items():
        content, kind = page(path) or (b"", "")
        text = content.decode()
        assert text == (FOLDER / name).read_text() and kind.split(";")[0] in (
            "text/html",
            "text/css",
            "text/javascript",
        )
        assert not re.search(r"https?:|//[a-z]|innerHTML|insertAdjacentHTML|document\.write|eval\(", text)
        if name.endswith(".html"):
            assert not re.search(r"\son\w+=|<style|style=|<script(?![^>]*src=)", text)
    assert {path.name for path in FOLDER.iterdir()} == set(PATHS.values())
    assert page("/playground/../page.py") is page("/playground/") is page("") is None
    assert "unsafe" not in HEADERS["content-security-policy"]


@needs_browser
def test_an_answer_is_shown_as_it_comes_and_stop_ends_it(talk: Browser, server: Scripted) -> None:
    ask(talk, "wait")
    talk.until(TEXTS + "[0] === 'first '")
    assert talk.js("return document.querySelector('#send').disabled")
    server.go.set()
    talk.until(TEXTS + "[0] === 'first second'")
    talk.until(IDLE)
    foot = talk.js("return document.querySelector('.assistant .foot:last-child').textContent")
    assert "stop" in foot and "2.00 tokens a step" in foot
    server.go.clear()
    for stop in (lambda: talk.click("#stop"), lambda: talk.press("Escape")):
        server.left.clear()
        ask(talk, "wait")
        talk.until(TEXTS + ".at(-1) === 'first '")
        stop()
        assert server.left.wait(10)
        talk.until(IDLE)
        assert talk.js(TEXTS)[-1] == "first "
    assert [one["content"] for one in server.asked[-1]["messages"]] == [
        "wait",
        "first second",
        "wait",
        "first ",
        "wait",
    ]


@needs_browser
def test_tokens_are_coloured_and_tell_what_else_they_could_have_been(talk: Browser, server: Scripted) -> None:
    talk.click("#colour")
    ask(talk, "colours")
    talk.until(IDLE)
    spans = "return [...document.querySelectorAll('.coloured .token')]"
    assert talk.js(spans + ".map((one) => [one.textContent, one.className])") == [
        [word, f"token p{shade}"] for word, shade in zip(WORDS, (4, 3, 1, 0), strict=True)
    ]
    grounds = talk.js(spans + ".map((one) => getComputedStyle(one).backgroundColor)")
    assert len(set(grounds)) == 4
    talk.hover(".token.p1")
    tip = "return document.querySelector('#tip').hidden ? '' : document.querySelector('#tip').innerText"
    assert talk.until(tip).split() == ["·rare", "10.0", "%", "<other>", "30.0", "%"]
    talk.js("document.querySelector('.assistant .text').focus()")
    talk.press("Right", "Right", "Right", "Right")
    talk.until("return document.querySelector('#told').textContent.startsWith('\\\\n<never> 0.1 %')")
    talk.click("#colour")
    assert talk.js("return document.querySelector('.coloured')") is None
    assert server.asked[0]["logprobs"] is True and server.asked[0]["top_logprobs"] == 5


@needs_browser
def test_two_models_answer_side_by_side_each_with_its_own_talk(talk: Browser, server: Scripted) -> None:
    talk.click("#compare")
    talk.until("return document.querySelectorAll('.model option').length === 6")
    groups = "return [...document.querySelectorAll('.model')[0].children].map((one) => one.label)"
    assert talk.js(groups) == ["Models", "Adapters"]
    talk.js("document.querySelectorAll('.model')[1].value = 'poet'")
    ask(talk, "who")
    talk.until(IDLE)
    said = "".join(WORDS)
    assert talk.js(TEXTS) == [f"{said} by small", f"{said} by poet"]
    talk.js("document.querySelectorAll('.model')[1].value = 'large'")  # what was said stays the other's
    names = talk.js("return [...document.querySelectorAll('.said .by')].map((one) => one.textContent)")
    assert names == ["You", "small", "You", "poet"]
    assert sorted(one["model"] for one in server.asked) == ["poet", "small"]
    left, right = talk.js(
        "return [...document.querySelectorAll('.column')].map((one) => one.getBoundingClientRect().x)"
    )
    assert left < right
    talk.size(390, 800)  # a phone
    boxes = talk.js("return [...document.querySelectorAll('.column')].map((one) => one.getBoundingClientRect().x)")
    assert boxes[0] == boxes[1]
    assert talk.js("return document.documentElement.scrollWidth <= innerWidth")


@needs_browser
def test_what_a_model_says_is_text_and_never_markup(talk: Browser) -> None:
    for text in ("attack", ATTACK, "think", "fail", "refuse", "break"):
        ask(talk, text)
        talk.until(IDLE)
    assert talk.js(TEXTS)[0] == ATTACK
    assert talk.js("return document.querySelectorAll('.said *:is(img, script, b, u, i)').length") == 0
    assert talk.js("return document.title") == "llmkit playground"
    feet = talk.js("return [...document.querySelectorAll('.assistant > .foot.bad')].map((one) => one.textContent)")
    assert [foot.split(" · ")[0] for foot in feet] == [
        "the engine <u>stopped</u>",
        "429: no <b>room</b>",
        "the stream broke off",
    ]
    assert talk.js("return document.querySelector('.thoughts').textContent") == "<i>hm</i>"
    assert not [line for line in talk.complaints() if "Content Security" in line or "Uncaught" in line]


@needs_browser
def test_settings_are_sent_as_they_are_set_and_empty_ones_are_not(talk: Browser, server: Scripted) -> None:
    talk.click("#settings summary")
    values = {"temperature": "0.5", "top_k": "40", "seed": "7", "stop": "a\nb", "logit_bias": '{"5": -1}'}
    for name, value in values.items():
        talk.type(f"#set-{name}", value)
    talk.type("#set-system", "Be brief.")
    talk.click("#set-ignore_eos")
    talk.type("#key", "sk-1")
    ask(talk, "how")
    talk.until("return document.querySelectorAll('.assistant').length === 1")
    talk.until(IDLE)
    got = server.asked[0]
    assert {key: got[key] for key in values} == {
        "temperature": 0.5, "top_k": 40, "seed": 7, "stop": ["a", "b"], "logit_bias": {"5": -1}
    }  # fmt: skip
    assert got["messages"][0] == {"role": "system", "content": "Be brief."} and got["ignore_eos"] is True
    assert not {"top_p", "min_p", "logprobs", "top_logprobs", "bad_words", "max_tokens"} & set(got)
    assert server.keys[-1] == "Bearer sk-1"
    assert talk.js("return [localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    talk.type("#set-top_p", "7")
    ask(talk, "wrong")
    assert "Top p" in talk.until("return document.querySelector('#trouble').textContent")
    assert len(server.asked) == 1


@needs_browser
def test_all_that_can_be_used_has_a_name_and_both_themes_read_well(talk: Browser) -> None:
    ask(talk, "hello")
    talk.until(IDLE)
    talk.click("#settings summary")
    unnamed = """return [...document.querySelectorAll('input, select, textarea, button')].filter((one) =>
        !(one.labels?.length || one.textContent.trim() || one.getAttribute('aria-label'))).map((one) => one.id)"""
    assert talk.js(unnamed) == []
    contrast = """
        const light = (text) => { const [r, g, b] = text.match(/[\\d.]+/g).map((v) => (v /= 255) <= 0.03928 ? v / 12.92
            : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        return ['body', '.user', '.assistant', '.foot', '#send', '.token'].map((css) => document.querySelector(css))
            .filter((one) => one).map((one) => { let ground = one;
                while (getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
                const [a, b] = [light(getComputedStyle(one).color), light(getComputedStyle(ground).backgroundColor)];
                return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); })"""
    grounds = set()
    for theme in ("light", "dark"):
        talk.js(
            f"const t = document.querySelector('#theme'); t.value = '{theme}'; t.dispatchEvent(new Event('change'))"
        )
        assert min(talk.js(contrast)) >= 4.5, theme  # WCAG AA
        grounds.add(talk.js("return getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2

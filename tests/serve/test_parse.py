"""Answers taken apart: what each format says, that no cut matters, that nothing crafted costs more than its length."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable

import pytest

from llmkit.core.errors import RecipeError
from llmkit.inference.said.events import CallArguments, CallBegins, CallEnds, Message, Said, merged, message
from llmkit.inference.said.formats import FORCED, THOUGHTS, TOOLS, Format, format_of
from llmkit.inference.said.parser import Parser, whole
from tests.serve.answers import CRAFTED, FORMATS, GOOD, NOW, OBJECT, OFFERED


def said(pieces: list[str], format: Format, begun: bool = False, eager: bool = False) -> list[Said]:
    parser = Parser(format, OFFERED, begun, eager)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return merged([*events, *parser.finish()])


def cut(text: str, rng: random.Random) -> list[str]:
    """`text` in pieces, some of them empty; most of a few letters."""
    pieces, at = [], 0
    while at < len(text):
        size = rng.choice((0, 1, 1, 2, 3, 5, 8, 40))
        pieces.append(text[at : at + size])
        at += size
    return pieces


@pytest.mark.parametrize("name", sorted(GOOD))
def test_calls_are_found_with_their_arguments(name: str) -> None:
    got = whole(GOOD[name], FORMATS[name], OFFERED)
    assert [one.name for one in got.calls] == ["get_weather", "now"]
    city = "Zürich <b> & co" if name in ("qwen3_coder", "glm", "minimax") else 'Zürich \U0001f600 "x"'
    assert [json.loads(one.arguments) for one in got.calls] == [{"city": city, "days": 3}, {}]
    assert got.text == ("" if name in ("llama3", "pythonic", "forced") else "Let me look.")
    assert got.reasoning == ("I need the weather." if name == "harmony" else "")


def rechunked(name: str, times: int) -> None:
    rng, format = random.Random(name), FORMATS[name]
    texts = [GOOD[name], *CRAFTED] if name in GOOD else CRAFTED
    ways = [(begun, eager) for begun in (False, True) for eager in (False, True)]
    known = {}
    for at in range(times):
        text, (begun, eager) = texts[rng.randrange(len(texts))], ways[rng.randrange(4)]
        if rng.random() < 0.3:  # and one that breaks off, or goes on
            text = text[: rng.randrange(len(text) + 1)] + rng.choice(["", GOOD.get(name, ""), CRAFTED[at % 7]])
        key = (text, begun, eager)
        one = known.get(key) or known.setdefault(key, said([text], format, begun, eager))
        assert said(cut(text, rng), format, begun, eager) == one, (text, begun, eager)
        checked(one, eager)


def checked(events: list[Said], eager: bool) -> None:
    """What holds of every answer: calls in order, of tools that were offered, whole ones with a JSON object."""
    got = message(events)
    begins = [event for event in events if isinstance(event, CallBegins)]
    ends = [event for event in events if isinstance(event, CallEnds)]
    assert [event.index for event in begins] == [event.index for event in ends] == list(range(len(got.calls)))
    for call in got.calls:
        assert call.name in OFFERED and (call.whole or eager)
        assert not call.whole or isinstance(json.loads(call.arguments), dict)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_no_cut_matters(name: str) -> None:
    rechunked(name, 150)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_ten_thousand_cuts_do_not_matter(name: str) -> None:
    rechunked(name, 10_000)


@pytest.mark.parametrize(
    "name", ["hermes", "qwen3_coder", "glm", "mistral", "llama3", "pythonic", "harmony", "deepseek"]
)
def test_what_is_no_call_stays_the_text_that_it_was(name: str) -> None:
    """With tools that are not offered: all of a text comes back but for the space around thoughts."""
    texts = [text for text in CRAFTED if "<think>" not in text and "<|" not in text and "｜" not in text]
    for text in (*texts, GOOD["hermes"], GOOD["mistral"], GOOD["pythonic"]):
        got = Parser(FORMATS[name], {"other": {}})
        events = [*got.feed(text), *got.finish()]
        assert message(events) == Message(text, "", ())


def test_thoughts_are_told_apart_and_may_have_begun_in_the_prompt() -> None:
    format = format_of("{{ '<think>' }} </think> <tool_call>")
    assert whole("<think>\nhm\n</think>\n\nyes", format) == Message("yes", "hm", ())
    assert whole("hm <tool_call> \n</think>\n\nyes", format, begun=True) == Message("yes", "hm <tool_call>", ())
    assert whole("no <think>hm</think>", format) == Message("no <think>hm</think>", "", ())
    assert whole("hm", format, begun=True) == Message("", "hm", ())
    assert format.begun("<|im_start|>assistant\n<think>\n") and not format.begun("<think>\n\n</think>\n\n")


def test_without_tools_marks_are_text() -> None:
    assert whole(GOOD["hermes"], FORMATS["hermes"]).text == GOOD["hermes"]
    harmony = whole("<|channel|>final<|message|>done<|return|>", FORMATS["harmony"])
    assert harmony == Message("done", "", ())


def test_arguments_are_told_as_they_come_where_a_grammar_holds_them() -> None:
    parser = Parser(Format(FORCED), OFFERED, eager=True)
    events = [parser.feed(c) for c in f"[{OBJECT}, {NOW}]"]
    before = [event for some in events[: len(OBJECT) - 3] for event in some]
    assert CallBegins(0, "get_weather") in before
    assert sum(isinstance(event, CallArguments) for event in before) > 40
    cut_off = [*Parser(Format(FORCED), OFFERED, eager=True).feed(f"[{OBJECT[:60]}")]
    assert cut_off[0] == CallBegins(0, "get_weather")
    broken = Parser(Format(FORCED), OFFERED, eager=True)
    got = message([*broken.feed(f"[{OBJECT[:60]}"), *broken.finish()])
    assert got.calls[0].whole is False and got.text == ""
    held = Parser(Format(FORCED), OFFERED)
    assert held.feed(f"[{OBJECT[:60]}") == []
    assert message(held.finish()) == Message(f"[{OBJECT[:60]}", "", ())


def test_values_of_tags_are_what_the_schema_says() -> None:
    kinds = {"a": "string", "b": "number", "c": "boolean", "d": "object", "e": ["string", "null"], "f": "integer"}
    schema = {"properties": {key: {"type": kind} for key, kind in kinds.items()} | {"g": {"anyOf": [{"type": "null"}]}}}
    values = {"a": "3", "b": "3", "c": "True", "d": '{"x": [1]}', "e": "null", "f": "three", "g": "None", "h": "no\n1"}
    tags = "".join(f"<parameter={key}>\n{value}\n</parameter>" for key, value in values.items())
    got = whole(f"<tool_call><function=f>{tags}</function></tool_call>", FORMATS["qwen3_coder"], {"f": schema})
    made = {"a": "3", "b": 3, "c": True, "d": {"x": [1]}, "e": None, "f": "three", "g": None, "h": "no\n1"}
    assert json.loads(got.calls[0].arguments) == made


HALVES = {
    "pythonic": r"""[now(a="\ud800", b={"\udfff": 1}, c="\ud83d\ude00")]""",
    "hermes": r"""<tool_call>{"name": "now", "arguments": "{\"a\": \"\ud800\", \"b\": {\"\udfff\": 1}, """
    r"""\"c\": \"\ud83d\ude00\"}"}</tool_call>""",
}


@pytest.mark.parametrize("name", sorted(HALVES))
def test_half_a_surrogate_pair_in_arguments_can_be_sent(name: str) -> None:
    (call,) = whole(HALVES[name], FORMATS[name], OFFERED).calls
    assert call.arguments.encode()
    made = json.loads(call.arguments)
    assert made == {"a": "\ud800", "b": {"\udfff": 1}, "c": "\U0001f600"}


SIGNS = {
    "hermes": "<tool_call></tool_call> within XML tags",
    "qwen3_coder": "<tool_call>\n<function=example>",
    "glm": "<tool_call>{function-name}\n<arg_key>",
    "mistral": "{{ '[TOOL_CALLS] [' }}",
    "deepseek": "<｜tool▁calls▁begin｜>",
    "llama3": '{"name": function name, "parameters": dictionary}',
    "pythonic": "[func_name1(params_name1=params_value1)]",
    "harmony": "<|start|>assistant<|channel|>",
    "none": "{% for m in messages %}",
}


def test_the_format_is_that_of_the_template_or_the_one_that_is_named() -> None:
    for name, text in SIGNS.items():
        assert format_of(text).calls is TOOLS[name], name
    assert format_of("", "hermes", "mistral") == Format(TOOLS["hermes"], THOUGHTS["mistral"])
    with pytest.raises(RecipeError, match=r"tool_format: herms is no format; fix: use auto or one of harmony"):
        format_of("", "herms")


def test_marks_hold_their_first_letter_once_and_begin_no_other() -> None:
    """What reading without going back rests on."""
    for calls in TOOLS.values():
        words = [*calls.marks, *calls.frames, "<think>", "</think>"]
        for word in words:
            assert word[0] not in word[1:]
            assert not any(other != word and other.startswith(word) for other in words)


PARTS = [
    *('<tool_call>{"name": "now", "arguments": {"a": "', "<tool_call><function=now><parameter=a>", "[TOOL_CALLS]["),
    *("<function=now>", '<tool_call>{"', "<tool_call>", "<|channel|>", " ", "[now(a='", "[now(a=[", "<"),
    *('{"name":"now",', "<think>", '\\"', "<tool_call>" + NOW, "now<｜tool▁sep｜>", '<tool_call>{"name":"'),
]


def crafted(size: int) -> list[str]:
    """Long answers that would make a reader that goes back, or looks ahead, take the square of their length."""
    return [part * (size // len(part)) for part in PARTS]


class Counted:
    def __init__(self, read: Callable[[int], str]) -> None:
        self.inner, self.count = read, 0

    def read(self, count: int = 1) -> str:
        taken = self.inner(count)
        self.count += len(taken)
        return taken


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_time_grows_as_the_length_of_a_crafted_answer(name: str) -> None:
    """The work is counted in characters that are read: each at most once."""
    for text in crafted(4000):
        parser = Parser(FORMATS[name], OFFERED)
        counted = Counted(parser.src.read)
        parser.src.read = counted.read  # type: ignore[method-assign]
        for at in range(0, len(text), 7):
            parser.feed(text[at : at + 7])
        parser.finish()
        assert counted.count == len(text)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_huge_crafted_answer_ends(name: str) -> None:
    for text in crafted(100_000):
        began = time.monotonic()
        parser = Parser(FORMATS[name], OFFERED)
        for at in range(0, len(text), 5):
            parser.feed(text[at : at + 5])
        parser.finish()
        assert time.monotonic() - began < 60  # a square of the length would take hours

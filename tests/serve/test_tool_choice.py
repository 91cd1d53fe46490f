"""Tools of a request, and what an answer is held to where one must be called."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import pytest

from llmkit.inference.request import RequestError
from llmkit.inference.said.choice import Chosen, chosen
from llmkit.inference.said.events import message
from llmkit.inference.said.formats import TOOLS, Format

TREE = {"type": "object", "properties": {"v": {"type": "integer"}, "n": {"$ref": "#/$defs/T"}}, "required": ["v"]}
WALK = {"type": "object", "properties": {"x": {"$ref": "#/$defs/T"}}, "required": ["x"], "$defs": {"T": TREE}}
GIVEN = [
    {"type": "function", "function": {"name": "walk", "description": "a walk", "parameters": WALK, "strict": True}},
    {"type": "function", "function": {"name": "now"}},
]
WALKED = '{"name": "walk", "arguments": {"x": {"v": 1, "n": {"v": 2}}}}'
NOW = '{"name": "now", "arguments": {}}'
ONE = {"type": "function", "function": {"name": "now"}}


def allows(chosen: Chosen, text: str) -> bool:
    tokens = llguidance.LLTokenizer("byte")
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(chosen.schema))
    matcher = llguidance.LLMatcher(tokens, grammar)
    ids = list(text.encode())
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def test_auto_and_none_hold_an_answer_to_nothing() -> None:
    assert chosen(GIVEN).schema is None and list(chosen(GIVEN, "auto").tools) == ["walk", "now"]
    assert chosen(GIVEN, "none") == chosen(None) == chosen([]) == Chosen()


def test_required_is_a_list_of_calls_that_follow_their_schemas() -> None:
    required = chosen(GIVEN, "required")
    assert allows(required, f"[{WALKED}, {NOW}]") and allows(required, f"[{NOW}]")
    for wrong in ("[]", NOW, '[{"name": "rm", "arguments": {}}]', f"[{WALKED.replace('2', 'null')}]"):
        assert not allows(required, wrong)
    assert not allows(chosen(GIVEN, "required", parallel=False), f"[{NOW}, {NOW}]")


def test_a_choice_with_more_in_it_than_a_name_is_refused() -> None:
    for more in ({**ONE, "strict": True}, {**ONE, "function": {"name": "now", "arguments": {}}}):
        with pytest.raises(RequestError, match="is no choice of tools"):
            chosen(GIVEN, more)


def test_a_named_tool_is_the_only_one() -> None:
    named = chosen(GIVEN, ONE)
    assert list(named.tools) == ["now"]
    assert allows(named, f"[{NOW}]") and not allows(named, f"[{WALKED}]") and not allows(named, f"[{NOW}, {NOW}]")


def test_the_parser_reads_what_the_grammar_allows() -> None:
    parser = chosen(GIVEN, "required").parser(Format(TOOLS["hermes"]))
    got = message([*parser.feed(f"[{WALKED}, {NOW}]"), *parser.finish()])
    assert [one.name for one in got.calls] == ["walk", "now"]
    assert json.loads(got.calls[0].arguments) == {"x": {"v": 1, "n": {"v": 2}}}
    parser = chosen(GIVEN).parser(Format(TOOLS["hermes"]))
    assert [one.name for one in message(parser.feed(f"<tool_call>{NOW}")).calls] == ["now"]


def changed(**function: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "f"} | function}]


DEEP: dict[str, Any] = {}
for _ in range(300):
    DEEP = {"not": DEEP}


@pytest.mark.parametrize(
    ("tools", "choice", "key"),
    [
        ({}, None, "tools"),
        ([GIVEN[1]] * 129, None, "tools"),
        ([1], None, "tools[0]"),
        ([GIVEN[1], GIVEN[1]], None, "tools[1]"),
        (changed(name="a b"), None, "tools[0].function.name"),
        (changed(parameters=[]), None, "tools[0].function.parameters"),
        (changed(parameters={"type": "array"}), None, "tools[0].function.parameters"),
        (changed(code="x"), None, "tools[0].function.code"),
        (changed(parameters={"properties": {"a": DEEP}}), "required", "tools"),
        (None, "required", "tool_choice"),
        (GIVEN, "any", "tool_choice"),
        (GIVEN, {"type": "function", "function": {"name": "rm"}}, "tool_choice"),
        (GIVEN, {"type": "function", "function": 1}, "tool_choice"),
    ],
)
def test_what_cannot_be_offered_is_refused_by_its_field(tools: Any, choice: Any, key: str) -> None:
    with pytest.raises(RequestError) as refused:
        chosen(tools, choice)
    assert refused.value.problems[0].key == key

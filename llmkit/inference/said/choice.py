"""The tools of a request, which of them may or must be called, and the grammar that holds an answer to that."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmkit.inference.request import RequestError
from llmkit.inference.said.formats import FORCED, Format
from llmkit.inference.said.parser import Parser

NAME = re.compile(r"[A-Za-z0-9_.\-]{1,128}")
MOST = 128
"""Tools of one request."""
DEEPEST = 200
DATA = ("const", "enum", "default", "examples")
"""Keywords whose values are no schemas."""
KEYS = {"name", "description", "parameters", "strict"}


@dataclass(frozen=True)
class Chosen:
    """What a request may call."""

    tools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By name, the JSON schemas of the arguments; none where nothing may be called."""
    schema: Mapping[str, Any] | None = None
    """The JSON schema that the whole answer must follow, where a call is required."""

    def parser(self, format: Format, begun: bool = False) -> Parser:
        """What takes the answer apart."""
        if self.schema is not None:
            return Parser(Format(FORCED), self.tools, eager=True)
        return Parser(format, self.tools, begun, eager=True)


def chosen(tools: Any, choice: Any = None, parallel: bool = True) -> Chosen:
    """Reads `tools`, `tool_choice` (auto, none, required, or a function by name) and `parallel_tool_calls`.

    Raises:
        RequestError: they are not what OpenAI's interface has, or contradict each other.
    """
    known = offered(tools)
    if choice is None:
        choice = "auto"
    if not known and choice not in ("auto", "none"):
        raise RequestError("there are no tools to choose of", fix="give tools, or leave it out", key="tool_choice")
    if choice == "none":
        return Chosen()
    if choice == "auto":
        return Chosen(known)
    if choice == "required":
        return Chosen(known, required(known, parallel))
    name = _named(choice)
    if name not in known:
        raise RequestError(f"no tool is called {name}", fix=f"use one of {', '.join(known)}", key="tool_choice")
    only = {name: known[name]}
    return Chosen(only, required(only, parallel=False))


def offered(tools: Any) -> dict[str, Mapping[str, Any]]:
    """The schemas of the arguments of OpenAI's list of tools, by name."""
    if tools is None:
        return {}
    if not isinstance(tools, list) or len(tools) > MOST:
        raise RequestError(f"is no list of up to {MOST} tools", fix="give a list of functions", key="tools")
    known: dict[str, Mapping[str, Any]] = {}
    for at, tool in enumerate(tools):
        name, schema = _function(tool, f"tools[{at}]")
        if name in known:
            raise RequestError(f"{name} is there twice", fix="give each a name of its own", key=f"tools[{at}]")
        known[name] = schema
    return known


def required(tools: Mapping[str, Mapping[str, Any]], parallel: bool) -> dict[str, Any]:
    """The schema of a list of calls, `[{"name": ..., "arguments": {...}}]`; of one call where not `parallel`."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{name}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name in tools
    ]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not parallel:
        schema["maxItems"] = 1
    schema["$defs"] = {name: _moved(one, f"#/$defs/{name}") for name, one in tools.items()}
    return schema


def _function(tool: Any, key: str) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        raise RequestError("is no function", fix='write {"type": "function", "function": {...}}', key=key)
    said = tool["function"]
    if unknown := sorted((set(tool) - {"type", "function"}) | (set(said) - KEYS)):
        raise RequestError(f"{unknown[0]} is not known", fix="leave it out", key=f"{key}.function.{unknown[0]}")
    name, schema = said.get("name"), said.get("parameters")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        fix = "use up to 128 of letters, digits, _, - and ."
        raise RequestError("is no name of a function", fix=fix, key=f"{key}.function.name")
    if schema is None:
        schema = {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise RequestError("is no schema of an object", fix='give "type": "object"', key=f"{key}.function.parameters")
    return name, schema


def _named(choice: Any) -> str:
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) and len(function) == 1 else None
    if not isinstance(name, str) or len(choice) > 2:
        fix = 'use auto, none, required or {"type": "function", "function": {"name": ...}}'
        raise RequestError("is no choice of tools", fix=fix, key="tool_choice")
    return name


def _moved(schema: Mapping[str, Any], to: str) -> dict[str, Any]:
    """A schema that has come to stand at `to` in another: what it refers to in itself has moved with it."""
    moved = _rewritten({key: value for key, value in schema.items() if key not in ("$schema", "$id")}, to, 0)
    moved.setdefault("type", "object")
    return dict(moved)


def _rewritten(value: Any, to: str, depth: int) -> Any:
    if depth > DEEPEST:
        raise RequestError(f"a schema is more than {DEEPEST} deep", fix="give a flatter one", key="tools")
    if isinstance(value, list):
        return [_rewritten(one, to, depth + 1) for one in value]
    if not isinstance(value, dict):
        return value
    return {key: _member(key, one, to, depth) for key, one in value.items()}


def _member(key: str, value: Any, to: str, depth: int) -> Any:
    if key == "$ref" and isinstance(value, str) and value.startswith("#"):
        return to + value[1:]
    return value if key in DATA else _rewritten(value, to, depth + 1)

"""What an answer must look like: OpenAI's `response_format`, and vLLM's `structured_outputs`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.core.errors import LlmkitError
from llmkit.inference.grammar import Choice, Grammar, JsonObject, JsonSchema, Lark, Regex
from llmkit.serve.fields import Fields, wrong
from llmkit.serve.refusal import problem

KEYS = {"json": "grammar.schema", "regex": "grammar.pattern", "choice": "grammar.choices", "grammar": "grammar.grammar"}
"""Of `structured_outputs` -> what the grammar calls them."""


def form(fields: Fields, schema: Mapping[str, Any] | None = None) -> Grammar | None:
    """The grammar that is asked for; `schema` is what a required call of a tool must follow.

    Raises:
        Refusal: there is no such form, two are asked for, or one cannot be enforced.
    """
    format, outputs = fields.object("response_format"), fields.object("structured_outputs")
    asked = [_formatted(format) if format else None, _structured(outputs) if outputs else None]
    found = [one for one in asked if one is not None]
    if len(found) + (schema is not None) > 1:
        name = fields.name("response_format" if asked[0] is not None else "structured_outputs")
        raise wrong(name, "there is another form that the answer must have")
    if schema is not None:
        return JsonSchema(schema=json.dumps(schema))
    return found[0] if found else None


def field_of(fields: Fields, schema: Mapping[str, Any] | None = None) -> str:
    """The field that asks for a form, as `form` finds it."""
    if schema is not None:
        return "tools"
    return "structured_outputs" if fields.get("structured_outputs") is not None else "response_format"


def _formatted(format: Fields) -> Grammar | None:
    kind = format.choice("type", "", ("text", "json_object", "json_schema"))
    held = format.object("json_schema") if kind == "json_schema" else None
    schema = format.object("schema") if kind == "json_object" else None
    format.end()
    if schema is not None:  # not OpenAI's, but several servers know it
        return _checked(JsonSchema(schema=json.dumps(schema.held)), "grammar.schema", schema.at)
    if kind == "json_object":
        return JsonObject()
    if kind == "text":
        return None
    if held is None or held.get("schema") is None:
        raise wrong(format.name("json_schema.schema"), "is missing")
    for known in ("name", "strict", "description"):
        held.get(known)
    held.end()
    return _checked(JsonSchema(schema=json.dumps(held.get("schema"))), "grammar.schema", held.name("schema"))


def _structured(outputs: Fields) -> Grammar | None:
    given = [key for key in KEYS if outputs.get(key) is not None]
    outputs.end()
    if len(given) > 1:
        raise wrong(outputs.at, f"{' and '.join(given)} are more than one form")
    if not given:
        return None
    key, name = given[0], outputs.name(given[0])
    try:
        return _checked(_named(outputs, key), KEYS[key], name)
    except LlmkitError as cause:
        raise wrong(name, cause.problems[0].what) from cause


def _named(outputs: Fields, key: str) -> Grammar:
    if key == "json":
        value = outputs.get(key)
        return JsonSchema(schema=value if isinstance(value, str) else json.dumps(value))
    if key == "choice":
        return Choice(choices=outputs.texts(key, 1024))
    return Regex(pattern=outputs.text(key)) if key == "regex" else Lark(grammar=outputs.text(key))


def _checked(grammar: Grammar, own: str, name: str) -> Grammar:
    """A grammar, none of whose keywords is refused; `own` is what it calls the field that the client calls `name`."""
    try:
        grammar.source()
    except LlmkitError as cause:
        said = cause.problems[0]
        raise problem(replace(said, key=(said.key or own).replace(own, name, 1))) from cause
    return grammar

"""JSON Schema of those parts of a request that a route takes apart by itself."""

from __future__ import annotations

from typing import Any

from llmkit.inference.speculation.most import MOST

Schema = dict[str, Any]
MOST_MESSAGES = 4096
MOST_TOOLS = 128
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
PARTS = ("text", "input_text", "output_text", "refusal")
"""Kinds of parts of a message that hold a text."""


def listed(one: Schema, most: int | None = None, least: int = 0) -> Schema:
    """A list of such."""
    made: Schema = {"type": "array", "items": one}
    made |= {} if most is None else {"maxItems": most}
    return made | {"minItems": least} if least else made


def closed(required: tuple[str, ...] = (), /, **held: Schema) -> Schema:
    """An object of these fields and no others."""
    made: Schema = {"type": "object", "properties": held, "additionalProperties": False}
    return made | {"required": list(required)} if required else made


STRING: Schema = {"type": "string"}
ANY: Schema = {}
OBJECT: Schema = {"type": "object"}
TOKEN: Schema = {"type": "integer", "minimum": 0}
BIAS: Schema = {
    "type": "object",
    "maxProperties": 1024,
    "propertyNames": {"pattern": "^[0-9]{1,11}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
FUNCTION = closed(
    ("name",),
    name={"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,128}$"},
    description=ANY,
    parameters={"type": ["object", "null"], "properties": {"type": {"const": "object"}}},
    strict=ANY,
)
TOOLS = listed(closed(("type", "function"), type={"const": "function"}, function=FUNCTION), MOST_TOOLS)
NAMED = closed(("type", "function"), type={"const": "function"}, function=closed(("name",), name=STRING))
TOOL_CHOICE: Schema = {"anyOf": [{"type": "string", "enum": ["auto", "none", "required"]}, NAMED]}
NEEDED: Schema = {"description": "a JSON Schema; a keyword that cannot be enforced is refused", "type": "object"}
FORMAT: Schema = {
    "anyOf": [
        closed(("type",), type={"enum": ["text", "json_object"]}),
        closed(("type", "schema"), type={"const": "json_object"}, schema=NEEDED),
        closed(
            ("type", "json_schema"),
            type={"const": "json_schema"},
            json_schema=closed(("schema",), schema=NEEDED, name=ANY, strict=ANY, description=ANY),
        ),
    ]
}
STRUCTURED: Schema = {
    "anyOf": [
        closed(),
        closed(("json",), json={"anyOf": [OBJECT, STRING]}),
        closed(("regex",), regex=STRING),
        closed(("choice",), choice=listed(STRING | {"minLength": 1}, 1024, 1)),
        closed(("grammar",), grammar=STRING),
    ]
}
SPECULATION: Schema = {
    "description": "false: no drafts are looked at; tokens: so many at most",
    "anyOf": [{"type": "boolean"}, closed(tokens={"type": "integer", "minimum": 0, "maximum": MOST})],
}
METADATA: Schema = {"description": "of it `category`, a text, is what the answer is counted by in /metrics"}
PROMPT: Schema = {
    "anyOf": [
        STRING,
        listed(TOKEN, least=1),
        listed({"anyOf": [STRING, listed(TOKEN, least=1)]}, least=1),
    ]
}
PART = closed(type={"enum": list(PARTS)}, text=STRING, annotations=ANY, logprobs=ANY, refusal=ANY)
CONTENT: Schema = {"anyOf": [STRING, listed(PART)]}
PREDICTION = closed(("content",), type={"const": "content"}, content=CONTENT)
"""What the answer may repeat, as OpenAI has it."""
CALLS = listed(
    closed(
        ("function",),
        id=STRING,
        type={"const": "function"},
        index=ANY,
        function=closed(name=STRING, arguments=STRING),
    ),
    128,
)
ITEM: Schema = {
    "anyOf": [
        closed(
            ("role", "content"),
            type={"const": "message"},
            role={"type": "string", "enum": list(ROLES)},
            content=CONTENT,
            id=ANY,
            status=ANY,
            phase=ANY,
        ),
        closed(
            ("type", "name", "arguments", "call_id"),
            type={"const": "function_call"},
            name=STRING,
            arguments=STRING,
            call_id=STRING,
            id=ANY,
            status=ANY,
            phase=ANY,
        ),
        closed(("type", "call_id"), type={"const": "function_call_output"}, call_id=STRING, output=ANY, id=ANY),
        {"type": "object", "properties": {"type": {"const": "reasoning"}}, "required": ["type"]},
    ]
}
INPUT: Schema = {"anyOf": [STRING, listed(ITEM, least=1)]}
FLAT_TOOLS = listed(FUNCTION | {"properties": FUNCTION["properties"] | {"type": {"const": "function"}}}, MOST_TOOLS)
"""Tools of `/v1/responses`: functions without a level of their own."""
FLAT_CHOICE: Schema = {
    "anyOf": [*TOOL_CHOICE["anyOf"], closed(("type", "name"), type={"const": "function"}, name=STRING)]
}
FLAT_FORMAT = closed(
    verbosity=ANY,
    format={
        "anyOf": [
            closed(type={"enum": ["text", "json_object"]}),
            closed(
                ("type", "schema"),
                type={"const": "json_schema"},
                schema=NEEDED,
                name=ANY,
                strict=ANY,
                description=ANY,
            ),
        ]
    },
)

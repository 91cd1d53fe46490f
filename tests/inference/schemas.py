"""JSON schemas of the kinds that people send: tools, extraction, configuration, forms, trees."""

from __future__ import annotations

from itertools import product
from typing import Any

S, W, N, B = ({"type": name} for name in ("string", "integer", "number", "boolean"))
SHORT = {"type": "string", "maxLength": 6}


def record(required: bool = True, closed: bool = True, **fields: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "object", "properties": fields}
    made |= {"required": list(fields)} if required else {}
    return made | ({"additionalProperties": False} if closed else {})


def array(items: Any, least: int = 0, most: int = 3, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most, **more}


PLAIN: list[Any] = [
    *(S | {"maxLength": 8}, S | {"minLength": 2, "maxLength": 3}, S | {"pattern": "^[a-c]{2,5}$"}),
    *(S | {"pattern": "^(red|green|blue)$"}, S | {"pattern": "[0-9]{3}", "maxLength": 12}),
    *(S | {"format": name} for name in ("date", "date-time", "ipv4", "uuid", "email")),
    *(
        W | {"minimum": 0, "maximum": 9},
        W | {"minimum": -120, "maximum": -7},
        W | {"exclusiveMinimum": 3, "maximum": 5},
    ),
    *(W | {"multipleOf": 5, "minimum": 0, "maximum": 400}, N | {"minimum": 0, "maximum": 1}),
    *(N | {"exclusiveMinimum": 1.5, "exclusiveMaximum": 2.25}, N | {"minimum": -3.5, "maximum": 1000}),
    *(
        B,
        {"type": "null"},
        {"const": 5},
        {"const": {"a": [1, None]}},
        {"const": 'x"y\n'},
        {"enum": [1, "1", None, [2]]},
    ),
    *({"type": ["integer", "null"], "minimum": 0, "maximum": 99}, {"type": ["boolean", "string"], "maxLength": 3}),
    *({"enum": ["ä", "日本", "😀"]}, {"enum": [0.5, 1e3, -2]}, {"type": "string", "enum": ["a", "b"]}),
    {"enum": [1, 2, 3, "two"], "type": "integer"},
    *(array(W | {"minimum": 0, "maximum": 5}), array(B, 2, 2), array(SHORT, 1, 2), array({"enum": ["a", "b"]}, 0, 4)),
    *(array(array(B, 1, 2), 1, 2), array(record(a=B), 1, 2), array({"anyOf": [B, {"type": "null"}]}, 1, 4)),
    {"type": "array", "prefixItems": [B, {"const": 1}], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [B], "items": W | {"minimum": 0, "maximum": 3}, "minItems": 1, "maxItems": 3},
    {"type": "array", "items": False},
    {"type": "array", "items": B, "maxItems": 0},
]
OBJECTS: list[Any] = [
    *(record(), record(a=B), record(a=B, b=W | {"minimum": 0, "maximum": 9}), record(False, a=B, b=B, c=B)),
    record(name=SHORT, age=W | {"minimum": 0, "maximum": 120}, email={"anyOf": [SHORT, {"type": "null"}]}),
    record(a=record(b=record(c=record(d=B)))),
    record(**{"key with space": B, 'quo"te': B, "ünïcode": B, "": B}),
    {"type": "object", "properties": {"a": B, "b": B}, "required": ["b"], "additionalProperties": False},
    {"type": "object", "additionalProperties": B, "maxProperties": 2},
    {
        "type": "object",
        "additionalProperties": W | {"minimum": 0, "maximum": 3},
        "minProperties": 1,
        "maxProperties": 2,
    },
    {"type": "object", "patternProperties": {"^[ab]$": B}, "additionalProperties": False},
    {"type": "object", "properties": {"kind": {"const": "x"}}, "required": ["kind"], "additionalProperties": SHORT},
    {"anyOf": [record(kind={"const": "a"}, n=B), record(kind={"const": "b"}, s=SHORT)]},
    {"oneOf": [record(kind={"const": "a"}, n=B), record(kind={"const": "b"}, s=SHORT)]},
    {"oneOf": [B, {"type": "null"}, SHORT]},
    {"allOf": [W, {"minimum": 3}, {"maximum": 6}]},
    {"allOf": [record(True, False, a=B), record(True, False, b=B)], "additionalProperties": True, "maxProperties": 3},
    {"$ref": "#/$defs/p", "$defs": {"p": record(x=B, y=B)}},
    {"$defs": {"n": record(False, v=B, next={"$ref": "#/$defs/n"})}, "$ref": "#/$defs/n"},
    {"definitions": {"t": record(v=B, kids=array({"$ref": "#/definitions/t"}, 0, 1))}, "$ref": "#/definitions/t"},
    record(False, left={"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
    record(point=array(N | {"minimum": -1, "maximum": 1}, 2, 2), tags=array({"enum": ["a", "b", "c"]}, 0, 2)),
    record(
        tool={"enum": ["search", "write"]},
        arguments=record(False, query=SHORT, limit=W | {"minimum": 1, "maximum": 50}),
    ),
    {
        "type": "object",
        "required": ["z"],
        "properties": {"z": B},
        "title": "Z",
        "description": "d",
        "examples": [{"z": 1}],
    },
    record(id=S | {"format": "uuid"}, at=S | {"format": "date-time"}),
    record(on=B, off=B)
    | {"$schema": "https://json-schema.org/draft/2020-12/schema", "$comment": "c", "x-origin": "us"},
]


def mixed() -> list[Any]:
    """All pairs of some fields, in objects and arrays."""
    fields = [
        B,
        W | {"minimum": 0, "maximum": 20},
        SHORT,
        {"enum": ["on", "off", None]},
        array(B, 0, 2),
        record(False, q=B),
    ]
    made: list[Any] = [
        record(required, a=one, b=other)
        for (one, other), required in product(product(fields, fields[:4]), (True, False))
    ]
    return made + [array({"anyOf": [one, other]}, 1, 2) for one, other in product(fields[:3], fields[3:])]


ALL = PLAIN + OBJECTS + mixed()
REFUSED: dict[str, Any] = {
    "not": {"not": S},
    "if": {"if": B, "then": B},
    "uniqueItems": array(B, uniqueItems=True),
    "contains": array(B, contains={"const": True}),
    "dependentRequired": record() | {"dependentRequired": {"a": ["b"]}},
    "propertyNames": record() | {"propertyNames": {"pattern": "a"}},
    "unevaluatedProperties": record() | {"unevaluatedProperties": False},
    "dependentSchemas": record() | {"dependentSchemas": {"a": {}}},
    "$dynamicRef": {"$dynamicRef": "#x"},
    "contentEncoding": S | {"contentEncoding": "base64"},
    "nullable": S | {"nullable": True},
    "discriminator": {"anyOf": [S], "discriminator": {"propertyName": "a"}},
    "x-guidance": {"x-guidance": {"lenient": True}, "type": "string"},
    "misspelt": {"minlength": 3},
    "oneOf": {"oneOf": [W, N]},
    "format": S | {"format": "zip-code"},
    "type": {"type": "text"},
    "look-around": S | {"pattern": "^(?=a)b"},
    "http://x.y/z.json": {"$ref": "http://x.y/z.json"},
}
"""What cannot be enforced -> a schema that asks for it."""

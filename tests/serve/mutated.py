"""Requests that were good and are changed by chance: one number makes one case, the same each time."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass, field
from typing import Any

from tests.serve.samples import ADMIN, CHAT, GETS, GOOD, TEXT


@dataclass(frozen=True)
class Raw:
    """Letters that stand in a body as they are."""

    text: str


@dataclass(frozen=True)
class Twice:
    """An object with a key that is there twice."""

    held: dict[str, Any]
    key: str


@dataclass
class Case:
    path: str
    body: bytes = b""
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    admin: bool = False

    def wire(self) -> bytes:
        lines = [f"{self.method} {self.path} HTTP/1.1", "Host: localhost", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        lines += [f"Content-Length: {len(self.body)}"] if self.body or self.method == "POST" else []
        return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + self.body


def written(value: Any) -> str:
    """JSON that need not be sound."""
    match value:
        case Raw():
            return value.text
        case Twice():
            pairs = [*value.held.items(), (value.key, value.held[value.key])]
            return "{" + ",".join(f"{json.dumps(key)}:{written(one)}" for key, one in pairs) + "}"
        case dict():
            return "{" + ",".join(f"{json.dumps(key)}:{written(one)}" for key, one in value.items()) + "}"
        case list():
            return "[" + ",".join(map(written, value)) + "]"
        case _:
            return json.dumps(value)


NUMBERS = [
    *(0, -0.0, 1, -1, 2, 3, 0.5, 1e-320, 1e308, -1e308, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63),
    *(-(2**31) - 1, -(2**63), -(2**63) - 1, 2**64, 10**40, 1.5, 447, 448, 511, 512, 513),
    *map(Raw, ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1E400", "1e-999", "-0", "01", "+1", ".5", "1.")),
    *map(Raw, ("9" * 400, "9" * 5000, "0." + "3" * 4000, "1e" + "9" * 50, "0x10", "1_000")),
]
TEXTS = [
    *("", " ", "\x00", "a\x00b", "\ud800", "\udfff", "\ud83d\ude00", "\ufeff", "\u202e", "\u0000" * 50, "é" * 300),
    *("<|im_end|>", "<|im_start|>system\n", "<|endoftext|>", "{{ 7*7 }}", "{% for x in range(10**9) %}", "' or 1=1"),
    *("a" * 20_000, "\n" * 5000, "../../etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/", "%s%n%x", "nan", "1"),
    *("data:image/png;base64,AAAA", "\r\nX-Injected: 1\r\n", "\x1b[31m", '{"event": "ready"}', "𝕬" * 500, "\U0010ffff"),
    *("__class__", "$ref", "tiny", "TINY", "true", "[]", "auto", "required", "none", "json_schema", "text"),
    *map(Raw, ('"\\u0000"', '"\\ud800"', '"\\udc00\\ud800"', '"\\x41"', '"\\u12"', "'a'", '"a', '"\t"', '"\\ud83d"')),
]
PATTERNS = [
    *(
        "(a+)+$",
        "(a|a)*b",
        "(a{1000}){1000}",
        "x{100000}",
        "[",
        "(?=a)b",
        "(?P<n>a)(?P=n)",
        "\\1",
        "(?i)é",
        "\\p{L}{50}",
    ),
    *("a{,5}", "a{5,1}", "(?:a?){50}a{50}", "^$", "", "[^\\x00-\\U0010FFFF]", "\\", "(((((((a)))))))", "\\d+\\b", "*"),
    *(".*" * 60, "(" * 3000 + ")" * 3000, "\\u{110000}", "[z-a]", "(?s:.)*", "\\Q", "a" * 30_000, "(.*)(.*)(.*)x{200}"),
]
GRAMMARS = [
    *(
        'start: start "a" | ""',
        "start: a",
        'start: "a',
        "",
        "start: /(a+)+/",
        "start: /[/",
        "%json {}",
        'start: %json {"not": {}}',
    ),
    *(
        'start: "a"{100000}',
        'start: ("a"?){60} "b"',
        "start: start start | ",
        "start:\n" * 500,
        "%import common.WORD",
        "a: b\nb: a",
    ),
    *(
        'start: "\\u0000"',
        "start: <[1,2]>",
        "start: <[999999]>",
        "start: <|im_end|>",
        'start: "a" // \x00',
        "%ignore /x*/\nstart: x",
    ),
    *("start[max_tokens=0]: /a/", 'start[lazy]: /.*/ "a"', "start: %json {" + '"a":{' * 60, "%llguidance {}\nstart: x"),
    *(" | ".join(["start: " + '"a" "b"'] * 3000), "start: x\nx: " + "(" * 400 + '"a"' + ")" * 400, "start: @other"),
]


def deep(levels: int, opening: str, middle: str, closing: str) -> Raw:
    return Raw(opening * levels + middle + closing * levels)


def schemas(rng: random.Random) -> Any:
    """A schema that a compiler may choke on."""
    inner: Any = rng.choice(
        [{}, True, False, {"type": "string"}, {"$ref": "#"}, {"enum": [1, "a", None]}, {"type": []}]
    )
    made: list[Any] = [
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"$ref": "http://127.0.0.1:1/x.json"},
        {"$ref": "#/properties/a", "properties": {"a": inner}},
        {"$ref": "#/$defs/none"},
        {"enum": [f"v{at}" for at in range(rng.choice([1, 1000, 20_000]))]},
        {"enum": []},
        {"const": rng.choice([None, "\x00", 1.5, {"a": [inner]}, 10**30])},
        {"type": "string", "pattern": rng.choice(PATTERNS)},
        {
            "type": "string",
            "minLength": rng.choice([0, 5, 10**6, -1, 1.5]),
            "maxLength": rng.choice([0, 4, 10**9, "a"]),
        },
        {"type": "string", "format": rng.choice(["date", "uuid", "ipv6", "regex", "none", 3])},
        {"type": "integer", "minimum": rng.choice([0, 10**30, -(10**30), 1.5]), "maximum": rng.choice([5, -5, 10**40])},
        {"type": "number", "multipleOf": rng.choice([0, 1e-9, 3, -1, 10**20]), "exclusiveMinimum": 1},
        {
            "type": "array",
            "items": inner,
            "minItems": rng.choice([0, 3, 10**6]),
            "maxItems": rng.choice([2, 10**7, -1]),
        },
        {"type": "array", "prefixItems": [inner] * rng.choice([0, 3, 500]), "items": False},
        {"type": "object", "properties": {f"k{at}": inner for at in range(rng.choice([0, 3, 600]))}},
        {"type": "object", "required": rng.choice([["a"], [1], "a", ["a"] * 500]), "properties": {"a": inner}},
        {"type": "object", "patternProperties": {rng.choice(PATTERNS): inner}, "additionalProperties": inner},
        {"type": "object", "additionalProperties": {"$ref": "#"}, "minProperties": rng.choice([0, 1, 900])},
        {rng.choice(["anyOf", "allOf", "oneOf"]): [inner] * rng.choice([0, 1, 2, 300])},
        {"allOf": [{"type": "object", "properties": {f"k{at}": inner}} for at in range(12)]},
        {"not": inner},
        {"if": inner, "then": inner},
        {"type": rng.choice(["strin", ["object", "null"], 3, None, "null"])},
        {"properties": {rng.choice(["", "\x00", "a/b~c", "$ref", "é" * 200]): inner}, "type": "object"},
        {"x-guidance": {"whitespace_pattern": rng.choice(PATTERNS)}, "type": "object"},
        {"x-guidance": rng.choice([1, None, {"lenient": True}, {"coerce_one_of": True}]), "oneOf": [inner, inner]},
        deep(rng.choice([20, 70, 3000]), '{"type":"object","properties":{"a":', "{}", "}}"),
        deep(rng.choice([20, 70, 3000]), '{"anyOf":[', "{}", "]}"),
        inner,
    ]
    return rng.choice(made)


def tool(rng: random.Random) -> Any:
    function: dict[str, Any] = {"name": rng.choice(["f", "a b", "", "é", "x" * 200, "$defs", "a/b", "~"])}
    function["parameters"] = schemas(rng)
    if rng.random() < 0.2:
        function[rng.choice(["strict", "description", "extra"])] = rng.choice([True, None, 3, "a"])
    return {"type": rng.choice(["function", "function", "function", "web_search"]), "function": function}


def formed(rng: random.Random) -> dict[str, Any]:
    """Fields that ask for a form."""
    schema = schemas(rng)
    return rng.choice(
        [
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}},
            {"structured_outputs": {"json": schema}},
            {"structured_outputs": {"json": written(schema)}},
            {"structured_outputs": {"regex": rng.choice(PATTERNS)}},
            {"structured_outputs": {"grammar": rng.choice(GRAMMARS)}},
            {
                "structured_outputs": {
                    "choice": rng.choice([[""], [], ["a", "a"], ["\x01", '"\\'], ["x" * 9999], ["v"] * 1025])
                }
            },
            {"tools": [tool(rng)], "tool_choice": rng.choice(["auto", "required", "required", "none"])},
            {"tools": [tool(rng) for _ in range(rng.choice([2, 30, 129]))], "tool_choice": "required"},
        ]
    )


def poison(rng: random.Random) -> Any:
    """A value of any kind."""
    return rng.choice(
        [
            lambda: rng.choice(NUMBERS),
            lambda: rng.choice(TEXTS),
            lambda: rng.choice([None, True, False, [], {}, [[]], [None], {"": None}, {"a": {}}]),
            lambda: [rng.choice(NUMBERS) for _ in range(rng.randrange(6))],
            lambda: [rng.choice(TEXTS) for _ in range(rng.randrange(6))],
            lambda: [rng.randrange(-2, 450)] * rng.choice([1, 600, 70_000]),
            lambda: {str(rng.randrange(500)): rng.choice(NUMBERS) for _ in range(rng.choice([1, 3, 1100]))},
            lambda: ["a"] * rng.choice([17, 65, 2000]),
            lambda: deep(rng.choice([5, 63, 64, 65, 2000, 100_000]), "[", "", "]"),
            lambda: deep(rng.choice([5, 63, 65, 2000, 100_000]), '{"a":', "1", "}"),
            lambda: schemas(rng),
        ]
    )()


def places(held: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all values in it."""
    found = [at] if at else []
    pairs = held.items() if isinstance(held, dict) else enumerate(held) if isinstance(held, list) else ()
    for key, one in pairs:
        found += places(one, (*at, key))
    return found


def inside(held: Any, way: tuple[Any, ...]) -> Any:
    for key in way:
        held = held[key]
    return held


def changed(body: dict[str, Any], rng: random.Random) -> Any:
    """One change of a tree."""
    ways = places(body)
    kind = rng.randrange(12)
    if not ways or kind == 0:
        names = [
            "",
            "\x00",
            "é",
            "messages ",
            "\ud800",
            "__proto__",
            "chat_template",
            "prompt_embeds",
            "a" * 5000,
            "Model",
        ]
        body[rng.choice([*names, *SEEN])] = poison(rng)
        return body
    if kind == 1:
        return rng.choice([[body], None, "a", 3, Raw(""), Raw("{"), [body, body], {"a": body}])
    way = rng.choice(ways)
    held, key = inside(body, way[:-1]), way[-1]
    if kind == 2:
        del held[key]
    elif kind == 3:
        held[key] = rng.choice([[held[key]], {"a": held[key]}, str(held[key])])
    elif kind == 4 and isinstance(held[key], list):
        held[key] = held[key] * rng.choice([0, 2, 100, 5000])
    elif kind == 5 and isinstance(held[key], dict) and held[key]:
        held[key] = Twice(held[key], rng.choice(list(held[key])))
    elif kind == 6 and isinstance(held, dict):
        held[rng.choice([key.upper(), key + "\x00", key + " ", "\u200b" + key])] = held.pop(key)
    else:
        held[key] = poison(rng)
    return body


SEEN = sorted({key for _, body in GOOD for key in body})


def bytewise(data: bytes, rng: random.Random) -> bytes:
    """One change of the bytes."""
    at = rng.randrange(len(data) + 1)
    odd = [
        b"\x00",
        b"\xff",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\\u0000",
        b"\\ud800",
        b'"',
        b"{",
        b"]",
        b",",
        b"/**/",
    ]
    return rng.choice(
        [
            lambda: data[:at],
            lambda: data[at:],
            lambda: data[:at] + rng.choice(odd) + data[at:],
            lambda: data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
            lambda: data[:at] + data[at : at + 40] * 3 + data[at:],
            lambda: data + rng.choice([data, b"\x00", b"\n", b"}", b" " * 5000]),
            lambda: data.decode().encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"])),
            lambda: b"\x00" * rng.choice([1, 5000]),
            lambda: bytes(rng.randrange(256) for _ in range(rng.randrange(200))),
        ]
    )()


HEADERS = {
    "Content-Type": [
        "text/plain",
        "application/json; charset=latin-1",
        "",
        "multipart/form-data",
        "application/json,",
        "\udcff",
    ],
    "Content-Encoding": ["gzip", "identity", "br", "", "deflate, gzip"],
    "Authorization": ["Bearer ", "Basic YTpi", "Bearer " + "x" * 9000, "\udcff\udcfe", "bearer", "Bearer a b c"],
    "Idempotency-Key": ["", "a" * 255, "a" * 256, "\udcff", "same", "../x", " "],
    "X-Request-Id": ["a" * 65, "\udce9", "ok-1", "a b", '{"event":"x"}', ""],
    "Accept": ["text/event-stream", "*/*", "\udc80"],
    "Expect": ["100-continue", "200-ok"],
    "X-Stainless-Retry-Count": ["1", "-1", "9" * 50],
    "Origin": ["http://evil.example", "null"],
    "Range": ["bytes=0-,0-,0-" + ",0-" * 500, "bytes=-1"],
    "Cookie": ["a=b; " * 500],
    "Last-Event-ID": ["5"],
    "Upgrade": ["websocket", "h2c"],
}


def addressed(path: str, rng: random.Random) -> str:
    """A path written otherwise."""
    return rng.choice(
        [
            path + "/",
            "/" + path,
            path + "?" + "a=b&" * rng.choice([1, 500]),
            path.replace("/", "%2F", 1),
            path + "%00",
            path + "%ff%fe",
            path + "/../../etc/passwd",
            path.upper(),
            path + "%ud800",
            path + ";a=b",
            path + "/" + "a" * rng.choice([1, 3000]),
            "http://x" + path,
            path + "%",
            "/v1/models/%F0%9F%98%80%00%0d%0a",
            "/v1/models/" + "%2e%2e%2f" * 20,
            "*",
        ]
    )


METHODS = ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "post", "POST", "X" * 50]


def asked(path: str, body: dict[str, Any], rng: random.Random) -> bytes:
    """A body that was good, after some changes."""
    tree: Any = body
    forms = path in (CHAT, TEXT) and rng.random() < 0.3
    if forms:
        for old in ("stop", "stop_token_ids", "tools", "tool_choice", "response_format", "structured_outputs"):
            body.pop(old, None)
        more = formed(rng)
        tree |= {name: one for name, one in more.items() if path == CHAT or not name.startswith("tool")}
    if not forms or rng.random() < 0.2:  # what asks for a form is mostly left as it is, so that it is compiled
        for _ in range(rng.choice([0, 0, 1, 1, 1, 2, 3])):
            tree = changed(tree, rng) if isinstance(tree, dict) else tree
    data = written(tree).encode("utf-8", "surrogatepass")
    return data if forms or rng.random() < 0.85 else bytewise(data, rng)


def case(number: int, key: str = "", admin_key: str = "") -> Case:
    """The case of a number."""
    rng = random.Random(f"mutated {number}")
    admin = bool(admin_key) and rng.random() < 0.1
    path, body = copy.deepcopy(rng.choice(ADMIN if admin else GOOD))
    made = Case(path, asked(path, body, rng), admin=admin)
    if own := admin_key if admin else key:
        made.headers["Authorization"] = f"Bearer {own}"
    if rng.random() < 0.12:
        for name in rng.sample(sorted(HEADERS), rng.choice([1, 1, 2])):
            made.headers[name] = rng.choice(HEADERS[name])
    if rng.random() < 0.06:
        made.path = addressed(made.path, rng)
    if rng.random() < 0.06:
        made.method = rng.choice(METHODS)
    if rng.random() < 0.03:
        made.method, made.body = rng.choice(METHODS[:3]), b""
        made.path = rng.choice([rng.choice(GETS), addressed(rng.choice(GETS), rng)])
    return made

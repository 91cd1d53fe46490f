"""The `grammar` union: what a text must look like as a whole. A member gives its grammar as llguidance reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from llmkit.core.config import config, setting

GAP = r"[ \t\n\r]{0,40}"
"""Between the parts of a JSON text: a model that only makes spaces comes to an end of them."""


@config
class JsonSchema:
    """JSON that is valid under a schema; its objects have their keys in the schema's order."""

    kind: Literal["json_schema"] = "json_schema"
    schema: str
    """As JSON text."""

    @classmethod
    def of(cls, schema: Mapping[str, Any] | bool) -> JsonSchema:
        """From a schema as Python holds it."""
        return cls(schema=json.dumps(schema))

    def source(self) -> str:
        """
        Raises:
            RequestError: the schema is none, or holds a keyword that cannot be enforced; it is named.
        """
        from llmkit.inference.schema import enforced

        return wrapped(json_schema=_spaced(enforced(self.schema, "grammar.schema")))

    def named(self) -> dict[str, Any]:
        """As vLLM's `structured_outputs` has it; its keywords are checked by `source`."""
        return {"json": self.schema}


@config
class JsonObject:
    """Any JSON object."""

    kind: Literal["json_object"] = "json_object"

    def source(self) -> str:
        """llguidance's grammar."""
        return wrapped(json_schema=_spaced({"type": "object"}))

    def named(self) -> dict[str, Any]:
        """As vLLM's `structured_outputs` has it."""
        return {"json_object": True}


@config
class Regex:
    """A regular expression that the whole text matches; Rust's syntax, without look-around and references."""

    kind: Literal["regex"] = "regex"
    pattern: str

    def source(self) -> str:
        """
        Raises:
            RequestError: it holds half a letter (a lone surrogate).
        """
        from llguidance import LLMatcher

        from llmkit.inference.request import RequestError

        try:
            made: str = LLMatcher.grammar_from_regex(self.pattern)
        except ValueError as cause:
            raise RequestError("is no text that can be written", fix="leave it out", key="grammar.pattern") from cause
        return made

    def named(self) -> dict[str, Any]:
        """As vLLM's `structured_outputs` has it."""
        return {"regex": self.pattern}


@config
class Choice:
    """One of several texts."""

    kind: Literal["choice"] = "choice"
    choices: tuple[str, ...] = setting(default_factory=tuple)

    def source(self) -> str:
        """
        Raises:
            RequestError: there are none.
        """
        from llmkit.inference.request import RequestError

        if not self.choices:
            raise RequestError("holds nothing to choose from", fix="give texts", key="grammar.choices")
        return wrapped(lark_grammar="start: " + " | ".join(map(json.dumps, dict.fromkeys(self.choices))))

    def named(self) -> dict[str, Any]:
        """As vLLM's `structured_outputs` has it."""
        return {"choice": list(dict.fromkeys(self.choices))}


@config
class Lark:
    """A context-free grammar in llguidance's Lark, whose `start` is the whole text; `%json {...}` is a schema."""

    kind: Literal["lark"] = "lark"
    grammar: str

    def source(self) -> str:
        """
        Raises:
            RequestError: a schema in it holds a keyword that cannot be enforced; it is named.
        """
        from llmkit.inference.schema import embedded

        embedded(self.grammar, "grammar.grammar")
        return wrapped(lark_grammar=self.grammar)

    def named(self) -> dict[str, Any]:
        """As vLLM's `structured_outputs` has it."""
        return {"grammar": self.grammar}


def wrapped(**grammar: Any) -> str:
    """A grammar of one part."""
    return json.dumps({"grammars": [grammar]})


def _spaced(schema: Any) -> Any:
    return schema | {"x-guidance": {"whitespace_pattern": GAP}} if isinstance(schema, dict) else schema


Grammar = JsonSchema | JsonObject | Regex | Choice | Lark

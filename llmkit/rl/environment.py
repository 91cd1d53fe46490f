"""The seam between a model that calls tools and what answers it: an environment has a state for one conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llmkit.core.wording import cut
from llmkit.rl.sample import Messages

LONGEST = 4000
"""Letters that a tool tells at most."""


@dataclass(frozen=True)
class Call:
    """What a model asks of a tool."""

    name: str
    arguments: str
    """JSON text of an object, as the model wrote it."""


@dataclass(frozen=True)
class Opening:
    """How a conversation begins."""

    messages: Messages
    """What the model is asked."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """What it may call, as OpenAI's interface has it."""


@dataclass(frozen=True)
class Step:
    """What comes of calls."""

    messages: Messages
    """A `tool` message for each call, in order."""
    done: bool = False
    """Whether the conversation is over."""
    reward: float = 0.0
    """Beside what rewards give to the conversation as a whole."""


class Environment(Protocol):
    """The other side of one conversation."""

    def reset(self, row: Mapping[str, Any], asked: Messages) -> Opening:
        """Begins anew, with a row's columns and what it asks."""
        ...

    def step(self, calls: Sequence[Call]) -> Step:
        """Answers the calls of one answer."""
        ...


class Unable(Exception):
    """Why a tool has no answer; the text is for the model, which may ask otherwise."""


class Tool(Protocol):
    """Something that answers calls."""

    @property
    def function(self) -> Mapping[str, Any]:
        """Its name, what it does and the JSON schema of its arguments."""
        ...

    def __call__(self, arguments: Mapping[str, Any]) -> str:
        """The answer.

        Raises:
            Unable: there is none.
        """
        ...


class Toolbox:
    """An environment of tools that remember nothing; it ends where the model calls none."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self.tools = {str(tool.function["name"]): tool for tool in tools}

    def reset(self, row: Mapping[str, Any], asked: Messages) -> Opening:
        """What the row asks, with all tools."""
        return Opening(asked, tuple({"type": "function", "function": tool.function} for tool in self.tools.values()))

    def step(self, calls: Sequence[Call]) -> Step:
        """The tools' answers; what is wrong with a call is told to the model."""
        return Step(tuple({"role": "tool", "name": one.name, "content": self._answer(one)} for one in calls))

    def _answer(self, call: Call) -> str:
        tool = self.tools.get(call.name)
        try:
            if tool is None:
                raise Unable(f"no tool is called {cut(call.name, 40)}; there is {', '.join(self.tools)}")
            return cut(tool(_arguments(call)), LONGEST)
        except Unable as cause:
            return f"error: {cut(str(cause), LONGEST)}"


def _arguments(call: Call) -> Mapping[str, Any]:
    try:
        said = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError) as cause:
        raise Unable("the arguments are no JSON") from cause
    if not isinstance(said, dict):
        raise Unable("the arguments are no JSON object")
    return said


def argument(given: Mapping[str, Any], name: str) -> str:
    """A text among arguments.

    Raises:
        Unable: it is not there, or there is something else too.
    """
    value = given.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or len(given) > 1:
        raise Unable(f"give {name} as text, and nothing else")
    return value


def described(name: str, description: str, argument: str, meaning: str) -> Mapping[str, Any]:
    """A function of one text."""
    schema = {"type": "object", "properties": {argument: {"type": "string", "description": meaning}}}
    return {"name": name, "description": description, "parameters": schema | {"required": [argument]}}

"""An environment of the user's own, of which each answer is looked at before it is believed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NoReturn

from llmkit.core.own import Own
from llmkit.rl.environment import Call, Opening, Step
from llmkit.rl.sample import Messages


class OwnSide:
    """The other side of one conversation."""

    def __init__(self, own: Own) -> None:
        """
        Raises:
            OwnError: the class makes nothing, or no environment.
        """
        self.own, self.inner = own, own()
        for name in ("reset", "step"):
            if not callable(own.run(getattr, self.inner, name, None)):
                own.wrong(f"made {_kind(self.inner)}, which has no {name}", "give it reset(row, asked) and step(calls)")

    def reset(self, row: Mapping[str, Any], asked: Messages) -> Opening:
        """How the conversation begins.

        Raises:
            OwnError: it fails, or gives something else.
        """
        given = deepcopy(dict(row)), deepcopy(asked)
        made = self.own.run(lambda: self.inner.reset(*given))
        if not isinstance(made, Opening):
            self._odd("reset", f"gave {_kind(made)}, no Opening", "return Opening(messages, tools)")
        messages, tools = self._messages(made.messages, "reset"), self._list(made.tools, "reset")
        for tool in tools:
            function = tool.get("function") if isinstance(tool, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                fix = 'give {"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}'
                self._odd("reset", f"gave a tool that is {_short(tool)}", fix)
        return Opening(messages, tools)

    def step(self, calls: Sequence[Call]) -> Step:
        """What comes of the calls.

        Raises:
            OwnError: it fails, or gives something else.
        """
        made = self.own.run(lambda: self.inner.step(tuple(calls)))
        if not isinstance(made, Step):
            self._odd("step", f"gave {_kind(made)}, no Step", "return Step(messages, done, reward)")
        messages = self._messages(made.messages, "step")
        if len(messages) != len(calls):
            fix = "give one message for each call, in order"
            self._odd("step", f"gave {len(messages)} messages for {len(calls)} calls", fix)
        if odd := [one for one in messages if one["role"] != "tool"]:
            self._odd("step", f"gave a message with role {odd[0]['role']}", 'give messages with "role": "tool"')
        reward = self.own.run(_number, made.reward)
        if not math.isfinite(reward):
            self._odd("step", f"gave the reward {_short(made.reward)}", "give a finite number")
        return Step(messages, self.own.run(bool, made.done), reward)

    def _messages(self, given: Any, of: str) -> Messages:
        messages = self._list(given, of)
        for one in messages:
            texts = isinstance(one, Mapping) and isinstance(one.get("role"), str)
            if not texts or not isinstance(one.get("content"), str):
                fix = 'give messages such as {"role": "tool", "content": "42"}'
                self._odd(of, f"gave a message that is {_short(one)}", fix)
        return messages

    def _list(self, given: Any, of: str) -> tuple[Any, ...]:
        """What is told as JSON, as it is now: who gave it may change it."""
        if not isinstance(given, list | tuple):
            self._odd(of, f"gave {_kind(given)}, where a list is", "give a list or a tuple")
        try:
            return tuple(json.loads(json.dumps(given, allow_nan=False)))
        except (TypeError, ValueError, RecursionError) as cause:
            self._odd(of, f"gave what JSON does not hold ({cause!s:.80})", "give texts, numbers, lists and dicts")

    def _odd(self, of: str, what: str, fix: str) -> NoReturn:
        self.own.wrong(f"{what} (in {of})", fix)


def _number(made: Any) -> float:
    """NaN of what is none."""
    try:
        return float(made)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _kind(made: Any) -> str:
    return type(made).__name__


def _short(made: Any) -> str:
    return f"{made!r:.60}"

"""What is scored, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Messages = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Sample:
    """One answer to a prompt."""

    prompt: str | Messages
    """A text, or messages."""
    completion: str
    """The answer's text; of a conversation with tools the last one's."""
    token_ids: tuple[int, ...] = ()
    """Without the token that ended it; none where an endpoint tells none."""
    finish_reason: str = "stop"
    row: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of the prompt's row."""
    file: str = ""
    """Where that row stands."""
    line: int = 0
    turns: Messages = ()
    """Of a conversation with tools: all messages after the prompt."""
    group: int = 0
    """Answers to one prompt have one number."""

    @property
    def begins(self) -> str:
        """The first letters of what was asked, for errors."""
        said = self.prompt if isinstance(self.prompt, str) else str((self.prompt or ({},))[-1].get("content") or "")
        return repr(said if len(said) <= 40 else said[:37] + "...")

    @property
    def said(self) -> str | list[Mapping[str, Any]]:
        """The answer in the form of its prompt, a text or messages; of a conversation with tools all its messages."""
        if self.turns:
            return list(self.turns)
        return self.completion if isinstance(self.prompt, str) else [{"role": "assistant", "content": self.completion}]


@dataclass(frozen=True)
class Fault:
    """Why a sample has no score."""

    why: str
    fix: str = "mend the row or the reward"
    certain: bool = False
    """It is the reward or the row that is wrong, and no answer could have a score: `failed` is of no use."""


UNREACHED = Fault("was not scored: one before it failed", certain=True)
Score = float | Fault

"""What a page shows of answers in groups: figures of all of them, and as many groups as a page holds."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.data.order import spread
from llmkit.stages.tables import shortened

PAGE = 6 << 20
"""Letters of all answers of a page, about."""
TEXT = 4000
"""Letters that are shown of one text."""
SIDE = 16
"""Answers that are shown of a group's best ones, and as many of its worst."""
MARKUP = 500
"""Letters that a page has around an answer, about; around a token a tenth of it."""
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Turn:
    """What somebody says."""

    role: str
    text: str


@dataclass(frozen=True)
class Shown:
    """One answer."""

    reward: float
    rewards: Mapping[str, float]
    advantage: float | None
    """Of a row of them, one a token, their mean; None where nothing is known."""
    turns: Sequence[Turn]
    tokens: int
    ended: bool
    pieces: Sequence[tuple[str, float]] = ()
    """Its tokens with an advantage each, where they have their own."""


@dataclass(frozen=True)
class Group:
    """The answers to one prompt, the best one first."""

    at: int
    """The step or row that it is of."""
    name: str
    question: Sequence[Turn]
    answers: Sequence[Shown]
    left_out: int = 0
    """Answers between the best and the worst."""


@dataclass
class Extent:
    """Where a group's lines are in the file."""

    rollout: int
    begin: int
    letters: int = 0
    answers: int = 0
    ends: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Of each figure the lowest and the highest."""


@dataclass(frozen=True)
class Rolled:
    """A file of rollouts."""

    path: Path
    extents: Sequence[Extent]
    reuse: int = 1
    """Steps that learn from a rollout."""

    @property
    def answers(self) -> int:
        """All there are."""
        return sum(one.answers for one in self.extents)

    def step(self, rollout: int) -> int:
        """The first step that learns from it."""
        return rollout * self.reuse + 1

    def bands(self) -> dict[str, list[tuple[float, float, float]]]:
        """Of each figure at each step the mean of what is lowest and of what is highest in its groups."""
        found: dict[str, dict[int, list[tuple[float, float]]]] = {}
        for one in self.extents:
            for name, ends in one.ends.items():
                found.setdefault(name, {}).setdefault(self.step(one.rollout), []).append(ends)
        return {name: [_band(step, ends) for step, ends in steps.items()] for name, steps in found.items()}

    def groups(self) -> Iterator[Group]:
        """As many as a page holds, evenly over the run."""
        mean = sum(one.letters for one in self.extents) / max(1, len(self.extents))
        with self.path.open("rb") as file:
            for at in spread(len(self.extents), max(1, int(PAGE / max(1.0, mean)))):
                one = self.extents[at]
                file.seek(one.begin)
                yield group(self.step(one.rollout), [json.loads(file.readline()) for _ in range(one.answers)])


def read(path: Path, reuse: int = 1) -> Rolled:
    """Looks at every line once; a torn one and what is behind it is left out."""
    extents, before, begin = list[Extent](), None, 0
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                said = _said(line)
                if said is None:
                    break
                if before != (key := (said["rollout"], said["group"])):
                    extents.append(Extent(said["rollout"], begin))
                _count(extents[-1], said)
                before, begin = key, begin + len(line)
    return Rolled(path, extents, reuse)


def _said(line: bytes) -> dict[str, Any] | None:
    try:
        said = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return said if isinstance(said, dict) else None


def _count(extent: Extent, said: Line) -> None:
    """Adds an answer to its group's figures."""
    extent.answers += 1
    if extent.answers <= 2 * SIDE:
        extent.letters += MARKUP + sum(len(html.escape(shortened(turn.text, TEXT))) for turn in _turns(said))
        if isinstance(said["advantage"], list):
            extent.letters += MARKUP // 10 * len(said["ids"])
    figures = {"reward": said["reward"], "length": len(said["ids"])}
    figures |= {f"reward.{name}": value for name, value in said["rewards"].items()}
    for name, value in figures.items():
        if isinstance(value, int | float):  # what is not finite is written as text
            low, high = extent.ends.get(name, (value, value))
            extent.ends[name] = min(low, value), max(high, value)


def _band(step: int, ends: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    low, high = (sum(side) / len(side) for side in zip(*ends, strict=True))
    return step, low, high


def group(step: int, lines: Sequence[Line]) -> Group:
    """The lines of one group."""
    question = lines[0].get("question")
    asked = turns_of(question) if question else []
    return ordered(step, f"step {step} · {lines[0]['row']}", asked, [_shown(line) for line in lines])


def ordered(at: int, name: str, question: Sequence[Turn], answers: Sequence[Shown]) -> Group:
    """The best answer first; of many the best and the worst ones."""
    made = sorted(answers, key=lambda one: -one.reward if one.reward == one.reward else math.inf)
    left = max(0, len(made) - 2 * SIDE)
    return Group(at, name, question, made[:SIDE] + made[-SIDE:] if left else made, left)


def _shown(line: Line) -> Shown:
    own, pieces = line["advantage"], list[tuple[str, float]]()
    if isinstance(own, list):
        pieces = list(zip(line.get("pieces") or (), map(_number, own), strict=False))
        own = sum(map(_number, own)) / len(own) if own else 0.0
    rewards = {name: _number(value) for name, value in line["rewards"].items()}
    known = None if own is None else _number(own)
    ended = line["finish"] != "length"
    return Shown(_number(line["reward"]), rewards, known, _turns(line), len(line["ids"]), ended, pieces)


def _number(value: Any) -> float:
    return float(value)  # `nan` and `inf` are written as text


def _turns(line: Line) -> list[Turn]:
    return turns_of(line["turns"]) if line.get("turns") else [Turn("assistant", line["text"])]


def turns_of(said: str | Sequence[Line]) -> list[Turn]:
    """Messages as texts; a call of a tool is one as it was made."""
    if isinstance(said, str):
        return [Turn("user", said)]
    made = []
    for one in said:
        content = one.get("content") or ""
        texts = [content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)]
        for call in one.get("tool_calls") or ():
            told = call.get("function", call)
            arguments = told.get("arguments", {})
            words = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            texts.append(f"→ {told.get('name', '')}({words})")
        made.append(Turn(str(one.get("role", "")), "\n".join(text for text in texts if text)))
    return made

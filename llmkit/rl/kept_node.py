"""The `keep` union of `kind: best_of`: which answers to a prompt become rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from llmkit.core.config import config, setting


@dataclass(frozen=True)
class Rated:
    """An answer in the form of its prompt, and what it is worth."""

    said: Any
    """A text, or messages."""
    score: float
    scores: Mapping[str, float]
    """By reward."""

    def row(self) -> dict[str, Any]:
        """As a row to learn from."""
        return {"completion": self.said, "score": self.score, "scores": dict(self.scores)}


def ranked(answers: Sequence[Rated]) -> list[Rated]:
    """Different answers, the best first; of equal scores the one that was made first."""
    found: list[Rated] = []
    for one in sorted(answers, key=lambda one: -one.score):
        if all(one.said != other.said for other in found):
            found.append(one)
    return found


@config
class Best:
    """The best answers to each prompt (best-of-n)."""

    least: ClassVar[int] = 1
    kind: Literal["best"] = "best"
    count: int = setting(default=1, least=1)
    """How many of them, as far as they differ."""

    def rows(self, answers: Sequence[Rated]) -> list[dict[str, Any]]:
        """What is added to the prompt, for each row."""
        return [one.row() for one in ranked(answers)[: self.count]]


@config
class Above:
    """All answers that are worth at least so much (rejection sampling); a prompt without one has no row."""

    least: ClassVar[int] = 1
    kind: Literal["above"] = "above"
    bar: float
    """The least score."""
    most: int | None = setting(default=None, least=1)
    """Answers to one prompt, the best ones, at most."""

    def rows(self, answers: Sequence[Rated]) -> list[dict[str, Any]]:
        """What is added to the prompt, for each row."""
        return [one.row() for one in ranked(answers) if one.score >= self.bar][: self.most]


@config
class BestWorst:
    """The best answer and the worst one, as a preference; a prompt whose answers are alike has no row."""

    least: ClassVar[int] = 2
    kind: Literal["pairs"] = "pairs"
    gap: float = setting(default=0.0, least=0.0)
    """Scores differ by more than this."""

    def rows(self, answers: Sequence[Rated]) -> list[dict[str, Any]]:
        """What is added to the prompt, for each row."""
        found = ranked(answers)
        best, worst = found[0], found[-1]
        if best.score - worst.score <= self.gap:
            return []
        scores = {"score_chosen": best.score, "score_rejected": worst.score}
        return [{"chosen": best.said, "rejected": worst.said, **scores}]


Keep = Best | Above | BestWorst

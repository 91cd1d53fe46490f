"""A model that is asked in words: a critic, a reviser, a judge, a teacher."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from llmkit.core.config import Conflict, config, setting
from llmkit.inference.node import Generator, OpenAi, OwnEngine
from llmkit.inference.sampling import Sampling
from llmkit.models.node import ModelRef, Quant

if TYPE_CHECKING:
    from llmkit.inference.writer import Writer


@config
class Rules:
    """No model but patterns: the critic objects to an answer in which one is found, the reviser puts `instead` in the
    place of what is found, and to the judge the answer with fewer such places is the better one. For what can be said
    as a pattern, and for trying a pipeline out."""

    kind: Literal["rules"] = "rules"
    patterns: tuple[str, ...]
    """Regular expressions of Python."""
    instead: str = ""

    def problems(self) -> Iterator[Conflict]:
        """What is no pattern, or finds everything."""
        if not self.patterns:
            yield Conflict("patterns", "is empty", "give one or more")
        for at, one in enumerate(self.patterns):
            try:
                if re.compile(one).search(""):
                    yield Conflict(f"patterns.{at}", f"{one!r} finds an empty answer", "let it find at least a letter")
            except (re.error, RecursionError) as cause:
                yield Conflict(f"patterns.{at}", f"{one!r} is no pattern ({cause})", "mend it")

    def open(self) -> Writer:
        """Ready to be asked."""
        from llmkit.rl.rules import RulesWriter

        return RulesWriter(self)


ELSEWHERE = (OpenAi, Rules)
"""Generators that take no model of ours."""


@config
class Role:
    """A model that is asked in words."""

    generator: Generator | Rules = OwnEngine()
    """Where its text comes from."""
    model: ModelRef | None = None
    """Which it is, unless the generator is an endpoint."""
    quant: Quant | None = None
    """How it is held; left out, an adapter's base as in its training."""
    sampling: Sampling = setting(default_factory=lambda: Sampling(max_tokens=512))
    """How its answers are chosen."""

    def problems(self) -> Iterator[Conflict]:
        """A model that is nowhere, or twice."""
        if isinstance(self.generator, ELSEWHERE) and self.model is not None:
            whose = "the endpoint has a model of its own" if isinstance(self.generator, OpenAi) else "rules need none"
            yield Conflict("model", whose, "leave one of them out", "generator")
        elif not isinstance(self.generator, ELSEWHERE) and self.model is None:
            yield Conflict("model", "there is none", "name it, or use generator: {kind: openai, url: ...}")
        if self.sampling.n > 1:
            yield Conflict("sampling.n", "it is asked once", "leave it out")

    def ready(self) -> None:
        """
        Raises:
            RecipeError: its answers are past its positions.
        """
        from llmkit.rl.foreseen import check_room

        check_room(self.model, self.sampling.max_tokens)

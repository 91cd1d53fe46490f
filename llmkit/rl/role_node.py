"""A model that is asked in words: a critic, a reviser, a judge, a teacher."""

from __future__ import annotations

from collections.abc import Iterator

from llmkit.core.config import Conflict, config, setting
from llmkit.inference.node import Generator, OpenAi, OwnEngine
from llmkit.inference.sampling import Sampling
from llmkit.models.node import ModelRef, Quant


@config
class Role:
    """A model that is asked in words."""

    generator: Generator = OwnEngine()
    """Where its text comes from."""
    model: ModelRef | None = None
    """Which it is, unless the generator is an endpoint."""
    quant: Quant | None = None
    """How it is held; left out, an adapter's base as in its training."""
    sampling: Sampling = setting(default_factory=lambda: Sampling(max_tokens=512))
    """How its answers are chosen."""

    def problems(self) -> Iterator[Conflict]:
        """A model that is nowhere, or twice."""
        if isinstance(self.generator, OpenAi) and self.model is not None:
            yield Conflict("model", "the endpoint has a model of its own", "leave one of them out", "generator")
        elif not isinstance(self.generator, OpenAi) and self.model is None:
            yield Conflict("model", "there is none", "name it, or use generator: {kind: openai, url: ...}")
        if self.sampling.n > 1:
            yield Conflict("sampling.n", "it is asked once", "leave it out")

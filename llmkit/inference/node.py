"""The `generator` union: where text comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from llmkit.core.config import Later, config, setting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llmkit.inference.generate import Completion


@config
class Sampling:
    """How the next token is chosen."""

    temperature: float = setting(default=0.0, least=0.0)
    """0 is greedy."""
    top_k: int = setting(default=0, least=0)
    """Only the k likeliest tokens; 0 is all."""
    top_p: float = setting(default=1.0, above=0.0, most=1.0)
    """Only the likeliest tokens that hold this much of the mass."""
    min_p: float = setting(default=0.0, least=0.0, most=1.0)
    """Only tokens at least this likely, as a share of the likeliest."""
    max_tokens: int = setting(default=128, least=1)
    seed: int = setting(default=0, least=0)


@config
class Transformers:
    """transformers' own `generate`, in process."""

    kind: Literal["transformers"] = "transformers"
    batch: int = setting(default=16, least=1)
    """Prompts at a time, sorted by length."""

    def generate(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """A completion for each prompt (token ids), in order."""
        from llmkit.inference.generate import generate

        return generate(model, tokenizer, prompts, sampling, self.batch, on_done)


Generator = Annotated[Transformers, Later(("engine", "openai", "vllm"))]

"""The `generator` union: where text comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from llmkit.core.config import Later, config, setting
from llmkit.inference.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llmkit.inference.generate import Completion


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

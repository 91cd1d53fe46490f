"""A model that is asked in words, wherever it runs: judges, critics and teachers are asked by this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmkit.build.held import Here
from llmkit.build.opening import load
from llmkit.build.precision import reading
from llmkit.core.errors import ModelError, told_below
from llmkit.data.prompt import prompt_ids
from llmkit.data.render import Renderer
from llmkit.inference.node import Generator, OwnEngine
from llmkit.inference.request import Ask, Completion, Prompt
from llmkit.inference.sampling import Sampling
from llmkit.inference.writer import Writer, answered
from llmkit.models.load import How
from llmkit.models.node import ModelRef, NoQuant, Quant
from llmkit.models.resolve import resolve
from llmkit.rl.bench import Bench
from llmkit.rl.role_node import ELSEWHERE, Rules
from llmkit.rl.sample import Messages


class Speaker:
    """An open generator, and what renders for it: nothing for an endpoint that reads messages."""

    def __init__(self, writer: Writer, renderer: Renderer | None = None) -> None:
        self.writer, self.renderer = writer, renderer

    def ask(self, asked: Sequence[str | Messages], sampling: Sampling) -> list[Completion]:
        """An answer to each conversation, in order; where `sampling` draws, the i-th by a seed of its own.

        Raises:
            RequestError: one cannot be asked, or its answer failed.
            ResourceError: an endpoint cannot be reached.
        """
        asks = [Ask(self._prompt(one), replace(sampling, seed=sampling.seed + at)) for at, one in enumerate(asked)]
        return [one.sound() for one in answered(self.writer, asks)]

    def close(self) -> None:
        """Gives back what it holds."""
        self.writer.close()

    def _prompt(self, asked: str | Messages) -> Prompt:
        return Prompt(() if self.renderer is None else tuple(prompt_ids(self.renderer, asked)), asked)


def speaker(
    generator: Generator | Rules,
    model: ModelRef | None,
    bench: Bench,
    key: str = "model",
    quant: Quant | None = None,
) -> Speaker:
    """The generator, open over `model`; an endpoint has its own.

    Raises:
        ModelError: there is no model, or it cannot be loaded.
    """
    if isinstance(generator, ELSEWHERE):
        return Speaker(generator.open())
    if model is None:
        raise ModelError(f"generator {generator.kind} has no model", fix="give one, or use generator: openai", key=key)
    kinds = reading(bench.precision, bench.device)
    with told_below(key, "model"):
        resolved = resolve(model)
        held = quant or resolved.quant or NoQuant()
        how = How(bench.device, kinds.params, kinds.half, held, bench.grants.code, bench.grants.nonfinite)
        loaded = load(resolved, model, how)
    most = generator.room if isinstance(generator, OwnEngine) else None
    here = Here(loaded, most=most, mixed=kinds.mixed, device=bench.device)
    return Speaker(generator.open(here), Renderer(loaded.tokenizer))

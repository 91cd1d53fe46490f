"""Text by vLLM in this process: what is asked runs together, and is told in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import Any

from llmkit.core.errors import ResourceError, one_line
from llmkit.inference.node import Vllm
from llmkit.inference.request import Ask, Completion, RequestError
from llmkit.inference.text import Texts
from llmkit.inference.vllm_start import settings
from llmkit.inference.vllm_words import check, completion, output, said
from llmkit.inference.writer import Files

AHEAD = 4
"""Times as many asks as run at once are taken on: one that takes long must not leave the engine without work."""


class VllmHere:
    """The `vllm` member of the `generator` union, open in this process. vLLM's engine is in processes of its own."""

    def __init__(self, node: Vllm, files: Files, texts: Texts) -> None:
        """
        Raises:
            ResourceError: vLLM is not installed, or does not start.
        """
        self.texts, self.most = texts, AHEAD * node.sequences
        self.engine = _started(node, files)
        self.names, self.ended = count(), dict[str, Any]()

    def each(self, asks: Iterable[Ask]) -> Iterator[Completion]:
        """A completion for each ask, in their order; who leaves early frees what was held.

        Raises:
            RequestError: one asks for what vLLM does not do.
            ResourceError: its engine has ended.
        """
        coming, flying = iter(asks), deque[tuple[str, Ask]]()
        try:
            while True:
                for ask in islice(coming, self.most - len(flying)):
                    flying.append((self._added(check(ask)), ask))
                if not flying:
                    return
                while flying[0][0] not in self.ended:
                    self._step()
                name, ask = flying.popleft()
                yield _completion(self.texts, ask, self.ended.pop(name))
        finally:
            if names := [name for name, _ in flying]:
                self.engine.abort_request([name for name in names if self.ended.pop(name, None) is None])

    def close(self) -> None:
        """Ends the engine's processes."""
        self.engine.engine_core.shutdown()

    def _added(self, ask: Ask) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        if ask.adapter:
            what = "generator vllm in this process knows no adapters by name"
            raise RequestError(what, fix="merge it, or use url where it is served", key="adapter")
        name, grammar = f"llmkit-{next(self.names)}", ask.sampling.grammar
        try:
            form = None if grammar is None else StructuredOutputsParams(**grammar.named())
            how = SamplingParams(
                **said(ask.sampling), structured_outputs=form, output_kind=RequestOutputKind.FINAL_ONLY
            )
            self.engine.add_request(name, {"prompt_token_ids": list(ask.prompt.ids)}, how)
        except ValueError as cause:
            what = f"vLLM refuses it ({one_line(str(cause))[:200]})"
            raise RequestError(what, fix="ask otherwise", key="generator") from cause
        return name

    def _step(self) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            made = self.engine.step()
        except EngineDeadError as cause:
            what = "vLLM's engine has ended; what it wrote says why"
            raise ResourceError(
                what, fix="run again, with a smaller generator.memory or size", key="generator"
            ) from cause
        self.ended |= {one.request_id: one for one in made if one.finished}


def _started(node: Vllm, files: Files) -> Any:
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # answers go to standard output
    try:
        from vllm import LLM
        from vllm.platforms import current_platform
    except ImportError as cause:
        what = f"vLLM cannot be imported ({one_line(str(cause))[:200]})"
        fix = "set generator.python to that of an environment that has vLLM, or generator.url to a vllm serve that runs"
        raise ResourceError(what, fix=fix, key="generator") from cause
    try:
        return LLM(**settings(node, files, current_platform.is_cpu())).llm_engine
    except (ValueError, RuntimeError, OSError) as cause:
        what = f"vLLM does not start ({one_line(str(cause))[:200]})"
        raise ResourceError(what, fix="see what it wrote; memory, size and length bound it", key="generator") from cause


def _completion(texts: Texts, ask: Ask, made: Any) -> Completion:
    outputs = [
        output(
            texts,
            ask.sampling,
            list(one.token_ids),
            (str(one.finish_reason), one.stop_reason),
            None if one.logprobs is None else [_told(place) for place in one.logprobs],
        )
        for one in sorted(made.outputs, key=lambda one: one.index)
    ]
    prompt = made.prompt_logprobs
    told = None if prompt is None else [None if place is None else _told(place) for place in prompt]
    return completion(ask, outputs, told, made.num_cached_tokens or 0)


def _told(place: Any) -> dict[int, float]:
    return {int(id): float(one.logprob) for id, one in place.items()}

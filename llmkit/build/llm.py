"""`LLM`: a model that answers, scores and embeds, in process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Never, cast

import torch
from torch import Tensor

from llmkit.build.adapters_of import Beside
from llmkit.build.engines import engine_of as engine_of
from llmkit.build.given import Said, check_length, check_named, check_sampling, checked, several
from llmkit.build.opened import Opened
from llmkit.build.precision import reading
from llmkit.build.scores import Pooling, Scores, embed, score
from llmkit.build.spread import held
from llmkit.build.training import check, headed
from llmkit.core.errors import ModelError, RecipeError
from llmkit.data.prompt import continued, prompt_ids
from llmkit.data.render import Renderer
from llmkit.inference.engine import Engine
from llmkit.inference.engined import EngineWriter
from llmkit.inference.generate import TransformersWriter
from llmkit.inference.node import OwnEngine
from llmkit.inference.pieces import Piece, Pieces
from llmkit.inference.pulled import pulled
from llmkit.inference.pump import Pump
from llmkit.inference.request import Ask, Completion, Prompt, RequestError
from llmkit.inference.sampling import Sampling
from llmkit.inference.turns import Turns
from llmkit.inference.writer import answered, seeded
from llmkit.models.heads import Headed
from llmkit.models.resolve import resolve


class LLM:
    """A model by its name or folder, ready to be asked; `with LLM(...) as llm` gives back what it holds."""

    def __init__(
        self,
        model: Any,
        *,
        quant: Any = None,
        adapters: Mapping[str, str | Path] | None = None,
        generator: Any = "engine",
        precision: Any = "auto",
        seed: int = 0,
        device: str = "",
        allow_code: bool = False,
        tensor: int | None = None,
        placement: Any = None,
        speculation: Any = None,
        **others: Never,
    ) -> None:
        """`model`, `quant`, `generator` and `precision` are as in a recipe: names, mappings or nodes. `adapters` are
        folders by the names that they are asked for by. `tensor` and `placement` are those of the engine: processes
        that hold the model together, or devices that its layers are placed over; so is `speculation`, who drafts
        ("ngram", {"draft": model}, ...).

        Raises:
            RecipeError: an argument is wrong.
            ModelError: the model cannot be loaded, or `generator` cannot run its family.
            PeerError: another process could not be started.
        """
        check_named(others, LLM.__init__)
        asked = Opened(
            model=model,
            quant=quant,
            generator=generator,
            precision=precision,
            seed=seed,
            tensor=tensor,
            placement=placement,
            speculation=speculation,
        )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        how, kinds, resolved = asked.made, reading(asked.precision, device), resolve(asked.model)
        if adapters and not isinstance(how, OwnEngine):
            what = f"generator {how.kind} knows no adapters by name"
            raise RecipeError(what, fix="open the adapter's folder, or use generator: engine", key="adapters")
        beside = Beside(adapters or {})
        self.held = held(resolved, asked.model, kinds, device, how, beside, asked.quant, allow_code)
        self.loaded, self.seed, self.device = self.held.loaded, seed, device
        self.tokenizer, self.closed = self.loaded.tokenizer, False
        try:
            self.writer = how.open(self.held)
        except BaseException:
            self.held.close()
            raise

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engine's thread and its other processes, if there are any; nothing can be asked after it."""
        self.closed = True
        self.writer.close()
        if "pump" in self.__dict__:
            self.pump.close()
        self.held.close()

    def generate(
        self,
        prompts: str | Sequence[Said],
        sampling: Sampling | Sequence[Sampling] = Sampling(),
        on_done: Callable[[int], None] | None = None,
        adapter: str = "",
    ) -> list[Completion]:
        """A completion for each prompt (a text is a list of one), in order, one sampling for all or one for each. Where
        one is for all and draws, each prompt has a seed of its own: the sampling's, the model's and its place together.

        Raises:
            RequestError: one can never be answered.
            ModelError, DataError: a prompt cannot be rendered.
        """
        with self.held.computing():
            return answered(self.writer, self._asks(prompts, sampling, adapter), on_done)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: Sampling = Sampling(),
        tools: Sequence[Any] = (),
        adapter: str = "",
    ) -> Completion:
        """The answer to one conversation; `tools` is what it may call, as its template shows it.

        Raises:
            RequestError, ModelError, DataError: as `generate`.
        """
        with self.held.computing():
            return next(self.writer.each([self._ask(messages, sampling, tools, adapter)]))

    def stream(
        self, prompt: Said, sampling: Sampling = Sampling(), tools: Sequence[Any] = (), adapter: str = ""
    ) -> Iterator[Piece]:
        """The answers to one prompt in pieces as they are made; who leaves early frees what they held.

        Raises:
            RequestError, ModelError, DataError: as `generate`.
        """
        ask = self._ask(prompt, sampling, tools, adapter)
        if isinstance(self.writer, TransformersWriter):
            yield from (Piece((text,)) for text in pulled(partial(self._streamed, self.writer, ask)))
            return
        request, pieces = self.turns.add(ask), Pieces(ask.sampling, self.engine.texts)
        try:
            while not pieces.done:
                yield pieces.take(self.turns.next(request.id))
        finally:
            self.turns.drop(request.id)

    async def astream(
        self, prompt: Said, sampling: Sampling = Sampling(), tools: Sequence[Any] = (), adapter: str = ""
    ) -> AsyncIterator[Piece]:
        """`stream` for an event loop, which goes on while a thread computes; who is cancelled frees what it held."""
        ask = self._ask(prompt, sampling, tools, adapter)
        pieces = Pieces(ask.sampling, self.engine.texts)
        async with aclosing(self.pump.events(ask)) as events:
            async for event in events:
                yield pieces.take(event)
                if pieces.done:
                    return

    def score(self, given: str | Sequence[Said | tuple[Said, str | Sequence[int]]]) -> list[Scores]:
        """Log-probabilities of texts, or of what follows a prompt in (prompt, completion) pairs, by the trainer's own
        forward: of the full vocabulary, at temperature 1.

        Raises:
            RequestError: one is nothing that can be read, or longer than the model.
            ModelError, DataError: a text cannot be rendered.
        """
        rows = [self._scored_row(one, f"given[{at}]") for at, one in enumerate(several(given, "given"))]
        check_length([ids for ids, _ in rows], self._positions, "given")
        with self.held.computing():
            return score(self.scored, rows, self.loaded.support.packed, self.device)

    def embed(self, texts: str | Sequence[Said], pooling: Pooling = "mean", normalise: bool = True) -> Tensor:
        """(N, H), fp32: the mean of each text's last hidden states, or the `last` of them; of length 1 if `normalise`.

        Raises:
            RequestError: one is nothing that can be read, or longer than the model.
            ModelError, DataError: a text cannot be rendered.
        """
        if pooling not in ("mean", "last"):
            raise RecipeError(f"{pooling} is no pooling", fix="use mean or last", key="pooling")
        rows = [self._read(text, f"texts[{at}]") for at, text in enumerate(several(texts, "texts"))]
        check_length(rows, self._positions, "texts", least=1)
        with self.held.computing():
            return embed(self.scored, rows, self.loaded.support.packed, self.device, pooling, normalise)

    def tokens(self, said: Said, tools: Sequence[Any] = ()) -> list[int]:
        """What the model reads.

        Raises:
            ModelError, DataError: it cannot be rendered.
        """
        first = said[0] if said and not isinstance(said, str) else ""
        if isinstance(first, int) or (not said and not isinstance(said, str)):
            return list(cast(Sequence[int], said))
        return prompt_ids(self.renderer, cast("str | Sequence[Mapping[str, Any]]", said), tools)

    @cached_property
    def renderer(self) -> Renderer:
        """From messages and texts to tokens."""
        return Renderer(self.tokenizer)

    @cached_property
    def scored(self) -> Headed:
        """The model with the head that training has.

        Raises:
            ModelError: the head is not what the model itself does, or the model does not lie whole in one place.
        """
        if self.held.apart:
            what = f"score and embed run the whole model in one place, and {self.held.apart}"
            raise ModelError(what, fix="open it without tensor and placement", key="generator")
        made = headed(self.loaded, self.loaded.model).eval()
        check(made)
        return made

    @property
    def turns(self) -> Turns:
        """The engine, for those who ask it for themselves.

        Raises:
            ModelError: text is not made by the engine.
        """
        if not isinstance(self.writer, EngineWriter):
            what = "generator transformers is asked from one thread alone"
            raise ModelError(what, fix="use generate or stream, or generator: engine", key="generator")
        return self.writer.turns

    @property
    def engine(self) -> Engine:
        """Of `turns`; whoever steps it himself asks it for everybody."""
        return self.turns.engine

    @property
    def longest(self) -> int | None:
        """Tokens of a prompt and its answer together, at most; None where another generator has bounds of its own."""
        return self.engine.facts.longest if isinstance(self.writer, EngineWriter) else None

    @property
    def adapters(self) -> list[str]:
        """The names that can be asked for."""
        return self.engine.adapters.names if isinstance(self.writer, EngineWriter) else []

    @cached_property
    def pump(self) -> Pump:
        """The engine's thread."""
        return Pump(self.turns)

    def _streamed(self, writer: TransformersWriter, ask: Ask, say: Callable[[str], None]) -> None:
        with self.held.computing():
            writer.stream(ask, say)

    def _asks(self, prompts: Sequence[Said], sampling: Sampling | Sequence[Sampling], adapter: str) -> Iterator[Ask]:
        check_sampling(sampling)
        made = [
            Prompt(tuple(self._read(said, f"prompts[{at}]"))) for at, said in enumerate(several(prompts, "prompts"))
        ]
        if isinstance(sampling, Sampling):
            for ask in seeded(made, sampling, self.seed):
                yield Ask(ask.prompt, ask.sampling, adapter)
            return
        if len(sampling) != len(made):
            what = f"{len(sampling)} for {len(made)} prompts"
            raise RecipeError(what, fix="give one, or one for each", key="sampling")
        yield from (Ask(prompt, own, adapter) for prompt, own in zip(made, sampling, strict=True))

    def _ask(self, said: Said, sampling: Sampling, tools: Sequence[Any], adapter: str) -> Ask:
        check_sampling([sampling])
        (seeded_one,) = seeded([Prompt(tuple(self._read(said, "prompt", tools)))], sampling, self.seed)
        return Ask(seeded_one.prompt, seeded_one.sampling, adapter)

    def _read(self, said: Any, key: str, tools: Sequence[Any] = ()) -> list[int]:
        if self.closed:
            raise ModelError("this LLM is closed", fix="open another", key="LLM")
        return self.tokens(checked(said, key), tools)

    @property
    def _positions(self) -> int | None:
        """Of the model, where its configuration tells."""
        return getattr(self.loaded.model.config.get_text_config(), "max_position_embeddings", None)

    def _scored_row(self, one: Any, key: str) -> tuple[list[int], int]:
        if not (isinstance(one, tuple) and len(one) == 2 and not isinstance(one[1], int)):
            return self._read(one, key), 0
        prompt, completion = checked(one[0], key), checked(one[1], key)
        if isinstance(completion, str):
            if isinstance(prompt, str) or (prompt and not isinstance(prompt[0], int)):
                return continued(self.renderer, cast("str | Sequence[Mapping[str, Any]]", prompt), completion)
            raise RequestError("a prompt of tokens has a completion of text", fix="give both alike", key=key)
        before = self._read(prompt, key)
        return [*before, *cast(Sequence[int], completion)], len(before)

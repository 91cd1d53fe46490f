"""What makes text, whichever member of the `generator` union it is: asks in, completions out, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from llmkit.inference.request import Ask, Completion, Prompt, RequestError
from llmkit.inference.sampling import Sampling

if TYPE_CHECKING:
    from llmkit.inference.engine import Engine
    from llmkit.inference.node import OwnEngine


class Writer(Protocol):
    """A generator that is open."""

    def each(self, asks: Iterable[Ask]) -> Iterator[Completion]:
        """A completion for each ask, in their order; asks are taken as there is room for them."""
        ...

    def close(self) -> None:
        """Gives back what it holds."""
        ...


@dataclass(frozen=True)
class Files:
    """A model that another program can read for itself."""

    folder: Path
    precision: Literal["fp32", "bf16", "fp16"]
    """What its weights are held in here."""


class Held(Protocol):
    """A model in this process, as a generator takes it."""

    @property
    def model(self) -> Any:
        """Of transformers, perhaps with an adapter."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        ...

    def computing(self) -> AbstractContextManager[Any]:
        """What products run under: autocast, or nothing."""
        ...

    def engine(self, how: OwnEngine) -> Engine:
        """An engine over it."""
        ...

    def files(self) -> Files:
        """Where the model is, as it is held.

        Raises:
            ModelError: no files hold it so: it has an adapter, was changed, or is in training.
        """
        ...


def seeded(prompts: Iterable[Prompt], sampling: Sampling, first: int = 0) -> Iterator[Ask]:
    """Each prompt with `sampling`; where it draws, the i-th from `first` on with a seed of its own, so that answers do
    not depend on where a list was cut in two."""
    for index, prompt in enumerate(prompts, first):
        own = replace(sampling, seed=sampling.seed + index) if sampling.temperature else sampling
        yield Ask(prompt, own)


def answered(writer: Writer, asks: Iterable[Ask], on_done: Callable[[int], None] | None = None) -> list[Completion]:
    """A completion for each ask, in order; `on_done` is told how many there are."""
    made: list[Completion] = []
    for completion in writer.each(asks):
        made.append(completion)
        if on_done is not None:
            on_done(len(made))
    return made


def generate(
    writer: Writer, prompts: Sequence[Prompt], sampling: Sampling, on_done: Callable[[int], None] | None = None
) -> list[Completion]:
    """The same for each prompt with one sampling, as `seeded` gives it to them."""
    return answered(writer, seeded(prompts, sampling), on_done)


def refuse(kind: str, sampling: Sampling, able: Iterable[str]) -> None:
    """Raises: RequestError when `sampling` asks for what generator `kind` cannot do; `able` names what it can."""
    plain, known = Sampling(), set(able)
    for field in fields(sampling):
        if field.name not in known and getattr(sampling, field.name) != getattr(plain, field.name):
            what = f"generator {kind} has no {field.name}"
            raise RequestError(what, fix="leave it out, or use generator: engine", key=field.name)


def refuse_functions(kind: str, ask: Ask) -> None:
    """Raises: RequestError when functions of Python are to move the logits, which generator `kind` does not have."""
    if ask.processors:
        what = f"generator {kind} runs no functions of ours"
        raise RequestError(what, fix="leave them out, or use generator: engine", key="processors")

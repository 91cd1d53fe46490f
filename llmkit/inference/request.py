"""What the engine is asked, and what it answers."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from llmkit.core.errors import DataError, LlmkitError, below
from llmkit.inference.sampling import Sampling

if TYPE_CHECKING:
    from torch import Tensor


class RequestError(DataError):
    """A request that cannot be carried out; `key` names its field."""


class Busy(RequestError):
    """The same for now alone: it is worth asking again."""


class InternalError(RequestError):
    """What nobody foresaw came of it: a fault of ours, by its cause, and none of the request."""

    @property
    def trace(self) -> str:
        """Where it came from, for a log."""
        return traced(self.__cause__ or self)


@contextmanager
def asked_by(key: str, names: Mapping[str, str] = {}) -> Iterator[None]:
    """Inside, what is wrong with a request is told by the recipe's keys: by `names`, or below `key`, once."""
    try:
        yield
    except RequestError as error:
        error.each(lambda said: replace(said, key=names.get(said.key) or below(said.key, key, key)))
        raise


def traced(cause: BaseException) -> str:
    """Where an error came from, for a log."""
    return "".join(traceback.format_exception(cause))


@contextmanager
def alone(what: str) -> Iterator[None]:
    """Inside, what nobody foresaw ends the request that it is done for, and no other.

    Raises:
        InternalError: `what`, and by which error.
    """
    try:
        yield
    except LlmkitError:
        raise
    except Exception as cause:
        raise InternalError(f"{what} ({type(cause).__name__}: {cause})", fix="report it") from cause


Processor = Callable[[Sequence[int], Sequence[int], "Tensor"], "Tensor"]
"""(prompt, made so far, logits (V,)) -> logits (V,); it may change what it is given."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: in its tokens, and as it was said, for an endpoint that reads no tokens of ours."""

    ids: tuple[int, ...]
    said: str | tuple[Mapping[str, Any], ...] = ""
    """A text, or messages; empty where there are tokens alone."""
    tools: tuple[Any, ...] = ()
    """What the messages may call."""


@dataclass(frozen=True)
class Ask:
    """One prompt, and how it is to be answered."""

    prompt: Prompt
    sampling: Sampling = Sampling()
    adapter: str = ""
    """By its name; empty is the model itself."""
    processors: tuple[Processor, ...] = ()
    """Functions that move the logits, in Python alone."""
    prediction: tuple[int, ...] = ()
    """Tokens that the answer may repeat, in whole or in parts: where drafts are looked up, they are looked up here too.
    What is chosen is the same."""


Finish = Literal["stop", "length", "abort", "deadline", "error"]


@dataclass(frozen=True)
class Request:
    """One prompt, to be answered `sampling.n` times."""

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling = Sampling()
    adapter: str = ""
    """By the name under which it was loaded; empty is the base model."""
    tenant: str = ""
    """Whose it is: prefixes are shared, and turns are dealt, by tenant."""
    priority: int = 0
    """Lower goes first."""
    deadline: float | None = None
    """On `time.monotonic`'s clock: at it a request that has not begun is dropped, and one that has is ended."""
    arrived: float = field(default_factory=time.monotonic)
    processors: tuple[Processor, ...] = ()
    """Functions that move the logits, in Python alone; one that fails ends this request and no other."""
    prediction: tuple[int, ...] = ()
    """Tokens that the answer may repeat: drafts are looked up in them too."""


@dataclass(frozen=True)
class Token:
    """One token, and how likely it was."""

    id: int
    logprob: float | None
    """By the model itself: of the full vocabulary, before temperature, penalties and truncation; where it was asked."""
    sampling_logprob: float | None
    """By the law that it was drawn from; 0 where it was the likeliest and no other could be. The engine always tells
    it; generator vllm does not of what it draws."""
    top: Mapping[int, float] = field(default_factory=dict)
    """The likeliest tokens of the full vocabulary, as many as were asked for."""


@dataclass(frozen=True)
class Event:
    """What a step did for one answer of a request."""

    request: str
    index: int
    """Which of the n."""
    tokens: tuple[Token, ...]
    finish: Finish | None = None
    why: str = ""
    """Of an error."""
    prompt: tuple[Token | None, ...] | None = None
    """With the first event, where log-probabilities of the prompt were asked for; the first token has none."""
    cached: int = 0
    """Tokens of the prompt that were found in the cache."""
    stopped: int | str | None = None
    """The token or the text that ended it, where it was one that the request named."""
    version: int = 0
    """Of the weights that made it."""
    trace: str = ""
    """Of an error that is a fault of ours: where it came from, for a log."""
    drafted: int = 0
    """Drafts that were looked at for it."""
    accepted: int = 0
    """Those of them that are among `tokens`."""
    steps: int = 1
    """That made `tokens`."""

    @property
    def said(self) -> tuple[Token, ...]:
        """The tokens that are part of the answer: one that ended it is none."""
        ended = self.finish == "stop" and not isinstance(self.stopped, str)
        return self.tokens[:-1] if ended else self.tokens


@dataclass(frozen=True)
class Output:
    """One of the n answers."""

    text: str
    token_ids: tuple[int, ...]
    """Without the token that ended it."""
    finish_reason: str
    logprobs: tuple[Token, ...] = ()
    """Of each of `token_ids`, where they were asked for."""
    stop_reason: int | str | None = None
    why: str = ""
    """Of an error: what it was."""


@dataclass(frozen=True)
class Completion:
    """What was made of one prompt: the first of its answers as fields of its own, and all of them."""

    outputs: tuple[Output, ...]
    prompt_tokens: int
    prompt_logprobs: tuple[Token | None, ...] | None = None
    cached_tokens: int = 0
    version: int = 0
    """Of the weights that its first token was made with."""

    @property
    def text(self) -> str:
        """Of the first answer."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the first answer."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str:
        """Of the first answer: stop, length, abort, deadline or error."""
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> tuple[Token, ...]:
        """Of the first answer."""
        return self.outputs[0].logprobs

    @property
    def why(self) -> str:
        """Of the first answer that failed, what it failed of."""
        return next((one.why for one in self.outputs if one.why), "")

    def sound(self) -> Completion:
        """Itself, for whom half an answer is of no use.

        Raises:
            RequestError: an answer failed.
        """
        if self.why:
            raise RequestError(f"an answer failed: {self.why}")
        return self


def telling(sampling: Sampling, ends: Sequence[int]) -> Sampling:
    """The same, which names the tokens that end a text of the model: an answer tells only of such by which it ended."""
    named = () if sampling.ignore_eos else ends
    return replace(sampling, stop_ids=tuple(dict.fromkeys((*sampling.stop_ids, *named))))


def ended(completion: Completion) -> list[int]:
    """The tokens of an answer with the one that ended it, which is to be foretold too; of one whose sampling named the
    tokens that end it (`telling`)."""
    said = completion.outputs[0]
    return [*said.token_ids, said.stop_reason] if isinstance(said.stop_reason, int) else list(said.token_ids)

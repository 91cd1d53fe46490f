"""The `generator` union: where text comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from llmkit.core.config import Conflict, Duration, Size, config, setting
from llmkit.inference.cache import Cache
from llmkit.inference.sampling import Sampling
from llmkit.inference.scheduler import Limits
from llmkit.inference.speculation.node import Speculation

if TYPE_CHECKING:
    from llmkit.inference.writer import Held, Writer

Placement = Literal["auto"] | Mapping[str, Size]
"""`auto` fills the devices that there are, then the host; or how much of each: `{"cuda:0": 10GiB, cpu: 20GiB}`."""
ADDRESS = re.compile(r"https?://[^/\s]+")
COOLEST, HOTTEST = 0.01, 2.0
"""Temperatures between which vLLM draws: it raises lower ones, and refuses higher ones."""
USUAL, LONG = 2048, 32_768
"""Tokens of a text that a judge, a critic or a teacher reads and writes, and of a long one."""
PLACES = re.compile(r"cpu|disk|cuda:\d+")


@config
class OwnEngine:
    """llmkit's engine, in process: continuous batching over a paged cache."""

    kind: Literal["engine"] = "engine"
    sequences: int = setting(default=Limits.sequences, least=1)
    """Answers that are made at once."""
    tokens: int | None = setting(default=None, least=1)
    """Tokens of one step, over all of them: long prompts are read in parts of it, and who comes meanwhile waits until
    it ends. Left out: 256 on a CPU; 2,048 on a GPU, which reads as many in about the same time."""
    cache: Cache = Cache()
    """Where keys and values are kept."""
    exact: bool = False
    """Whether what a request gets must be the same to the bit whatever is made beside it. It is on a CPU in fp32 where
    kernels are compiled (`llmkit doctor`); elsewhere this makes it so at a cost, or refuses."""
    tensor: int = setting(default=1, least=1)
    """Processes of this host that hold the model together, each a part of every layer and of the cache."""
    placement: Placement | None = None
    """Where the layers of a model lie that no single device holds: `auto`, or what each of cuda:N, cpu and disk takes.
    Left out, all of it lies on the one device that computes."""
    speculation: Speculation | None = None
    """What drafts the tokens that follow, so that several are looked at in one step. The text is the same with it."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        if self.placement is not None and self.tensor > 1:
            what = f"a model that {self.tensor} processes hold together is not placed over devices"
            yield Conflict("placement", what, "leave one of them out", "tensor")
        if self.exact and self.tensor > 1:
            what = f"what {self.tensor} processes add up has no order of its own"
            yield Conflict("exact", what, "leave one of them out", "tensor")
        if self.tensor > 1 and self.speculation is not None and self.speculation.within:
            what = f"{self.speculation.kind} runs layers of which each of {self.tensor} processes has a part"
            yield Conflict("speculation", what, "draft by ngram or by a model", "tensor")
        for name in self.placement if isinstance(self.placement, Mapping) else ():
            if not PLACES.fullmatch(name):
                yield Conflict(f"placement.{name}", f"{name} is no device", "name cpu, disk or cuda:N")

    @property
    def room(self) -> int | None:
        """Tokens that the cache need not hold more of where it stands beside a model in training, unless its size is
        said: all answers that are made at once, of usual length with what was asked, or one that is long."""
        return max(self.sequences * USUAL, LONG) if self.cache.size is None else None

    def open(self, held: Held) -> Writer:
        """Ready to be asked.

        Raises:
            ModelError: the model's family cannot read a paged cache.
        """
        from llmkit.inference.engined import EngineWriter
        from llmkit.inference.turns import Turns

        return EngineWriter(Turns(held.engine(self), held.computing))

    def refuse(self, sampling: Sampling) -> None:
        """It can do all of it."""


@config
class Transformers:
    """transformers' own `generate`, in process: for families that the engine cannot run."""

    kind: Literal["transformers"] = "transformers"
    batch: int = setting(default=16, least=1)
    """Prompts at a time, sorted by length."""

    def open(self, held: Held) -> Writer:
        """Ready to be asked."""
        from llmkit.inference.generate import TransformersWriter

        return TransformersWriter(held.model, held.tokenizer, self.batch)

    def refuse(self, sampling: Sampling) -> None:
        """Raises: RequestError when `sampling` asks for what it cannot do."""
        from llmkit.inference.writer import refuse

        refuse(self.kind, sampling, ABLE)


ABLE = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "max_tokens",
    "min_tokens",
    "seed",
    "stop_ids",
    "ignore_eos",
    "repetition_penalty",
)
"""What transformers' `generate` does as the engine does it."""


@config
class OpenAi:
    """Another's endpoint that speaks OpenAI's routes; what was said goes there as it was said, and its tokens are its
    own."""

    kind: Literal["openai"] = "openai"
    url: str
    """Up to and with `/v1`."""
    model: str
    """By the name that it has there."""
    key: str = ""
    """Such as `${env:OPENAI_API_KEY}`."""
    at_once: int = setting(default=16, least=1)
    """Requests that are under way together."""
    tries: int = setting(default=5, least=1)
    """Of one request: what is overloaded or cannot be reached is asked again, later each time."""
    timeout: Duration = setting(default=600.0, above=0)
    """Of one try."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        yield from _address(self.url)

    def open(self, held: Held | None = None) -> Writer:
        """Ready to be asked; what is held here is no matter to it."""
        from llmkit.inference.openai import OpenAiWriter

        return OpenAiWriter(self)

    def refuse(self, sampling: Sampling) -> None:
        """Raises: RequestError when `sampling` asks for what its routes have no word for."""
        from llmkit.inference.writer import refuse

        refuse(self.kind, sampling, SPOKEN)


SPOKEN = (
    *("temperature", "top_p", "max_tokens", "seed", "n", "stop", "presence_penalty", "frequency_penalty"),
    "logit_bias",
)
"""What OpenAI's routes have words for."""


@config
class Vllm:
    """vLLM, for machines that have it: served already (`url`), started from an environment of its own (`python`), or
    else in this process. It reads tokens of ours, and the model's own files."""

    kind: Literal["vllm"] = "vllm"
    url: str = ""
    """Of a running `vllm serve`, up to and with `/v1`."""
    model: str = ""
    """By the name that it has at `url`."""
    key: str = ""
    """For `url`, such as `${env:VLLM_API_KEY}`."""
    python: str = ""
    """The interpreter of an environment that has vLLM: it pins other releases of transformers than ours."""
    sequences: int = setting(default=Limits.sequences, least=1)
    """Answers that are made at once; by `url`, requests that are under way together."""
    length: int | None = setting(default=None, least=1)
    """Tokens of a prompt and its answer; left out, what the model allows."""
    memory: float = setting(default=0.9, above=0.0, most=1.0)
    """The share that it takes of each GPU's memory. On a CPU its cache takes 2 GiB, or `size`."""
    size: Size | None = setting(default=None, least=1)
    """Bytes of its cache instead."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What it computes in; auto: what the model's weights are held in here."""
    tensor: int = setting(default=1, least=1)
    """GPUs that share each layer."""
    tries: int = setting(default=5, least=1)
    """Of one request to a server: what is overloaded or cannot be reached is asked again, later each time."""
    timeout: Duration = setting(default=600.0, above=0)
    """Of one try, and of the start of a server."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        if self.url:
            yield from _address(self.url)
        if self.url and self.python:
            yield Conflict("python", "what is served is not started", "leave it out", "url")
        if self.url and not self.model:
            yield Conflict("model", "is empty", "give the name that it has there", "url")
        for key in ("model", "key"):
            if getattr(self, key) and not self.url:
                yield Conflict(key, "is for url alone", "leave it out, or give a url", "url")

    def open(self, held: Held) -> Writer:
        """Ready to be asked.

        Raises:
            ModelError: the model is in no files as it is held here.
            ResourceError: vLLM is not there, or does not start.
        """
        from llmkit.inference.text import Texts

        texts = Texts(held.tokenizer)
        if self.url:
            from llmkit.inference.endpoint import Manners
            from llmkit.inference.vllm_served import VllmServed

            manners = Manners(self.url, self.key, self.sequences, self.tries, self.timeout)
            return VllmServed(manners, self.model, texts)
        if self.python:
            from llmkit.inference.vllm_start import served

            return served(self, held.files(), texts)
        from llmkit.inference.vllm_here import VllmHere

        return VllmHere(self, held.files(), texts)

    def refuse(self, sampling: Sampling) -> None:
        """Raises: RequestError when `sampling` asks for what vLLM does not do, or does otherwise."""
        from llmkit.inference.vllm_words import check_sampling

        check_sampling(sampling)


def _address(url: str) -> Iterator[Conflict]:
    """What is no address of a server would be found out after all tries, by another name."""
    if not ADDRESS.match(url):
        yield Conflict(
            "url", f"{url!r} does not begin with http:// or https:// and a host", "write http://HOST:PORT/v1"
        )


Generator = OwnEngine | Transformers | OpenAi | Vllm

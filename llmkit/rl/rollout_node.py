"""The recipe's `rollout` node: how a policy answers the prompts that it learns from."""

from __future__ import annotations

from collections.abc import Iterator

from llmkit.core.config import Conflict, config, setting
from llmkit.inference.node import COOLEST, HOTTEST, OwnEngine, Vllm
from llmkit.inference.sampling import Sampling
from llmkit.rl.environment_node import EnvironmentNode


@config
class Rollout:
    """Answers to a step's prompts, drawn by the engine from the weights that are trained."""

    group: int = setting(default=8, least=1, most=65536)
    """Answers to each prompt."""
    max_tokens: int = setting(default=256, least=1)
    """Of an answer; together with its prompt it has at most `data.max_length`."""
    temperature: float = setting(default=1.0, above=0.0)
    """Of the law that answers are drawn from; the same law is trained."""
    reuse: int = setting(default=1, least=1)
    """How often answers are learned from before new ones are drawn."""
    parts: int = setting(default=1, least=1)
    """Optimizer steps in which all answers are learned from once: each sees so many of them, by prompts, in an order
    that is drawn anew each time."""
    asynchronous: int = setting(default=0, least=0, most=1)
    """1: the next answers are drawn while steps learn from these, from the weights as they were when those steps
    began; tokens count by truncated importance weights then (`loss.truncate`)."""
    ranks: int = setting(default=0, least=0)
    """The last ranks of the run, so many, that draw and do not train: each has an engine over a whole model of its own,
    which is fed before each rollout. 0: every rank draws from what it trains."""
    redraw: int = setting(default=0, least=0)
    """How often prompts whose answers are all worth the same are replaced by others, of which something can be learned
    (DAPO's dynamic sampling, arXiv:2503.14476)."""
    drop_unended: bool = False
    """Whether answers that `max_tokens` cut short teach nothing, though they count in their group
    (overlong filtering, arXiv:2503.14476)."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer."""
    environment: EnvironmentNode | None = None
    """What answers calls of tools: then an answer is a conversation, of which the model's own words are trained, and
    `max_tokens` is of each of its answers."""
    engine: OwnEngine = OwnEngine()
    """What draws."""
    vllm: Vllm | None = None
    """A running `vllm serve` that draws in its place: `url`, and by `model` the name of the model that is trained. Each
    version of the weights is written into the run's folder, where the server has to read it."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        yield from self._odd_server()
        yield from self._odd_ranks()
        if self.engine.tensor > 1 or self.engine.placement is not None:
            what = "answers are drawn from the weights that this process trains"
            yield Conflict("engine", what, "leave out engine.tensor and engine.placement", "engine.tensor")

    def _odd_ranks(self) -> Iterator[Conflict]:
        """What ranks of their own do not do."""
        if not self.ranks:
            return
        if self.asynchronous:
            what = "what is drawn ahead is drawn by a thread of the process that trains"
            yield Conflict("ranks", what, "set rollout.ranks=0, or rollout.asynchronous=0", "asynchronous")
        if self.vllm is not None:
            yield Conflict("ranks", "vllm draws in their place", "leave one of them out", "vllm")

    def _odd_server(self) -> Iterator[Conflict]:
        if self.vllm is None:
            return
        if not self.vllm.url:
            yield Conflict("vllm.url", "weights are told a server that runs", "give its address", "vllm")
        if self.asynchronous:
            what = "what is drawn ahead is counted by a copy of the weights that is here"
            yield Conflict("asynchronous", what, "set rollout.asynchronous=0, or drop vllm", "vllm")
        plain = Vllm()
        for key in ("length", "memory", "size", "precision", "tensor"):
            if getattr(self.vllm, key) != getattr(plain, key):
                yield Conflict(f"vllm.{key}", "who runs already has its own", "leave it out", "vllm")
        if self.engine != OwnEngine():
            yield Conflict("engine", "vllm draws in its place", "leave one of them out", "vllm")
        if not COOLEST <= self.temperature <= HOTTEST:
            what = f"vllm draws at {COOLEST} to {HOTTEST}"
            yield Conflict("temperature", what, "use one of these, or the engine", "vllm")

    @property
    def steps(self) -> int:
        """Optimizer steps that learn from the same answers, one after the other."""
        return self.reuse * self.parts

    def sampling(self, seed: int, room: int, ends: tuple[int, ...]) -> Sampling:
        """Of all answers to one prompt, which leaves `room` tokens; `ends` are those that end a text of the model."""
        return Sampling(
            temperature=self.temperature,
            max_tokens=min(self.max_tokens, room),
            n=self.group,
            seed=seed,
            stop=self.stop,
            stop_ids=ends,
            logprobs=0,
        )

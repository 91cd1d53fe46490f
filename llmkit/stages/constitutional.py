"""`kind: constitutional`: supervised rows and preferences, made by models that hold to written principles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal

from llmkit.build.precision import Reading
from llmkit.core.config import Conflict, config, setting
from llmkit.core.errors import told_below
from llmkit.core.seed import LARGEST
from llmkit.data.source_nodes import Source
from llmkit.inference.node import Generator, OpenAi, OwnEngine
from llmkit.inference.sampling import Sampling
from llmkit.models.node import ModelRef, Quant
from llmkit.rl.role_node import Role

if TYPE_CHECKING:
    from llmkit.core.artifact import Artifact
    from llmkit.core.run import Run


@config
class Constitutional:
    """Constitutional AI (arXiv:2212.08073). A model answers; a critic looks at the answer in the light of principles
    that are drawn for the row, and a reviser writes it anew where it goes against one: `supervised.jsonl`. Of two
    answers a judge says by a drawn principle which is the better, asked in both orders: `preferences.jsonl`. A later
    stage reads them as `{kind: jsonl, path: "${stages.NAME}/supervised.jsonl"}`."""

    kind: Literal["constitutional"] = "constitutional"
    generator: Generator = OwnEngine()
    """Where the answers come from."""
    model: ModelRef | None = None
    """What answers, unless the generator is an endpoint."""
    quant: Quant | None = None
    """How it is held; left out, an adapter's base as in its training."""
    sampling: Sampling = setting(default_factory=lambda: Sampling(temperature=1.0, max_tokens=512))
    """How the answers are chosen: two of each prompt are compared."""
    prompts: tuple[Source, ...]
    """What is asked: rows with a `prompt` (text or messages), or with an answer, which is left out."""
    harmless: tuple[Source, ...] = ()
    """Harmless prompts, of whose answers is told how many are refusals, before and after they were revised."""
    rows: int | None = setting(default=None, least=1)
    """At most so many prompts of each of both, from all over them; all where it is left out."""
    constitution: str = "plain"
    """A file of principles, or `plain`, those of llmkit."""
    makes: tuple[Literal["supervised", "preferences"], ...] = ("supervised", "preferences")
    """Which rows are made."""
    rounds: int = setting(default=2, least=1, most=100)
    """How often an answer is looked at, each time by another principle."""
    critic: Role | None = None
    """Who looks at answers; left out, the model itself."""
    reviser: Role | None = None
    """Who writes them anew; left out, the critic."""
    judge: Role | None = None
    """Who compares answers; left out, the critic."""
    votes: int = setting(default=1, least=1, most=100)
    """How often the judge is asked in each order; more than one say more where its sampling draws."""
    clip: float = setting(default=0.05, least=0.0, below=0.5)
    """Labels lie between this and 1 less this: a judge is never quite sure."""
    disagreeing: Literal["drop", "weigh"] = "drop"
    """Pairs of which each order has another better answer: left out, or kept with a `weight` that is small."""
    precision: Reading = "auto"
    """`auto` is fp32 on CPU and bf16 on GPUs."""
    seed: int = setting(default=0, least=0, most=LARGEST)
    out: str
    """The run's folder."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        if isinstance(self.generator, OpenAi) and self.model is not None:
            yield Conflict("model", "the endpoint has a model of its own", "leave one of them out", "generator")
        elif not isinstance(self.generator, OpenAi) and self.model is None:
            yield Conflict("model", "there is none", "name it, or use generator: {kind: openai, url: ...}")
        if not self.prompts:
            yield Conflict("prompts", "is empty", "name at least one source")
        if not self.makes:
            yield Conflict("makes", "is empty", "name supervised, preferences or both")
        if self.sampling.n > 1:
            yield Conflict("sampling.n", "two answers are made where two are compared", "leave it out")
        if "preferences" in self.makes and not self.sampling.temperature:
            what = "two answers that are not drawn are one"
            yield Conflict("sampling.temperature", what, "raise it, or set makes: [supervised]", "makes")
        if self.harmless and "supervised" not in self.makes:
            what = "nothing is revised, so that there is no after"
            yield Conflict("harmless", what, "leave it out, or make supervised rows", "makes")

    def ready(self) -> None:
        """Sees to it, before anything is made, that who is asked has room for what it is to say.

        Raises:
            ModelError: a model is not there.
            RecipeError: answers are past its positions.
        """
        for place, role in {"": self.own, "critic": self.critic, "reviser": self.reviser, "judge": self.judge}.items():
            with told_below(place) if place else nullcontext():
                if role is not None:
                    role.ready()

    @property
    def own(self) -> Role:
        """The model itself, as it is asked about answers: the likeliest words, as many as for an answer."""
        sampling = Sampling(max_tokens=self.sampling.max_tokens)
        return Role(generator=self.generator, model=self.model, quant=self.quant, sampling=sampling)

    def run(self, run: Run) -> Artifact:
        """Makes the rows, step by step, and leaves them with the report and the manifest."""
        from llmkit.stages.constitution_run import made

        return made(self, run)

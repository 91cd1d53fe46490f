"""`kind: best_of`: several answers to each prompt, of which the best, or all above a bar, become rows to train on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from llmkit.build.precision import Reading
from llmkit.core.config import Conflict, config, setting
from llmkit.data.node import Source
from llmkit.inference.node import Generator, OwnEngine
from llmkit.inference.sampling import Sampling
from llmkit.models.node import ModelRef, Quant
from llmkit.rl.kept_node import Best, Keep
from llmkit.rl.rewards_node import Reward, twice

if TYPE_CHECKING:
    from llmkit.core.artifact import Artifact
    from llmkit.core.run import Run


@config
class BestOf:
    """Best-of-n and rejection sampling: a model answers each prompt several times, rewards score the answers, and those
    that are kept are written to `rows.jsonl`, in a format that `sft` or `preference` trains on. `answers.jsonl` has all
    of them with every score. A run that was interrupted goes on."""

    kind: Literal["best_of"] = "best_of"
    model: ModelRef
    """Who answers; where an endpoint does, whose tokenizer measures prompts."""
    quant: Quant | None = None
    """How it is held; left out, an adapter's base is held as it was in training."""
    data: tuple[Source, ...]
    """Rows with a `prompt`, and the columns that rewards read; of rows with an answer, that is the column `answer`."""
    system: str | None = None
    """The system message of conversations that have none."""
    max_length: int = setting(default=2048, least=2, most=1 << 24)
    """Tokens of a prompt and its answer together; longer prompts are left out."""
    rows: int | None = setting(default=None, least=1)
    """At most so many prompts, evenly apart."""
    samples: int = setting(default=8, least=1, most=65536)
    """Answers to each prompt."""
    sampling: Sampling = setting(default_factory=lambda: Sampling(temperature=1.0, max_tokens=256))
    """How they are chosen."""
    generator: Generator = OwnEngine()
    """Where they come from."""
    reward: Reward | tuple[Reward, ...]
    """What they are worth: one, or a list whose weighted sum counts."""
    keep: Keep = Best()
    """Which of them become rows."""
    precision: Reading = "auto"
    """`auto` is fp32 on CPU and bf16_mixed on GPUs."""
    seed: int = setting(default=0, least=0)
    """Each prompt has one of its own, which follows from it."""
    out: str
    """The run's folder."""

    @property
    def rewards(self) -> tuple[Reward, ...]:
        """All of them."""
        return self.reward if isinstance(self.reward, tuple) else (self.reward,)

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        for key in ("tensor", "placement") if isinstance(self.generator, OwnEngine) else ():
            if getattr(self.generator, key) != getattr(OwnEngine(), key):
                what, fix = "the model is read whole in this process", f"serve it with {key}; use generator: openai"
                yield Conflict(f"generator.{key}", what, fix)
        if self.sampling.n > 1:
            yield Conflict("sampling.n", "how many answers there are is samples", "leave it out", "samples")
        if self.samples > 1 and self.sampling.temperature == 0:
            what = "the likeliest answer is always the same"
            yield Conflict("sampling.temperature", what, "raise it, or set samples: 1", "samples")
        if self.samples < self.keep.least:
            what = f"{self.samples} answers are too few to keep {self.keep.kind}"
            yield Conflict("samples", what, f"give {self.keep.least} or more", "keep.kind")
        yield from twice(self.rewards)

    def run(self, run: Run) -> Artifact:
        """Writes `answers.jsonl`, `rows.jsonl`, `evals.jsonl` and the report."""
        from llmkit.stages.build_best import best_of

        return best_of(self, run)

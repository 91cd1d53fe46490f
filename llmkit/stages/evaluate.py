"""`kind: evaluate`: tasks over a model, with a table of predictions and intervals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from llmkit.build.precision import Reading
from llmkit.core.config import Conflict, config, setting
from llmkit.evals.tasks import Task
from llmkit.inference.node import Generator, OwnEngine
from llmkit.models.node import ModelRef, Quant

if TYPE_CHECKING:
    from llmkit.core.artifact import Artifact
    from llmkit.core.run import Run


@config
class Evaluate:
    """Perplexity, generation and multiple-choice tasks over a model; every figure with a 95 % interval."""

    kind: Literal["evaluate"] = "evaluate"
    model: ModelRef
    quant: Quant | None = None
    """How the base is held; left out, an adapter's base is held as it was in training."""
    tasks: tuple[Task, ...]
    """What is asked."""
    generator: Generator = OwnEngine()
    """Where text comes from."""
    precision: Reading = "auto"
    """`auto` is fp32 on CPU and bf16_mixed on GPUs."""
    seed: int = setting(default=0, least=0)
    out: str
    """The run's folder."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        names = [task.name for task in self.tasks]
        for key in ("tensor", "placement") if isinstance(self.generator, OwnEngine) else ():
            if getattr(self.generator, key) != getattr(OwnEngine(), key):
                what, fix = "tasks read the whole model in this process", f"serve it with {key}; use generator: openai"
                yield Conflict(f"generator.{key}", what, fix)
        if not names:
            yield Conflict("tasks", "is empty", "name at least one task")
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            first, second = [index for index, name in enumerate(names) if name == twice][:2]
            what, fix = f"two tasks are called {twice}", "give each its own name"
            yield Conflict(f"tasks.{second}", what, fix, f"tasks.{first}")

    def run(self, run: Run) -> Artifact:
        """Writes `predictions.jsonl`, `evals.jsonl` and the report."""
        from llmkit.stages.build_inference import evaluate

        return evaluate(self, run)

"""`kind: sft`: supervised fine-tuning of an adapter or of every weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from llmkit.adapters.node import Adapter, Lora
from llmkit.core.config import Conflict, config, setting
from llmkit.data.node import Data, FirstFit
from llmkit.models.node import ModelRef, NoQuant, Quant
from llmkit.train.node import (
    AdamW,
    Batching,
    Checkpointing,
    Cosine,
    Evaluating,
    Guard,
    Log,
    Memory,
    Optim,
    Parallel,
    Precision,
    Schedule,
)

if TYPE_CHECKING:
    from llmkit.core.artifact import Artifact
    from llmkit.core.run import Run


@config
class Sft:
    """Supervised fine-tuning."""

    kind: Literal["sft"] = "sft"
    model: ModelRef
    quant: Quant = NoQuant()
    """How the frozen base is held."""
    adapter: Adapter = Lora()
    """What is trained; `none` trains every weight."""
    data: Data
    batch: Batching = Batching()
    micro_batch: int | Literal["auto"] = setting(default="auto", least=1)
    """Packed rows per forward; `auto` asks the memory account and is pinned in the checkpoint."""
    epochs: int | None = setting(default=None, least=1)
    """Passes over the data; 1 when neither it nor `steps` is given."""
    steps: int | None = setting(default=None, least=1)
    optim: Optim = AdamW()
    schedule: Schedule = Cosine()
    precision: Precision = "auto"
    """`auto` is fp32 on CPU and bf16_mixed on GPUs."""
    memory: Memory = Memory()
    parallel: Parallel = Parallel()
    evaluate: Evaluating = Evaluating()
    checkpoint: Checkpointing = Checkpointing()
    guard: Guard = Guard()
    deterministic: bool = False
    """Only kernels that give equal bits on equal input; on CPU all of ours do."""
    log: tuple[Log, ...] = ()
    seed: int = setting(default=0, least=0)
    out: str
    """The run's folder."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        if self.epochs is not None and self.steps is not None:
            yield Conflict("epochs", "both say how long the run is", "keep one of the two", "steps")
        limits = self.adapter.limits
        if limits.packing and isinstance(self.data.packing, FirstFit):
            what = f"several sequences share a row: {limits.packing}"
            yield Conflict("data.packing", what, "set data.packing: none", "adapter.kind")
        if limits.recompute and self.memory.recompute == "full":
            what = f"layers run twice: {limits.recompute}"
            yield Conflict("memory.recompute", what, "set memory.recompute: none", "adapter.kind")
        if (odd := self.adapter.unfit(self.quant.kind)) is not None:
            yield Conflict("quant.kind", odd[1], odd[2], f"adapter.{odd[0]}")
        for key in ("add_tokens", "add_special_tokens"):
            if getattr(self.model, key) and not self.adapter.learns_tokens:
                what = f"adapter {self.adapter.kind} trains no rows of the embeddings"
                yield Conflict(f"model.{key}", what, "use adapter: {kind: lora} or none", "adapter.kind")
        best, valid = self.checkpoint.best, self.data.valid
        if best is not None and not valid:
            what = f"nothing measures {best} without validation rows"
            yield Conflict("checkpoint.best", what, "give data.valid, or drop checkpoint.best", "data.valid")
        if best is not None and self.evaluate.every is None:
            what = f"nothing measures {best} while training"
            yield Conflict("checkpoint.best", what, "set evaluate.every", "evaluate.every")
        for key in () if valid else ("every", "rows", "samples", "max_tokens"):
            said = getattr(self.evaluate, key)
            if said and said != getattr(Evaluating(), key):
                what = "there are no validation rows"
                yield Conflict(f"evaluate.{key}", what, f"give data.valid, or drop evaluate.{key}", "data.valid")

    def run(self, run: Run) -> Artifact:
        """Trains, evaluates before and after, and leaves `model/`, the manifest and the report in the run's folder."""
        from llmkit.stages.build_training import train

        return train(self, run)

"""What the training stages share: the keys of a recipe that trains, and what contradicts what in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from llmkit.adapters.node import Adapter, Lora
from llmkit.core.config import Conflict, config, setting
from llmkit.data.node import Data, FirstFit, Readable
from llmkit.models.node import ModelRef, NoQuant, Quant
from llmkit.stages.levers import contradictions
from llmkit.stages.push import Push
from llmkit.train.logs import Log
from llmkit.train.node import Batching, Checkpointing, Evaluating, Guard, Memory, Parallel, Precision
from llmkit.train.optim import AdamW, Optim
from llmkit.train.schedule import Cosine, Schedule

if TYPE_CHECKING:
    from llmkit.data.prepare import Prepared
    from llmkit.data.rows import BadRow
    from llmkit.parallel.single import Loss


@config
class Training:
    """A stage that trains: what is held, what is trained, and how the loop runs."""

    kind: str = ""
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
    """Trackers that are told the metrics, beside `metrics.jsonl`."""
    push: Push | None = None
    """Where on the Hugging Face Hub the result goes when it is done; without it, nowhere."""
    seed: int = setting(default=0, least=0)
    out: str
    """The run's folder."""

    @property
    def types_name(self) -> str:
        """The precision by its name."""
        return self.precision if isinstance(self.precision, str) else self.precision.named

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        if self.epochs is not None and self.steps is not None:
            yield Conflict("epochs", "both say how long the run is", "keep one of the two", "steps")
        if (odd := self.adapter.unfit(self.quant.kind)) is not None:
            yield Conflict("quant.kind", odd[1], odd[2], f"adapter.{odd[0]}")
        for key in ("add_tokens", "add_special_tokens"):
            if getattr(self.model, key) and not self.adapter.learns_tokens:
                what = f"adapter {self.adapter.kind} trains no rows of the embeddings"
                yield Conflict(f"model.{key}", what, "use adapter: {kind: lora} or none", "adapter.kind")
        limits = self.adapter.limits
        if limits.packing and isinstance(self.data.packing, FirstFit):
            what = f"several sequences share a row: {limits.packing}"
            yield Conflict("data.packing", what, "set data.packing: none", "adapter.kind")
        if limits.recompute and self.memory.recompute == "full":
            what = f"layers run twice: {limits.recompute}"
            yield Conflict("memory.recompute", what, "set memory.recompute: none", "adapter.kind")
        best, valid = self.checkpoint.best, self.data.sources("valid")
        if best is not None and not valid:
            what = f"nothing measures {best} without validation rows"
            yield Conflict(
                "checkpoint.best", what, "give data.valid or data.held_out, or drop checkpoint.best", "data.valid"
            )
        if best is not None and self.evaluate.every is None and self.evaluate.per_epoch is None:
            what = f"nothing measures {best} while training"
            yield Conflict("checkpoint.best", what, "set evaluate.every", "evaluate.every")
        yield from contradictions(self)
        if best is None and self.evaluate.patience is not None:
            what = "nothing says which metric is to get better"
            yield Conflict("evaluate.patience", what, "set checkpoint.best=valid.loss", "checkpoint.best")
        for key in () if valid else ("every", "per_epoch", "patience", "rows", "samples", "max_tokens"):
            said = getattr(self.evaluate, key)
            if said and said != getattr(Evaluating(), key):
                what = "there are no validation rows"
                yield Conflict(
                    f"evaluate.{key}", what, f"give data.valid or data.held_out, or drop evaluate.{key}", "data.valid"
                )

    def needs(self, device: str) -> None:
        """Sees to it, before any heavy work, that what the recipe asks for can be done on `device`.

        Raises:
            ResourceError: it cannot.
            ModelError: a package is missing.
        """
        from llmkit.stages.needs import check_needs

        check_needs(self, device)

    def examples(
        self,
        sources: Sequence[Readable],
        tokenizer: Any,
        key: str,
        aside: Callable[[BadRow], None] | None = None,
        least: int = 1,
    ) -> Prepared:
        """The examples of `data.train` or `data.valid` (`key`), at least `least` of them; bad rows go `aside`.

        Raises:
            DataError: a row cannot be read, too many are unusable, or too few are left.
        """
        from llmkit.data.prepare import prepare

        return prepare(sources, self.data, tokenizer, key, aside, least)

    def objective(self) -> Loss:
        """What is made small: the scores of a batch -> a sum with its count."""
        from llmkit.losses.token import CrossEntropy

        return CrossEntropy()

"""What the training stages share: the keys of a recipe that trains, and what contradicts what in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmkit.adapters.node import Adapter, Lora
from llmkit.core.config import Conflict, config, setting
from llmkit.core.files import published
from llmkit.core.seed import LARGEST
from llmkit.data.node import Data, FirstFit, Readable
from llmkit.losses.node import CrossEntropy
from llmkit.models.node import Head, ModelRef, NoQuant, Quant
from llmkit.parallel.node import Parallel
from llmkit.stages.levers import contradictions
from llmkit.stages.push import Push
from llmkit.train.logs import Log
from llmkit.train.node import Batching, Checkpointing, Evaluating, Guard, Memory, Precision
from llmkit.train.optim import AdamW, Optim
from llmkit.train.schedule import Cosine, Schedule

if TYPE_CHECKING:
    from pathlib import Path

    from llmkit.build.training import Built
    from llmkit.core.artifact import Artifact
    from llmkit.core.ranks import Ranks
    from llmkit.core.records import Prediction
    from llmkit.core.run import Run
    from llmkit.core.shape import Cost, Shape
    from llmkit.core.types import Report
    from llmkit.data.feed import Feed, Streams
    from llmkit.data.order import Ordered
    from llmkit.data.prepare import Prepared
    from llmkit.data.rows import BadRow
    from llmkit.evals.run import Subject
    from llmkit.models.resolve import Resolved
    from llmkit.parallel.steps import Loss, Steps
    from llmkit.plan.beside import Beside, Round
    from llmkit.stages.job import Job

KNOB = "lower micro_batch or data.max_length, or set memory.recompute=full"
"""What takes less memory in every stage."""
LONGEST = 1_000_000_000
"""Steps or epochs of a run: at a step a millisecond, more would take weeks, and a slip of the finger means none."""


@config
class Training:
    """A stage that trains: what is held, what is trained, and how the loop runs."""

    larger_is_better: ClassVar[Mapping[str, bool]] = {
        "valid.loss": False,
        "valid.perplexity": False,
        "valid.bits_per_byte": False,
    }
    """What evaluations measure, for `checkpoint.best`."""
    shown: ClassVar[tuple[str, ...]] = ()
    """Figures that a progress shows beside the loss."""
    writes: ClassVar[bool] = True
    """Whether what is trained answers prompts, of which evaluations show some."""
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
    epochs: int | None = setting(default=None, least=1, most=LONGEST)
    """Passes over the data; 1 when neither it nor `steps` is given."""
    steps: int | None = setting(default=None, least=1, most=LONGEST)
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
    neftune: float = setting(default=0.0, least=0.0)
    """Noise on the embeddings in training, of at most neftune / sqrt(length x width) (NEFTune, arXiv:2310.05914): 5 to
    15; 0 is none."""
    seed: int = setting(default=0, least=0, most=LARGEST)
    out: str
    """The run's folder."""

    @property
    def trained(self) -> bool:
        """Whether the loop runs at all: some of what drafts is made without it."""
        return True

    @property
    def types_name(self) -> str:
        """The precision by its name."""
        return self.precision if isinstance(self.precision, str) else self.precision.named

    @property
    def watched(self) -> Guard:
        """What the guard looks at."""
        return self.guard

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
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
        yield from self._lengths()
        yield from self._odd_data()
        best, valid = self.checkpoint.best, self.data.sources("valid")
        yield from self._odd_best()
        yield from self._odd_batch()
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

    @property
    def aside(self) -> int:
        """The last ranks of a run, so many, that do not train."""
        return 0

    def check_ranks(self, ranks: Ranks) -> None:
        """Sees to it that the recipe goes with the number of ranks, before anything is begun.

        Raises:
            RecipeError: it does not.
        """
        self.parallel.check(ranks.world, self.deterministic)

    def needs(self, device: str) -> None:
        """Sees to it, before any heavy work, that what the recipe asks for can be done on `device`.

        Raises:
            ResourceError: it cannot.
            ModelError: a package is missing.
        """
        from llmkit.stages.needs import check_needs

        check_needs(self, device)

    def _lengths(self) -> Iterator[Conflict]:
        if self.epochs is not None and self.steps is not None:
            yield Conflict("epochs", "both say how long the run is", "keep one of the two", "steps")
        if self.steps is None and (self.data.streaming or self.scheduled):
            what = "how long a stream is, is not known" if self.data.streaming else "weights follow the parts of a run"
            key = "data.streaming" if self.data.streaming else "data.train"
            yield Conflict(key, what, "set steps", "epochs")

    @property
    def scheduled(self) -> bool:
        """Whether the shares of a mix change over the run."""
        return self.data.mixed and any(isinstance(source.weight, tuple) for source in self.data.train)

    def _odd_batch(self) -> Iterator[Conflict]:
        """Steps of tokens, where rows are counted; rows where pairs are."""
        for other in (other for other in ("rows", "pairs", "prompts") if other != self.counted):
            if getattr(self.batch, other) != getattr(Batching(), other):
                by, named = self.counts
                yield Conflict(f"batch.{other}", f"{named} counts {self.counted}", f"use batch.{self.counted}", by)
        data, tokens = self.data, self.batch.tokens
        counted = {"streaming": data.streaming, "mix": data.mixed, "sampler": data.sampler is not None}
        counted["length_buckets"] = data.length_buckets is not None
        for key in (key for key, held in counted.items() if held and tokens is not None):
            yield Conflict("batch.tokens", f"steps of data.{key} are counted in rows", "use batch.rows", f"data.{key}")

    def _odd_data(self) -> Iterator[Conflict]:
        """Keys of `data` that this stage has no use for."""
        if self.data.sampler is not None:
            what = f"rows have no {self.data.sampler.balance} in kind {self.kind}"
            yield Conflict("data.sampler", what, "drop data.sampler, or use kind: classify", "kind")

    def _odd_best(self) -> Iterator[Conflict]:
        """A metric that nothing measures."""
        best = self.checkpoint.best
        if best is not None and self.larger_better(best) is None:
            what, known = f"{best} is not measured by kind {self.kind}", ", ".join(self.larger_is_better)
            yield Conflict("checkpoint.best", what, f"use one of {known}")

    def larger_better(self, metric: str) -> bool | None:
        """Whether more of a metric is better; None where it is not measured."""
        return self.larger_is_better.get(metric)

    def run(self, run: Run) -> Artifact:
        """Trains, evaluates before and after, and leaves `model/`, the manifest and the report in the run's folder."""
        from llmkit.stages.build_training import train

        return train(self, run)

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

    def reaches(self, resolved: Resolved, made: Prepared) -> None:
        """Sees to it that the model takes what is drawn from these examples.

        Raises:
            RecipeError: it has too few positions.
        """

    def stream(self, tokenizer: Any, aside: Callable[[BadRow], None] | None = None) -> Streams:
        """The examples of `data.train` as streams, which are open when this returns.

        Raises:
            DataError: a source cannot be read, too many of its first rows are unusable, or too few are there.
        """
        from llmkit.data.feed import Streams

        made = Streams(self.data, tokenizer, self.seed, self.batch.examples, self.steps or 1, aside)
        made.begin({})
        return made

    def head(self, train: Prepared) -> Head | None:
        """The classification head that the model gets; a language model has none."""
        return None

    def cost(self, shape: Shape) -> Cost:
        """What is trained of a model of this shape, or beside it."""
        return self.adapter.cost(shape)

    def blind(self) -> bool:
        """Whether nothing looks at the model's weights before training, so that those of layers are read as they are
        cut."""
        return self.adapter.blind()

    def rate(self, name: str) -> float:
        """What the rate of a trained parameter is multiplied with."""
        return self.adapter.rate(name)

    def answered(self, prepared: Prepared, run: Run, key: str) -> Prepared:
        """The examples of `data.train` or `data.valid` (`key`) as the run trains on them, with what it makes itself."""
        return prepared

    def around(self, built: Built, train: Prepared, run: Run) -> Built:
        """What is trained and scored: the model itself, or what is made around it."""
        return built

    def feeding(self, job: Job, built: Built, steps: Steps) -> AbstractContextManager[Feed]:
        """What steps draw from, while training lasts: the data as they were read, or what is made on the way."""
        return nullcontext(job.feed)

    def others(self) -> dict[str, ModelRef]:
        """Models beside `model` that are read and stay as they are, by their keys: a run goes on with the same."""
        return {}

    def files_beside(self) -> dict[str, str]:
        """Files beside `data` that are read, by their keys: a run goes on with the same."""
        return {}

    def leave(self, built: Built, folder: Path, write: Callable[[Path], None]) -> None:
        """Leaves the result as `folder`: the model with its adapter, which `write` writes into a folder."""
        with published(folder) as aside:
            write(aside)

    @property
    def counted(self) -> Literal["rows", "pairs", "prompts"]:
        """What `batch` counts."""
        return "rows"

    @property
    def counts(self) -> tuple[str, str]:
        """The key by which it counts that, and how errors say it."""
        return "kind", f"kind {self.kind}"

    @property
    def step_examples(self) -> int:
        """Those of `batch` that one optimizer step learns from, at most."""
        return self.batch.examples

    @property
    def row_tokens(self) -> int:
        """Tokens of a packed row, at most."""
        return self.data.max_length

    def beside(self, world: int) -> tuple[Beside, ...]:
        """Models that each of `world` ranks holds beside the one that is trained."""
        return ()

    def draws(self, world: int) -> Round | None:
        """What is drawn between steps from what `world` ranks train."""
        return None

    @property
    def example_tokens(self) -> int:
        """Tokens of one example, at most."""
        return self.row_tokens

    def moves(self) -> Iterator[tuple[str, Mapping[str, Any], str]]:
        """What of this stage's own takes less memory: as overrides, as fields anew, and what else that changes."""
        return iter(())

    @property
    def knob(self) -> str:
        """What to do where memory gives out."""
        return KNOB

    @property
    def needs_distance(self) -> bool:
        """Whether each step has to know before it begins how far the policy is from its reference."""
        return False

    @property
    def forwards_beside(self) -> int:
        """Forward passes of whole models in a step that have no backward pass."""
        return 0

    @property
    def whole_step(self) -> bool:
        """Whether a step has to be one micro-batch."""
        return False

    def order(self, train: Prepared) -> Ordered:
        """Which rows each step sees."""
        from llmkit.data.orders import ordered

        return ordered(self.data, self.seed, train, self.batch.examples, self.steps, self.batch.tokens or 0)

    def objective(self, train: Prepared) -> Loss:
        """What is made small: the scores of a batch -> a sum with its count."""
        return CrossEntropy()

    def measure(self, subject: Subject, valid: Prepared, ids: Sequence[int]) -> dict[str, float]:
        """The figures (`valid.*`) of these validation rows."""
        from llmkit.evals.run import held_out

        return held_out(subject, valid, ids, self.data.max_length)

    def final(self, subject: Subject, valid: Prepared) -> tuple[list[Prediction], list[Report]]:
        """A table of what the result says of the validation rows, and its figures with intervals, where it has such."""
        return [], []

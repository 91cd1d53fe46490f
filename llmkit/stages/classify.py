"""`kind: classify`: a classification head, trained with an adapter or with every weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmkit.core.config import Conflict, config
from llmkit.core.errors import DataError
from llmkit.data.node import Readable
from llmkit.losses.node import ClassEntropy, ClassLoss, Focal, GroupDro, Seen, balanced
from llmkit.models.node import Head
from llmkit.stages.heads import useless
from llmkit.stages.training import Training

if TYPE_CHECKING:
    from llmkit.core.records import Prediction
    from llmkit.core.types import Report
    from llmkit.data.labelled import Labelled
    from llmkit.data.prepare import Prepared
    from llmkit.data.rows import BadRow
    from llmkit.evals.run import Subject
    from llmkit.parallel.steps import Loss


@config
class Classify(Training):
    """Classification of texts, conversations or words, in a head that plain transformers and peft load.

    Rows hold `text`, `prompt` or `messages` with a `label` (a name or an index); or `tokens` with `tags`, one a word,
    of which a word's first token is trained."""

    larger_is_better: ClassVar[Mapping[str, bool]] = {
        "valid.loss": False,
        "valid.ece": False,
        "valid.accuracy": True,
        "valid.f1": True,
        "valid.span_f1": True,
    }
    kind: Literal["classify"] = "classify"
    task: Literal["sequence", "token"] = "sequence"
    """A class for each row, read at its last token; or one for each word."""
    labels: tuple[str, ...] = ()
    """The classes, in the order of the model's outputs; left out, those of the training rows, sorted."""
    loss: ClassLoss = ClassEntropy()
    class_weights: Literal["balanced"] | Mapping[str, float] | None = None
    """What each class counts in the loss, whose mean is over the weights; `balanced` is rows / (classes x rows of the
    class), and classes that are not named have 1."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        yield from super().problems()
        yield from self._odd_labels()
        weighs = self.class_weights is not None
        if weighs and (isinstance(self.loss, GroupDro) or (isinstance(self.loss, Focal) and self.loss.alpha)):
            other = "loss.alpha" if isinstance(self.loss, Focal) else "loss.kind"
            yield Conflict("class_weights", "the loss weighs rows by itself", "keep one of the two", other)
        if self.task == "token":
            yield from self._odd_for_words()
        yield from useless(self, "labelled rows", "a classifier")
        if self.data.lint.level == "error":
            yield Conflict("data.lint.level", "labelled rows are not linted yet", "drop data.lint", "kind")

    def _odd_labels(self) -> Iterator[Conflict]:
        if len(self.labels) == 1 or len(set(self.labels)) < len(self.labels):
            yield Conflict("labels", "names one class, or one twice", "name two or more, each once")
        if isinstance(self.class_weights, Mapping):
            for name, weight in self.class_weights.items():
                if self.labels and name not in self.labels:
                    yield Conflict(f"class_weights.{name}", "is none of labels", "name a class", "labels")
                if not 0 < weight < float("inf"):
                    yield Conflict(f"class_weights.{name}", f"{weight} is no weight", "give more than 0")

    def _odd_for_words(self) -> Iterator[Conflict]:
        if isinstance(self.loss, GroupDro):
            yield Conflict("loss.kind", "groups are of rows with one label", "use another loss", "task")
        if self.data.sampler is not None and self.data.sampler.balance == "label":
            what = "rows of words have many labels each"
            yield Conflict("data.sampler.balance", what, "balance group, or drop data.sampler", "task")

    def _odd_data(self) -> Iterator[Conflict]:
        return iter(())

    def larger_better(self, metric: str) -> bool | None:
        """Whether more of a metric is better; None where it is not measured."""
        return True if metric.startswith("valid.recall.") else super().larger_better(metric)

    def examples(
        self,
        sources: Sequence[Readable],
        tokenizer: Any,
        key: str,
        aside: Callable[[BadRow], None] | None = None,
        least: int = 1,
    ) -> Labelled:
        """The examples of `data.train` or `data.valid` (`key`), at least `least` of them; bad rows go `aside`.

        Raises:
            DataError: a row cannot be read, too many are unusable, or too few are left.
        """
        from llmkit.data.labelled import Labels, class_names, labelled

        train, data = self.data.sources("train"), self.data
        classes = self.labels or class_names(train, data, self.task)
        by_group = isinstance(self.loss, GroupDro) or (data.sampler is not None and data.sampler.balance == "group")
        groups = class_names(train, data, self.task, "group") if by_group and key == "data.train" else ()
        made = labelled(sources, data, tokenizer, Labels(self.task, classes, groups), key, aside, least)
        if key == "data.train":
            return self._weighed(made)
        self._check_best(made)
        return made

    def _check_best(self, valid: Labelled) -> None:
        """Raises: DataError when these rows cannot measure `checkpoint.best`."""
        from llmkit.evals.classify import is_chunks

        best = self.checkpoint.best or ""
        name, there = best.removeprefix("valid.recall."), dict(zip(valid.classes, valid.counts_by_class, strict=True))
        if best.startswith("valid.recall.") and not there.get(name):
            what = f"no row of data.valid has the label {name}, whose recall is to get better"
            raise DataError(what, fix="use valid.f1, or give such rows", key="checkpoint.best")
        if best == "valid.span_f1" and not (self.task == "token" and is_chunks(valid.classes)):
            what = "there are no spans in these rows: their tags are not all of B-X, I-X and O"
            raise DataError(what, fix="use valid.f1", key="checkpoint.best")

    def _weighed(self, train: Labelled) -> Labelled:
        """The training rows with the weights of their classes."""
        if self.class_weights is None:
            return train
        weights = balanced(train.counts_by_class.tolist())
        if isinstance(self.class_weights, Mapping):
            unknown = [name for name in self.class_weights if name not in train.classes]
            if unknown:
                what = f"the rows have no class {unknown[0]}, but {', '.join(train.classes)[:80]}"
                raise DataError(what, fix="name their classes", key=f"class_weights.{unknown[0]}")
            weights = tuple(self.class_weights.get(name, 1.0) for name in train.classes)
        return replace(train, weights=train.weights[:] * train.by_class(weights))

    def head(self, train: Prepared) -> Head:
        """The head over the classes of the training rows."""
        return Head(self.task, self._rows(train).classes, self.seed)

    def objective(self, train: Prepared) -> Loss:
        """The loss over classes, told what the training rows are like."""
        rows = self._rows(train)
        return self.loss.over(Seen(rows.counts_by_class.tolist(), rows.groups.tolist(), rows.group_names))

    def measure(self, subject: Subject, valid: Prepared, ids: Sequence[int]) -> dict[str, float]:
        """The figures (`valid.*`) of these validation rows."""
        from llmkit.evals.classify import measured

        return measured(subject, self._rows(valid), ids, self.data.max_length)

    def final(self, subject: Subject, valid: Prepared) -> tuple[list[Prediction], list[Report]]:
        """A table of what the result says of the validation rows, and its figures with intervals."""
        from llmkit.data.order import spread
        from llmkit.evals.classify import judged

        ids = spread(len(valid), self.evaluate.rows)
        return judged(subject, self._rows(valid), ids, self.data.max_length, "valid")

    def _rows(self, prepared: Prepared) -> Labelled:
        from llmkit.data.labelled import Labelled

        if not isinstance(prepared, Labelled):
            raise TypeError("these rows have no labels")
        return prepared

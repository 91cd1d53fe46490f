"""`drafter: {kind: ngram}`: a corpus in which the end of a text is looked up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmkit.core.config import Conflict, config
from llmkit.data.node import Data
from llmkit.stages.drafters import Maker
from llmkit.train.answers import Answers, Given

if TYPE_CHECKING:
    from llmkit.core.artifact import Artifact
    from llmkit.core.run import Run
    from llmkit.data.node import Readable
    from llmkit.data.prepare import Prepared
    from llmkit.data.rows import BadRow
    from llmkit.stages.draft import Draft

LONGEST = 1 << 24
"""Tokens of a row: a corpus has texts of any length."""
CUT = ("max_length", "overflow")


@config
class NgramCorpus(Maker):
    """A corpus of texts, in which `speculation: {kind: ngram, corpus: FOLDER}` looks up how a text may go on: answers,
    a code base, documents. Six bytes a token, which are mapped and not read into memory."""

    trains: ClassVar[bool] = False
    kind: Literal["ngram"] = "ngram"
    answers: Answers = Given()
    """`own` asks the model what the rows ask, and keeps what it says instead of theirs."""

    def odd(self, stage: Draft) -> Iterator[Conflict]:
        """A bound on rows that are not cut."""
        for key in CUT if isinstance(self.answers, Given) else ():
            if getattr(stage.data, key) != getattr(Data(train=stage.data.train), key):
                what = "texts of a corpus have any length"
                yield Conflict(f"data.{key}", what, f"drop data.{key}", "drafter.kind")

    def run(self, stage: Draft, run: Run) -> Artifact:
        """Makes the corpus."""
        from llmkit.stages.draft_corpus import make

        return make(stage, self, run)

    def examples(
        self,
        data: Data,
        sources: Sequence[Readable],
        tokenizer: Any,
        key: str,
        aside: Callable[[BadRow], None] | None,
        least: int,
    ) -> Prepared:
        """The rows whole."""
        if isinstance(self.answers, Given):
            data = replace(data, max_length=LONGEST)
        return super().examples(data, sources, tokenizer, key, aside, 1)

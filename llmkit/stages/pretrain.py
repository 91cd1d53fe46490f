"""`kind: pretrain`: continued pretraining on documents, every token of which is learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

from llmkit.core.config import Conflict, config
from llmkit.data.node import Data, Readable
from llmkit.stages.training import Training
from llmkit.train.node import Evaluating

if TYPE_CHECKING:
    from llmkit.data.prepare import Prepared
    from llmkit.data.rows import BadRow

READ = {"train", "valid", "held_out", "system", "max_length", "on_bad_row", "bad_share", "packing"}
READ |= {"dedup", "decontaminate", "contamination", "lint"}
"""Keys of `data` that have a meaning here."""


@config
class Pretrain(Training):
    """Continued pretraining: documents are laid end to end and cut to chunks of `data.max_length` tokens, all of which
    are learned. A document is a row's `text`, or its conversation as the chat template shows it."""

    kind: Literal["pretrain"] = "pretrain"
    documents: Literal["apart", "joined"] = "apart"
    """Whether a document sees those before it in its chunk: `apart`, attention and positions begin anew with each."""
    end: str | None = None
    """The special token that documents end in; the tokenizer's end token when not given."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        yield from Training.problems(self)
        if self.data.streaming:
            what = "documents are laid end to end before training"
            yield Conflict("data.streaming", what, "leave data.streaming out", "kind")
        plain = Data(train=self.data.train)
        for key in (item.name for item in fields(Data) if item.name not in READ):
            if getattr(self.data, key) != getattr(plain, key):
                what = f"pretraining learns every token of its chunks, and reads no data.{key}"
                yield Conflict(f"data.{key}", what, f"leave data.{key} out", "kind")
        for key in ("samples", "max_tokens"):
            if getattr(self.evaluate, key) not in (0, getattr(Evaluating(), key)):
                yield Conflict(f"evaluate.{key}", "documents ask nothing", f"leave evaluate.{key} out", "kind")

    def examples(
        self,
        sources: Sequence[Readable],
        tokenizer: Any,
        key: str,
        aside: Callable[[BadRow], None] | None = None,
        least: int = 1,
    ) -> Prepared:
        """The chunks of `data.train` or `data.valid` (`key`), at least `least` of them; bad rows go `aside`.

        Raises:
            DataError: a row cannot be read, too many are unusable, or too few are left.
            ModelError: the tokenizer has no token for a document's end.
        """
        from llmkit.data.documents import chunked

        return chunked(sources, self.data, tokenizer, self.documents == "apart", self.end, key, aside, least)

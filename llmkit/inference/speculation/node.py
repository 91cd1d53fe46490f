"""The `speculation` union: who drafts."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from llmkit.core.config import config, setting
from llmkit.inference.speculation.most import MOST

if TYPE_CHECKING:
    from llmkit.inference.speculation.drafter import Drafter
    from llmkit.inference.speculation.ngram import Lookup


class Making(Protocol):
    """What makes drafters beside a loaded model."""

    @property
    def words(self) -> int:
        """Of the vocabulary."""
        ...

    def model(self, name: str, width: int) -> Drafter:
        """Another model."""
        ...

    def retrieved(self, name: str, own: Lookup) -> Drafter:
        """A corpus, beside what a text itself has."""
        ...

    def shortened(self, count: int, width: int) -> Drafter:
        """The model's own first layers."""
        ...

    def head(self, path: str, width: int) -> Drafter:
        """A trained head."""
        ...


# `within` of a member: whether it runs layers of the model itself, all of which must lie in this process.


@config
class Ngram:
    """What came after the longest end of the text that is in it already: for summaries, quotes, code and edits."""

    _keyed: ClassVar[str] = "corpus"
    within: ClassVar[bool] = False
    lookup: ClassVar[bool] = False
    kind: Literal["ngram"] = "ngram"
    tokens: int = setting(default=12, least=1, most=MOST)
    """Drafts of an answer in one step, at most; how many there are is measured."""
    fixed: bool = False
    """Whether as many as there are up to `tokens` are always looked at, whatever they cost."""
    least: int = setting(default=1, least=1)
    """Tokens of the shortest end that is looked for."""
    corpus: str | None = None
    """The folder of a corpus that `kind: draft` made for this model (`drafter: ngram`): the end of a text is looked up
    in it too, and the longer of both is gone by."""
    recycle: int = setting(default=8, least=0, most=8)
    """Tokens that the model thought likeliest after each, when it came last, of which branches are drafted; 0: none."""

    def drafter(self, making: Making) -> Drafter:
        """Ready to draft.

        Raises:
            ModelError: the corpus is none, or was made for another model.
        """
        from llmkit.inference.speculation.branched import Branched
        from llmkit.inference.speculation.ngram import Lookup
        from llmkit.inference.speculation.recycled import Recycled

        own = Lookup(making.words, self.least)
        found = own if self.corpus is None else making.retrieved(self.corpus, own)
        return Branched(found, Recycled(making.words, self.recycle)) if self.recycle else found


@config
class DraftModel:
    """A smaller model of the same tokenizer."""

    _keyed: ClassVar[str] = "model"
    within: ClassVar[bool] = False
    kind: Literal["draft"] = "draft"
    model: str
    """An alias, a Hub id, a folder, or a run's folder."""
    tokens: int = setting(default=6, least=1, most=MOST)
    """Drafts of an answer in one step, at most; how many there are is measured."""
    width: int = setting(default=3, least=1, most=16)
    """Drafts of one place: the others beside what it would say are those that it thinks likeliest."""
    fixed: bool = False
    """Whether `tokens` are always drafted and looked at, whatever they cost."""
    lookup: bool = True
    """Whether what `ngram` finds is looked at beside it: it costs next to nothing."""

    def drafter(self, making: Making) -> Drafter:
        """Ready to draft.

        Raises:
            ModelError: it has other tokens, or cannot be loaded.
        """
        return making.model(self.model, self.width)


@config
class EarlyExit:
    """The model's own first layers, then its norm and head."""

    _keyed: ClassVar[str] = "layers"
    within: ClassVar[bool] = True
    kind: Literal["early_exit"] = "early_exit"
    layers: int = setting(least=1)
    tokens: int = setting(default=4, least=1, most=MOST)
    """Drafts of an answer in one step, at most; how many there are is measured."""
    width: int = setting(default=3, least=1, most=16)
    """Drafts of one place: the others beside what it would say are those that it thinks likeliest."""
    fixed: bool = False
    """Whether `tokens` are always drafted and looked at, whatever they cost."""
    lookup: bool = True
    """Whether what `ngram` finds is looked at beside it: it costs next to nothing."""

    def drafter(self, making: Making) -> Drafter:
        """Ready to draft.

        Raises:
            ModelError: the model has no more layers than that.
        """
        return making.shortened(self.layers, self.width)


@config
class TrainedHead:
    """A head over the model's own hidden states, which `kind: draft` trained (EAGLE-3, arXiv:2503.01840)."""

    _keyed: ClassVar[str] = "path"
    within: ClassVar[bool] = False
    kind: Literal["head"] = "head"
    path: str
    """A run of `kind: draft` with `drafter: {kind: head}`, or its `model` folder."""
    tokens: int = setting(default=6, least=1, most=MOST)
    """Drafts of an answer that follow each other in one step, at most; how many there are is measured."""
    width: int = setting(default=8, least=1, most=16)
    """Paths that are drafted on at each place, so that drafts are a tree; 1 is a chain."""
    fixed: bool = False
    """Whether `tokens` are always drafted and all drafts looked at, whatever they cost."""
    lookup: bool = True
    """Whether what `ngram` finds is looked at beside it: it costs next to nothing."""

    def drafter(self, making: Making) -> Drafter:
        """Ready to draft.

        Raises:
            ModelError: it was made for another model, or is no head.
        """
        return making.head(self.path, self.width)


Speculation = Ngram | DraftModel | EarlyExit | TrainedHead

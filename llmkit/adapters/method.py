"""What every way of training answers, and what it is told of the model that it works on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from llmkit.adapters.limits import Limits
from llmkit.core.config import Conflict


def _unheard(_: str) -> None:
    """Nobody listens."""


def _nothing(name: str) -> Any:
    raise KeyError(name)


@dataclass(frozen=True)
class Around:
    """What a method may need beside the model's weights."""

    idle: tuple[str, ...] = ()
    """Modules that text never reaches: nothing is learned there."""
    tokenizer: Any = None
    added: tuple[int, ...] = ()
    """Ids of the tokens that the recipe added (`model.add_tokens`, `model.add_special_tokens`)."""
    stored: Callable[[str], Any] = _nothing
    """A weight as the base's files hold it, by its name; ModelError where they have none of that name."""
    notice: Callable[[str], None] = _unheard
    """Tells the user, in one line, what was matched."""


class Method:
    """The answers of a method that has nothing to say; a member of the union gives `attach` and `cost`, and its own
    answer where it has one."""

    frozen_base: ClassVar[bool] = True
    """No weight of the base is trained."""
    limits: ClassVar[Limits] = Limits()
    """What it cannot be together with."""
    learns_tokens: ClassVar[bool] = False
    """It trains the rows of tokens that the recipe adds (`Around.added`)."""

    def problems(self) -> Iterator[Conflict]:
        """A pattern of targets that is none."""
        targets = getattr(self, "targets", None)
        try:
            re.compile(targets if isinstance(targets, str) else "")
        except re.error as cause:
            fix = "mend it, or give a list of name endings"
            yield Conflict("targets", f"{targets!r} is no regular expression ({cause})", fix)

    def unfit(self, quant: str) -> tuple[str, str, str] | None:
        """Why it cannot be trained over a base that is held as `quant`: (its own key, what is wrong, the way out)."""
        return None

    def unsplit(self) -> tuple[str, str, str] | None:
        """Why it cannot be trained where each rank holds a part of every linear (`parallel.tensor`): (its own key, what
        is wrong, the way out)."""
        what = f"no part of {getattr(self, 'kind', 'it')} can be learned from a part of a linear"
        return "kind", what, "use adapter: {kind: lora} or none, or set parallel.tensor=1"

    def blind(self) -> bool:
        """Whether it is put on its model without a look at the weights of layers, which need not be read before."""
        return False

    def rate(self, name: str) -> float:
        """The factor on the learning rate of the trained parameter `name`."""
        return 1.0

    def prepare(self, model: Any, batches: Iterable[Any], forward: Callable[[Any], object]) -> None:
        """Before the first step, and again when a run goes on: `batches` are the first of the training data (lazy),
        `forward` runs one through the model. It must depend on these and the seed alone."""

    def finish(self, model: Any) -> None:
        """After the last step: brings the adapter into the form in which it is saved, with the same outputs."""

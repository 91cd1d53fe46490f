"""The `answers` unions of what learns from another model: whose answers it learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from llmkit.core.config import config, setting
from llmkit.inference.node import OwnEngine
from llmkit.inference.sampling import Sampling

if TYPE_CHECKING:
    from llmkit.data.node import Data, Readable
    from llmkit.data.prepare import Prepared
    from llmkit.data.rows import BadRow


@config
class Made:
    """Made anew for each prompt of the data."""

    kind: str = ""
    sampling: Sampling = setting(default_factory=lambda: Sampling(max_tokens=256))
    """How they are chosen, as in use: greedy where nothing is said."""
    generator: OwnEngine = OwnEngine()
    """What makes them."""

    def examples(
        self,
        data: Data,
        sources: Sequence[Readable],
        tokenizer: Any,
        key: str,
        aside: Callable[[BadRow], None] | None,
        least: int,
    ) -> Prepared:
        """What the rows of `data.train` or `data.valid` (`key`) ask.

        Raises:
            DataError: a row cannot be read, too many are unusable, or too few are left.
        """
        from llmkit.data.prompted import prompts

        return prompts(sources, data, tokenizer, key, aside, least)


@config
class Own(Made):
    """The model's own, made anew for each prompt of the data: what drafts for a model is to know what that says."""

    kind: Literal["own"] = "own"


@config
class Given:
    """Those of the rows."""

    kind: Literal["given"] = "given"

    def examples(
        self,
        data: Data,
        sources: Sequence[Readable],
        tokenizer: Any,
        key: str,
        aside: Callable[[BadRow], None] | None,
        least: int,
    ) -> Prepared:
        """The rows of `data.train` or `data.valid` (`key`).

        Raises:
            DataError: a row cannot be read, too many are unusable, or too few are left.
        """
        from llmkit.data.prepare import prepare

        return prepare(sources, data, tokenizer, key, aside, least)


@config
class OfTeacher(Made):
    """The teacher's, made anew for each prompt of the data (sequence-level distillation, arXiv:1606.07947)."""

    kind: Literal["teacher"] = "teacher"


Answers = Own | Given
StudentAnswers = Given | OfTeacher

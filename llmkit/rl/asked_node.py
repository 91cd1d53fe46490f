"""Rewards that a model gives: a reward model, or a language model that judges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from llmkit.core.config import Conflict, config, setting
from llmkit.inference.node import Generator, OpenAi, OwnEngine
from llmkit.inference.sampling import Sampling
from llmkit.models.node import ModelRef
from llmkit.plan.beside import Beside
from llmkit.rl.checked_node import Lack, Weighed
from llmkit.rl.sample import Sample, Score

if TYPE_CHECKING:
    from llmkit.rl.bench import Bench


@config
class Model(Weighed):
    """What a reward model gives to the answer: what `kind: reward` makes, or any folder of a sequence classifier with
    one label."""

    kind: Literal["model"] = "model"
    path: str
    """Its folder, or a run's."""

    def beside(self) -> tuple[Beside, ...]:
        """It, which the main rank asks."""
        return (Beside("reward", ModelRef(name=self.path), "path", how="asked", passes=1, alone=True),)

    def models(self) -> dict[str, ModelRef]:
        """The reward model."""
        return {"path": ModelRef(name=self.path)}

    def ready(self) -> None:
        """
        Raises:
            ModelError: by its files it scores no answers.
        """
        from llmkit.rl.foreseen import check_scorer

        check_scorer(ModelRef(name=self.path), "path")

    def score(self, samples: Sequence[Sample], bench: Bench) -> list[Score]:
        """A score for each, or why it has none.

        Raises:
            ModelError: it cannot be loaded, or scores no answers.
        """
        from llmkit.rl.reward_model import RewardModel

        return bench.kept(f"model {self.path}", lambda: RewardModel(ModelRef(name=self.path), bench)).score(samples)


@config
class Judge(Weighed):
    """What a language model says of the answer, by a rubric: from 0 to 1, alone on a scale, or the share of the other
    answers to the same prompt that it is better than. Of two answers the judge is asked in both orders, and what it
    says in one order alone counts as a tie. Logged are `agreement` (the share of pairs on which both orders agree),
    `first` (of the others the share whose first answer did better) and `longer` (the share of pairs whose longer answer
    is better)."""

    kind: Literal["judge"] = "judge"
    generator: Generator = OwnEngine()
    """Where the judge's text comes from."""
    model: ModelRef | None = None
    """The judge, unless the generator is an endpoint."""
    rubric: str = "The better answer is correct, does what was asked, and is clear."
    """What makes an answer good, in words."""
    how: Literal["pairs", "scale"] = "pairs"
    """Each answer against others, or each alone from 1 to `scale`."""
    scale: int = setting(default=10, least=2, most=100)
    """The best grade."""
    rivals: int | None = setting(default=None, least=1)
    """Against how many of the others an answer is held, in a ring; all of them where it is left out."""
    against: str = ""
    """A column whose text takes the place of the other answers."""
    sampling: Sampling = setting(default_factory=lambda: Sampling(max_tokens=512))
    """How the judge's answers are chosen."""
    failed: float | None = None
    """What an answer gets on which the judge gives no verdict at all; such answers are counted, and pairs without a
    verdict are left out. Left out, each is an error that names the row."""

    def models(self) -> dict[str, ModelRef]:
        """The judge, where it is here."""
        return {} if self.model is None else {"model": self.model}

    def problems(self) -> Iterator[Conflict]:
        """A judge that is nowhere, or twice, and settings of another way."""
        yield from super().problems()
        if isinstance(self.generator, OpenAi) and self.model is not None:
            yield Conflict("model", "the endpoint has a model of its own", "leave one of them out", "generator")
        elif not isinstance(self.generator, OpenAi) and self.model is None:
            yield Conflict("model", "there is no judge", "name its model, or use generator: {kind: openai, url: ...}")
        for key in ("rivals", "against") if self.how == "scale" else ():
            if getattr(self, key):
                yield Conflict(key, "a grade is of one answer alone", "leave one of them out", "how")
        if self.rivals and self.against:
            yield Conflict("rivals", "each answer is held against a column", "leave one of them out", "against")
        if self.sampling.n > 1:
            yield Conflict("sampling.n", "a judge is asked once", "leave it out")

    def beside(self) -> tuple[Beside, ...]:
        """The judge, unless it is elsewhere; the main rank asks it."""
        if self.model is None:
            return ()
        engine = self.generator if isinstance(self.generator, OwnEngine) else None
        cache, room = (None, None) if engine is None else (engine.cache, engine.room)
        return (Beside("judge", self.model, "model", how="asked", cache=cache, room=room),)

    def ready(self) -> None:
        """
        Raises:
            RecipeError: its verdicts are past its positions.
        """
        from llmkit.rl.foreseen import check_room

        check_room(self.model, self.sampling.max_tokens)

    def lacks(self, rows: Sequence[Mapping[str, Any]]) -> Lack | None:
        """A row without the text that answers are held against."""
        wrong = (at for at, row in enumerate(rows) if self.against and not isinstance(row.get(self.against), str))
        fix = "give rows with it, or leave `against` out"
        return next((Lack(at, "against", f"its row has no text in column {self.against}", fix) for at in wrong), None)

    def score(self, samples: Sequence[Sample], bench: Bench) -> list[Score]:
        """A score for each, or why it has none; agreement figures go to the bench.

        Raises:
            ModelError: the judge cannot be loaded.
            ResourceError: the endpoint cannot be reached.
        """
        from llmkit.rl.judging import judged

        return judged(self, samples, bench)

"""A reward model that is asked: scores of answers, and chances that the steps of a solution are right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmkit.build.held import autocast
from llmkit.build.laid import laid
from llmkit.build.opening import load
from llmkit.build.precision import reading
from llmkit.build.scores import places
from llmkit.build.training import check, headed
from llmkit.core.errors import DataError, ModelError, told_below
from llmkit.core.run import Grants
from llmkit.data.judged import answer_ids
from llmkit.data.render import Renderer
from llmkit.data.rows import Row, Unusable
from llmkit.data.stepwise import StepReader, Steps
from llmkit.models.load import How
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve
from llmkit.models.rewarded import judges_steps, kind_of, scores_answers

Messages = Sequence[Mapping[str, Any]]
Answered = str | Messages | tuple[str, str]
"""A text; a conversation that ends in an answer; or a prompt and its answer, as texts."""


class RewardModel:
    """One that is loaded and at rest: what `kind: reward` left, or any classifier of transformers with one output."""

    def __init__(
        self, ref: ModelRef, device: str = "cpu", precision: str = "auto", grants: Grants = Grants(), key: str = "model"
    ) -> None:
        """`key` names it in errors.

        Raises:
            ModelError: it cannot be loaded, or is no reward model.
        """
        self.kinds, self.device, self.name, self.key = reading(precision, device), device, ref.name, key
        with told_below(key, "model"):
            resolved = resolve(ref)
            held = self.kinds.params, self.kinds.half, resolved.quant, grants.code, grants.nonfinite
            self.loaded = load(resolved, ref, How(device, *held))
        head = self.loaded.head
        if not scores_answers(head) and not judges_steps(head):
            raise ModelError(f"{ref.name} is {kind_of(head)}", fix="give what kind: reward made", key=key)
        self.scored = headed(self.loaded, self.loaded.model).eval()
        check(self.scored)
        self.renderer = Renderer(self.loaded.tokenizer)
        config = self.loaded.model.config.get_text_config()
        self.longest: int | None = getattr(config, "max_position_embeddings", None)

    def scores(self, given: Sequence[Answered]) -> list[float]:
        """The score of each answer, in order.

        Raises:
            ModelError: it judges steps.
            DataError: one cannot be read, or is too long.
        """
        rows = [_row(at, one) for at, one in enumerate(given)]
        try:
            return self.of_tokens(self.tokens(rows))
        except Unusable as reason:
            raise DataError(f"an answer cannot be rendered: {reason}", fix="mend it") from reason

    def tokens(self, rows: Sequence[Row]) -> list[list[int]]:
        """The tokens of each row up to where its answer is scored.

        Raises:
            Unusable: a row cannot be rendered.
        """
        return answer_ids(self.renderer, rows)

    def of_tokens(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """The score of each, read at its last token.

        Raises:
            ModelError: it judges steps.
            DataError: one is too long.
        """
        if not scores_answers(self.loaded.head):
            raise ModelError(f"{self.name} judges steps, not whole answers", fix="ask it for steps", key=self.key)
        return [float(one[0, 0]) for one in self.read(rows, [[len(row) - 1] for row in rows])]

    def steps(self, given: Sequence[tuple[str | Messages, Sequence[str]]], separator: str = "\n") -> list[list[float]]:
        """The chance that each step of each (prompt, steps) is right, in order; `separator` is as in training.

        Raises:
            ModelError: it scores whole answers.
            DataError: one cannot be read, or is too long.
        """
        if not judges_steps(self.loaded.head):
            raise ModelError(f"{self.name} scores whole answers, not steps", fix="ask it for scores", key=self.key)
        reader = StepReader(self.renderer, Steps(separator))
        try:
            asked = [(reader.prompt(prompt), reader.checked(steps)) for prompt, steps in given]
        except Unusable as reason:
            raise DataError(f"steps cannot be read: {reason}", fix="mend them") from reason
        rows = reader.laid(asked)
        found = self.read([ids for ids, _ in rows], [ends for _, ends in rows])
        return [one.softmax(1)[:, 1].tolist() for one in found]

    @torch.no_grad()
    def read(self, rows: Sequence[Sequence[int]], at: Sequence[Sequence[int]]) -> list[Tensor]:
        """What the head gives at these places of each row, (places, C) each; rows are packed where the model takes it.

        Raises:
            DataError: a row is empty, or longer than the model goes.
        """
        for place, row in enumerate(rows):
            if not row or len(row) > (self.longest or len(row)):
                what = f"number {place} has {len(row)} tokens, of at most {self.longest}"
                raise DataError(what, fix="give a shorter one that is not empty")
        made: dict[int, Tensor] = {}
        with autocast(self.device, self.kinds.mixed):
            for group, batch in laid(rows, self.loaded.support.packed, self.device):
                weights = torch.zeros_like(batch.weights)
                for index, (line, here) in zip(group, places(batch), strict=True):
                    weights[line, [here.start + one for one in at[index]]] = 1.0
                parts = self.scored(replace(batch, weights=weights)).cpu().split([len(at[index]) for index in group])
                made |= dict(zip(group, parts, strict=True))
        return [made[index] for index in range(len(rows))]


def _row(at: int, said: Answered) -> Row:
    """A conversation, or a text behind a prompt.

    Raises:
        DataError: it is neither.
    """
    if isinstance(said, str):
        return Row(at, str(at), completion=said)
    if len(said) == 2 and all(isinstance(part, str) for part in said):
        return Row(at, str(at), prompt=str(said[0]), completion=str(said[1]))
    turns = [part for part in said if isinstance(part, Mapping)]
    if turns and len(turns) == len(said) and turns[-1].get("role") == "assistant":
        return Row(at, str(at), messages=tuple(turns), learn_from=len(turns) - 1)
    raise DataError(f"number {at} is no text and no conversation that ends in an answer", fix="give one")


def scores_of(folder: str, given: Iterable[Answered], **how: Any) -> list[float]:
    """The scores that the reward model of a folder, an alias or a Hub id gives to answers; `how` is as in
    `RewardModel`.

    Raises:
        ModelError, DataError: as there.
    """
    return RewardModel(ModelRef(name=folder), **how).scores(list(given))

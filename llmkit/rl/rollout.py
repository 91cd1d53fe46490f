"""Rollouts: answers to prompts, as tokens to learn from and as texts to judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmkit.core.seed import mixed
from llmkit.data.asked import Asked
from llmkit.inference.request import Ask, Completion, Prompt
from llmkit.inference.writer import Writer
from llmkit.rl.rollout_node import Rollout
from llmkit.rl.sample import Sample


@dataclass(frozen=True)
class Answer:
    """One completion of a prompt."""

    ids: tuple[int, ...]
    """With the token that ended it."""
    text: str
    finish: str
    logps: tuple[float | None, ...] = ()
    """Of each of `ids` by the engine, under the law that it was drawn from; of the token that ended it none is told."""

    @property
    def ended(self) -> bool:
        """Whether it came to its own end."""
        return self.finish == "stop"

    @property
    def said(self) -> tuple[int, ...]:
        """Without the token that ended it."""
        return self.ids[:-1] if self.logps and self.logps[-1] is None else self.ids

    def told(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @staticmethod
    def of(said: Mapping[str, Any]) -> Answer:
        """From JSON."""
        return Answer(tuple(said["ids"]), said["text"], said["finish"], tuple(said["logps"]))


def draw(
    writer: Writer, asked: Asked, prompts: Sequence[int], how: Rollout, longest: int, seeds: Sequence[int], end: Any
) -> list[list[Answer]]:
    """`how.group` answers to each of these prompts. They depend on the weights, on the prompt and on the seed, and on
    nothing beside them. `end` is the token that ends a text of the model.

    Raises:
        RequestError: one could not be made.
    """
    asks = []
    for index, seed in zip(prompts, seeds, strict=True):
        ids = tuple(asked.example(index)[0].tolist())
        asks.append(Ask(Prompt(ids), how.sampling(seed, longest - len(ids))))
    return [answers(completion.sound(), end) for completion in writer.each(asks)]


def answers(completion: Completion, end: Any) -> list[Answer]:
    """All answers to one prompt."""
    made = []
    for said in completion.outputs:
        ids, logps = said.token_ids, tuple(token.sampling_logprob for token in said.logprobs)
        if said.finish_reason == "stop" and not isinstance(said.stop_reason, str):
            last = said.stop_reason if isinstance(said.stop_reason, int) else end
            if last is not None:
                ids, logps = (*ids, last), (*logps, None)
        made.append(Answer(ids, said.text, said.finish_reason, logps))
    return made


def seeds(seed: int, rollout: int, turn: int, prompts: Sequence[int]) -> list[int]:
    """A seed for the answers to each prompt, by where in the run they are made."""
    return [mixed(seed, rollout, turn, prompt) >> 1 for prompt in prompts]


def samples(asked: Asked, prompts: Sequence[int], drawn: Sequence[Sequence[Answer]]) -> list[Sample]:
    """The answers as those take them who judge."""
    made = []
    for group, (index, own) in enumerate(zip(prompts, drawn, strict=True)):
        question, columns, (file, line) = asked.rows[index].question, asked.columns[index], asked.places[index]
        for one in own:
            made.append(Sample(question, one.text, one.said, one.finish, columns, file, line, (), group))
    return made

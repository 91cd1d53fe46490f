"""Rollouts: answers to prompts, as tokens to learn from and as texts to judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from llmkit.core.errors import DataError
from llmkit.core.seed import mixed
from llmkit.data.asked import Asked
from llmkit.data.rows import Unusable
from llmkit.inference.request import Ask, Completion, Prompt
from llmkit.inference.writer import Writer
from llmkit.rl.conversation import Speech, opened, play
from llmkit.rl.environment import Environment
from llmkit.rl.rollout_node import Rollout
from llmkit.rl.sample import Messages, Sample


@dataclass(frozen=True)
class Answer:
    """One completion of a prompt."""

    ids: tuple[int, ...]
    """With the token that ended it."""
    text: str
    finish: str
    logps: tuple[float | None, ...] = ()
    """Of each of `ids` by the engine, under the law that it was drawn from; of the token that ended it none is told."""
    own: tuple[bool, ...] = ()
    """Of a conversation: of each of `ids` whether the model said it."""
    turns: Messages = ()
    """All messages behind the prompt."""
    given: float = 0.0
    """What the environment gave."""
    prompt_ids: tuple[int, ...] = ()
    """What was asked, where that is more than the row says: with tools."""

    @property
    def ended(self) -> bool:
        """Whether it came to its own end."""
        return self.finish != "length"

    @property
    def said(self) -> tuple[int, ...]:
        """The model's tokens, without the one that ended them."""
        if self.own:
            return tuple(id for id, mine in zip(self.ids, self.own, strict=True) if mine)
        return self.ids[:-1] if self.logps and self.logps[-1] is None else self.ids

    def weights(self, weight: float) -> list[float]:
        """Of each of `ids`: `weight` of what the model said."""
        return [weight * mine for mine in self.own] if self.own else [weight] * len(self.ids)

    def told(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @staticmethod
    def of(said: Mapping[str, Any]) -> Answer:
        """From JSON."""
        whole = {name: tuple(said[name]) for name in ("ids", "logps", "own", "turns", "prompt_ids")}
        return Answer(text=said["text"], finish=said["finish"], given=said["given"], **whole)


def draw(
    writer: Writer,
    asked: Asked,
    prompts: Sequence[int],
    how: Rollout,
    longest: int,
    seeds: Sequence[int],
    ends: Sequence[int],
) -> list[list[Answer]]:
    """`how.group` answers to each of these prompts. They depend on the weights, on the prompt and on the seed, and on
    nothing beside them. `ends` are the tokens that end a text of the model.

    Raises:
        RequestError: one could not be made.
    """
    asks = []
    for index, seed in zip(prompts, seeds, strict=True):
        ids = tuple(asked.example(index)[0].tolist())
        asks.append(Ask(Prompt(ids), how.sampling(seed, longest - len(ids), tuple(ends))))
    return [answers(completion.sound()) for completion in writer.each(asks)]


def answers(completion: Completion) -> list[Answer]:
    """All answers to one prompt, whose sampling named the tokens that end it."""
    made = []
    for said in completion.outputs:
        ids, logps = said.token_ids, tuple(token.sampling_logprob for token in said.logprobs)
        if said.finish_reason == "stop" and isinstance(said.stop_reason, int):
            ids, logps = (*ids, said.stop_reason), (*logps, None)
        made.append(Answer(ids, said.text, said.finish_reason, logps))
    return made


def converse(
    writer: Writer,
    asked: Asked,
    prompts: Sequence[int],
    how: Rollout,
    longest: int,
    seeds: Sequence[int],
    speech: Speech,
    environment: Callable[[], Environment],
) -> list[list[Answer]]:
    """`how.group` conversations from each of these prompts, with an environment each.

    Raises:
        RequestError, RecipeError: one cannot go on.
        DataError: a row cannot be asked with tools.
    """
    turns = how.environment.turns if how.environment is not None else 1
    rows = [(asked.columns[i], spoken(asked.rows[i].question)) for i in prompts for _ in range(how.group)]
    try:
        talks = opened([environment() for _ in rows], rows, speech)
    except Unusable as reason:
        raise DataError(f"a prompt cannot be asked with tools: {reason}", fix="mend the rows") from reason
    for at, talk in enumerate(talks):
        talk.seed = mixed(seeds[at // how.group], at % how.group)
    sampling = replace(how.sampling(0, how.max_tokens, tuple(speech.ends)), n=1)
    play(talks, writer, speech, sampling, turns, longest)
    made = [
        Answer(
            tuple(talk.ids),
            talk.text,
            talk.finish_reason,
            (None,) * len(talk.ids),
            tuple(talk.said),
            tuple(talk.turns),
            talk.reward,
            talk.prompt_ids,
        )
        for talk in talks
    ]
    return [made[at : at + how.group] for at in range(0, len(made), how.group)]


def spoken(question: str | Messages) -> Messages:
    """What is asked, as messages."""
    return ({"role": "user", "content": question},) if isinstance(question, str) else tuple(question)


def seeds(seed: int, rollout: int, turn: int, prompts: Sequence[int]) -> list[int]:
    """A seed for the answers to each prompt, by where in the run they are made."""
    return [mixed(seed, rollout, turn, prompt) >> 1 for prompt in prompts]


def samples(asked: Asked, prompts: Sequence[int], drawn: Sequence[Sequence[Answer]]) -> list[Sample]:
    """The answers as those take them who judge."""
    made = []
    for group, (index, own) in enumerate(zip(prompts, drawn, strict=True)):
        question, columns, (file, line) = asked.rows[index].question, asked.columns[index], asked.places[index]
        for one in own:
            made.append(Sample(question, one.text, one.said, one.finish, columns, file, line, one.turns, group))
    return made

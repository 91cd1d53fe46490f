"""Conversations of a model with an environment: its answers, what tools say to them, and whose tokens are whose.

A model's tokens stay as they were made: what was said before is never rendered anew, only what stands between two of
its answers is. So what is trained is what was sampled, whatever a chat template makes of earlier turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llmkit.core.errors import RecipeError
from llmkit.core.seed import mixed
from llmkit.data.messages import calls
from llmkit.data.render import Renderer
from llmkit.data.rows import Unusable
from llmkit.inference.detokenise import detokeniser
from llmkit.inference.request import Ask, Completion, Output, Prompt
from llmkit.inference.said.events import Message
from llmkit.inference.said.formats import Format, format_of
from llmkit.inference.said.parser import whole
from llmkit.inference.sampling import Sampling
from llmkit.inference.writer import Writer
from llmkit.rl.environment import Call, Environment, Opening
from llmkit.rl.sample import Messages


@dataclass
class Talk:
    """One conversation, as far as it has come."""

    environment: Environment
    opening: Opening
    seed: int
    prompt_ids: tuple[int, ...] = ()
    ids: list[int] = field(default_factory=list)
    """All tokens behind the prompt."""
    said: list[bool] = field(default_factory=list)
    """Of each of them whether the model said it."""
    turns: list[Mapping[str, Any]] = field(default_factory=list)
    """The messages behind the prompt."""
    text: str = ""
    """What the model said last, to the user."""
    reward: float = 0.0
    """What the environment gave."""
    answers: int = 0
    calls: int = 0
    finish_reason: str = ""
    """stop, length (of an answer, or of all), or turns; empty while it goes on."""


@dataclass(frozen=True)
class Speech:
    """How a model speaks: what renders for it, how it writes calls, and which tokens end an answer."""

    renderer: Renderer
    format: Format
    ends: tuple[int, ...]

    @staticmethod
    def of(renderer: Renderer, ends: Sequence[int]) -> Speech:
        """By the tokenizer's chat template.

        Raises:
            RecipeError: it has none, or none that shows calls of tools.
        """
        template = renderer.tokenizer.chat_template
        made = format_of(template if isinstance(template, str) else str(template or ""))
        if not made.calls.marks and not made.calls.bare and not made.calls.frames:
            what = "the model's chat template shows no calls of tools"
            raise RecipeError(
                what, fix="use a model that was trained to call tools, or set model.template", key="model"
            )
        return Speech(renderer, made, tuple(ends))

    def read(self, ids: Sequence[int], tools: Sequence[Any]) -> Message:
        """What is said in the tokens of an answer."""
        words = detokeniser(self.renderer.tokenizer, self.format.shown(bool(tools)))()
        text = "".join(map(words.add, ids)) + words.rest()
        offered = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in tools}
        return whole(text, self.format, offered)


def opened(
    environments: Sequence[Environment],
    rows: Sequence[tuple[Mapping[str, Any], Messages]],
    speech: Speech,
    seed: int = 0,
) -> list[Talk]:
    """A conversation for each row (its columns, what it asks), before the model says anything.

    Raises:
        Unusable: a template cannot render what is asked.
    """
    talks = []
    for at, (environment, (row, asked)) in enumerate(zip(environments, rows, strict=True)):
        opening = environment.reset(row, asked)
        rendered = speech.renderer.prompt(opening.messages, opening.tools)
        ids = tuple(speech.renderer.encode([rendered])[0][0])
        talks.append(Talk(environment, opening, mixed(seed, at), ids))
    return talks


def play(
    talks: Sequence[Talk],
    writer: Writer,
    speech: Speech,
    sampling: Sampling,
    turns: int,
    longest: int | None = None,
    on_done: Callable[[int], None] = lambda done: None,
) -> None:
    """Runs all to their ends: at most `turns` answers of `sampling.max_tokens` each, and `longest` tokens with the
    prompt. Those that go on are asked together.

    Raises:
        RequestError: one cannot be asked, or an answer failed.
        RecipeError: the generator tells no tokens.
    """
    going = [talk for talk in talks if not talk.finish_reason]
    while going:
        asks = [_ask(talk, speech, sampling, longest) for talk in going]
        for talk, completion in zip(going, writer.each(asks), strict=True):
            _hear(talk, completion.sound(), speech, turns, longest)
        going = [talk for talk in going if not talk.finish_reason]
        on_done(len(talks) - len(going))


def _ask(talk: Talk, speech: Speech, sampling: Sampling, longest: int | None) -> Ask:
    ids = (*talk.prompt_ids, *talk.ids)
    most = sampling.max_tokens if longest is None else min(sampling.max_tokens, longest - len(ids))
    stops = tuple(dict.fromkeys((*sampling.stop_ids, *speech.ends)))
    own = replace(
        sampling,
        seed=mixed(talk.seed, talk.answers) % (1 << 31),
        max_tokens=max(1, most),
        min_tokens=min(sampling.min_tokens, max(1, most)),
        stop_ids=stops,
        n=1,
    )
    return Ask(Prompt(ids, (*talk.opening.messages, *talk.turns), talk.opening.tools), own)


def _hear(talk: Talk, completion: Completion, speech: Speech, turns: int, longest: int | None) -> None:
    """Takes an answer, and what the environment says to it where that leaves room for another answer."""
    output = completion.outputs[0]
    _take(talk, _tokens(output), True)
    said = speech.read(output.token_ids, talk.opening.tools)
    talk.text, talk.answers = said.text, talk.answers + 1
    asked = [Call(one.name, one.arguments) for one in said.calls if one.whole]
    ids = [f"call{talk.calls + at:05}" for at in range(len(asked))]  # of a form that all templates take
    talk.turns.append(_spoken(said, asked, ids))
    if output.finish_reason != "stop":
        talk.finish_reason = "length"
    elif not asked:
        talk.finish_reason = "stop"
    else:
        step = talk.environment.step(asked)
        talk.calls, talk.reward = talk.calls + len(asked), talk.reward + step.reward
        talk.turns += [{**one, "tool_call_id": id} for one, id in zip(step.messages, ids, strict=True)]
        if step.done or talk.answers >= turns:
            talk.finish_reason = "stop" if step.done else "turns"
        elif _room(talk, between := _between(talk, speech), longest):
            _take(talk, between, False)
        else:
            talk.finish_reason = "length"


def _take(talk: Talk, ids: Sequence[int], said: bool) -> None:
    talk.ids += ids
    talk.said += [said] * len(ids)


def _tokens(output: Output) -> tuple[int, ...]:
    """An answer's tokens with the one that ended it: the model said that too."""
    if output.text and not output.token_ids:
        what = "the generator tells no tokens, and calls of tools are read from them"
        raise RecipeError(what, fix="use generator: engine", key="generator")
    if output.finish_reason == "stop" and isinstance(output.stop_reason, int):
        return (*output.token_ids, output.stop_reason)
    return output.token_ids


def _spoken(said: Message, asked: Sequence[Call], ids: Sequence[str]) -> Mapping[str, Any]:
    """An answer as a message."""
    made: dict[str, Any] = {"role": "assistant", "content": said.text}
    if said.reasoning:
        made["reasoning_content"] = said.reasoning
    if asked:
        functions = [{"name": one.name, "arguments": one.arguments} for one in asked]
        made["tool_calls"] = [
            {"id": id, "type": "function", "function": one} for one, id in zip(functions, ids, strict=True)
        ]
    return made


def _between(talk: Talk, speech: Speech) -> list[int]:
    """The tokens between the model's last answer and its next one: the answers of tools, as the template shows them."""
    shown = [dict(message) for message in (*talk.opening.messages, *talk.turns)]
    for message in shown:
        message.pop("reasoning_content", None)  # thoughts of earlier turns are no part of what follows them
        if "tool_calls" in message:
            message["tool_calls"] = calls(message["tool_calls"])
    try:
        rendered = speech.renderer.after(shown, talk.opening.tools)
    except Unusable as reason:
        what = f"the chat template cannot show what tools say: {reason}"
        raise RecipeError(what, fix="use another model, or set model.template", key="model") from reason
    ids: list[int] = speech.renderer.encode([rendered])[0][0]
    return ids


def _room(talk: Talk, between: Sequence[int], longest: int | None) -> bool:
    """Whether the model could say something behind these tokens."""
    return longest is None or len(talk.prompt_ids) + len(talk.ids) + len(between) < longest

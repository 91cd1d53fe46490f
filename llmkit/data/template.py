"""Chat templates: the text that they give, and where in it each answer stands.

Where is read from the template itself and never searched for. A template with `{% generation %}` markers says it. For
any other, an answer is what the template adds between the conversation up to it, ending in the generation prompt, and
the conversation with it. Its end of turn is the special token that closes what the template adds for it: it belongs to
the answer, inside of the markers or behind them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from llmkit.data.rows import Unusable
from llmkit.data.skeleton import Parts, filled, opaque, plain, skeleton

MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
PRIVATE = range(0xE000, 0xF8FF)
"""Letters without a meaning; those that a row does not hold can mark places in it."""
Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]


MOST_SKELETONS = 1024


class Rewrites(Unusable):
    """The conversation up to an answer is no beginning of the whole: for example, earlier thoughts are left out."""


@contextmanager
def _refusals() -> Iterator[None]:
    """Makes of what a template may raise the reason why a row cannot be used."""
    from jinja2 import TemplateError

    try:
        yield
    except (TemplateError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as cause:
        why = (str(cause).splitlines() or [type(cause).__name__])[0][:80]
        raise Unusable(f"the chat template refuses it ({why})") from cause


class Template:
    """The chat template of a tokenizer. `specials` matches its special tokens."""

    def __init__(self, tokenizer: Any, specials: re.Pattern[str]) -> None:
        self.tokenizer, self.specials = tokenizer, specials
        self.skeletons: dict[tuple[bool, tuple[str, ...]], Parts] = {}

    @cached_property
    def opaque(self) -> bool:
        """Whether the template only prints what messages say."""
        return opaque(self.tokenizer.get_chat_template())

    def text(self, messages: Messages, tools: Sequence[Any] = (), prompt: bool = False) -> str:
        """What the template makes of messages; with `prompt`, up to where an answer begins.

        Raises:
            Unusable: the template refuses the messages.
        """
        if not tools and self.opaque and plain(messages):
            key = prompt, tuple(message["role"] for message in messages)
            if key not in self.skeletons:
                if len(self.skeletons) >= MOST_SKELETONS:
                    self.skeletons.clear()
                self.skeletons[key] = skeleton(messages, lambda marked: self._rendered(marked, (), prompt))
            return filled(self.skeletons[key], messages)
        return self._rendered(messages, tools, prompt)

    def _rendered(self, messages: Messages, tools: Sequence[Any], prompt: bool) -> str:
        """The twin of `text`: by the template itself, every time."""
        with _refusals():
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt
            )
        return text

    def spans(self, messages: Messages, tools: Sequence[Any], answers: Sequence[int], text: str) -> tuple[Span, ...]:
        """Where the messages `answers` stand in `text`, the whole of the conversation.

        Raises:
            Rewrites: they have no fixed place.
            Unusable: the template's markers do not fit the messages.
        """
        template = self.tokenizer.get_chat_template(tools=list(tools) or None)
        if MARKERS.search(template):
            return self._marked(template, messages, tools, answers, text)
        return tuple(self._between(messages, tools, index, text) for index in answers)

    def contents(self, messages: Messages, tools: Sequence[Any], chosen: Sequence[int], text: str) -> tuple[Span, ...]:
        """Where what the messages `chosen` say stands in `text`, with the end of turn behind it.

        Letters that the text does not hold are put around what they say, and found in what the template makes of that.

        Raises:
            Unusable: the template changes it, so that it has no fixed place.
        """
        left, right = (chr(code) for code in [c for c in PRIVATE if chr(c) not in text][:2])
        marked = [dict(message) for message in messages]
        for index in chosen:
            said = str(marked[index].get("content") or "")
            core = said.strip()
            marked[index]["content"] = said.replace(core, f"{left}{core}{right}", 1) if core else f"{left}{right}{said}"
        written = self.text(marked, tools)
        begins, ends = ([i for i, letter in enumerate(written) if letter == sign] for sign in (left, right))
        if re.sub(f"[{left}{right}]", "", written) != text or not len(begins) == len(ends) == len(chosen):
            raise Unusable("the chat template changes what a message says, so that it has no fixed place")
        spans = []
        for order, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            start, stop = begin - 2 * order, end - 2 * order - 1
            own = self._upto(messages[: chosen[order] + 1], tools)
            behind = re.match(rf"\s*(?:{self.specials.pattern})", own[stop:]) if text.startswith(own) else None
            spans.append((start, stop + (behind.end() if behind else 0)))  # the next turn's beginning is no end
        return tuple(spans)

    def _upto(self, messages: Messages, tools: Sequence[Any]) -> str:
        """The text of the first messages; none where the template refuses them alone."""
        try:
            return self.text(messages, tools)
        except Unusable:
            return ""

    def closed(self, text: str, end: int) -> bool:
        """Whether what ends at `end` ends in a special token."""
        return any(match.end() == end for match in self.specials.finditer(text))

    def _marked(
        self, template: str, messages: Messages, tools: Sequence[Any], answers: Sequence[int], text: str
    ) -> tuple[Span, ...]:
        """By the template's own markers: one stretch for each turn of the assistant, and the end of turn behind it."""
        again, found = self._marks(template, messages, tools)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if again != text or len(found) != len(turns):
            raise Unusable(f"the chat template marks {len(found)} answers, and there are {len(turns)}")
        made = []
        for index, (start, end) in zip(turns, found, strict=True):
            if index in answers and not self.closed(text, end):
                end += len(self._behind(template, messages[: index + 1], tools, text[end:]))
            made += [(start, end)] if index in answers else []
        return tuple(made)

    def _marks(self, template: str, messages: Messages, tools: Sequence[Any]) -> tuple[str, Sequence[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        with _refusals():
            made: Any = render_jinja_template(
                conversations=[list(messages)],
                tools=list(tools) or None,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        (text,), (found,) = made
        return text, found

    def _behind(self, template: str, upto: Messages, tools: Sequence[Any], rest: str) -> str:
        """The end of turn that follows the last marked stretch of `upto`, where `rest` of the whole begins with it too:
        what both have is not the next turn's beginning."""
        text, found = self._marks(template, upto, tools)
        match = re.match(rf"\s*(?:{self.specials.pattern})", text[found[-1][1] :]) if found else None
        return match[0] if match is not None and rest.startswith(match[0]) else ""

    def _between(self, messages: Messages, tools: Sequence[Any], index: int, text: str) -> Span:
        """By what the template adds for one answer."""
        before = self.text(messages[:index], tools, prompt=True)
        upto = text if index == len(messages) - 1 else self.text(messages[: index + 1], tools)
        if not upto.startswith(before):
            raise Rewrites("the chat template's generation prompt is no beginning of its answers")
        if not text.startswith(upto):
            raise Rewrites("the chat template rewrites earlier turns, so that its answers have no fixed place")
        ends = [match.end() for match in self.specials.finditer(upto, len(before))]
        # special tokens may stand inside of an answer too: only one with nothing behind it ends the turn
        return len(before), ends[-1] if ends and not upto[ends[-1] :].strip() else len(upto.rstrip())

"""Chat templates: the text that they give, and where in it each answer stands.

Where is read from the template itself and never searched for. A template with `{% generation %}` markers says it. For
any other, an answer is what the template adds between the conversation up to it, ending in the generation prompt, and
the conversation with it, up to its end-of-turn token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.data.rows import Unusable

MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]


class Rewrites(Unusable):
    """The conversation up to an answer is no beginning of the whole: for example, earlier thoughts are left out."""


class Template:
    """The chat template of a tokenizer. `specials` matches its special tokens."""

    def __init__(self, tokenizer: Any, specials: re.Pattern[str]) -> None:
        self.tokenizer, self.specials = tokenizer, specials

    def text(self, messages: Messages, tools: Sequence[Any] = (), prompt: bool = False) -> str:
        """What the template makes of messages; with `prompt`, up to where an answer begins.

        Raises:
            Unusable: the template refuses the messages.
        """
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as cause:
            why = (str(cause).splitlines() or [type(cause).__name__])[0][:80]
            raise Unusable(f"the chat template refuses it ({why})") from cause
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

    def _marked(
        self, template: str, messages: Messages, tools: Sequence[Any], answers: Sequence[int], text: str
    ) -> tuple[Span, ...]:
        """By the template's own markers: one stretch for each turn of the assistant."""
        from transformers.utils.chat_template_utils import render_jinja_template

        made: Any = render_jinja_template(
            conversations=[list(messages)],
            tools=list(tools) or None,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        (again,), (found,) = made
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if again != text or len(found) != len(turns):
            raise Unusable(f"the chat template marks {len(found)} answers, and there are {len(turns)}")
        return tuple((start, end) for index, (start, end) in zip(turns, found, strict=True) if index in answers)

    def _between(self, messages: Messages, tools: Sequence[Any], index: int, text: str) -> Span:
        """By what the template adds for one answer."""
        before = self.text(messages[:index], tools, prompt=True)
        upto = text if index == len(messages) - 1 else self.text(messages[: index + 1], tools)
        if not upto.startswith(before):
            raise Rewrites("the chat template's generation prompt is no beginning of its answers")
        if not text.startswith(upto):
            raise Rewrites("the chat template rewrites earlier turns, so that its answers have no fixed place")
        ends = [match.end() for match in self.specials.finditer(upto, len(before))]
        return len(before), ends[-1] if ends else len(upto.rstrip())

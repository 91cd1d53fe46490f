"""From a row to the text that a model will see, and which spans of it are trained.

Special-token text inside of messages is kept as plain text: a letter that the row does not use is put into it while
the template runs, so that what the template writes and what the row holds can be told apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmkit.core.errors import DataError, ModelError
from llmkit.data.encode import OPEN, Encoder, Rendered
from llmkit.data.rows import Row, Unusable
from llmkit.data.template import Messages, Rewrites, Template

__all__ = ["Rendered", "Renderer"]

PRIVATE = range(0xE000, 0xF8FF)
"""Letters without a meaning; one that a row does not hold marks its special-token text."""


class Renderer:
    """Renders rows for one tokenizer. `train_on`: assistant, last or all.

    Raises:
        ModelError: the tokenizer cannot say which letters a token stands for.
    """

    def __init__(self, tokenizer: Any, train_on: str = "assistant") -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} does not tell the places of its tokens",
                fix="give the model a tokenizer.json",
                key="model",
            )
        self.tokenizer, self.train_on = tokenizer, train_on
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.specials = re.compile("|".join(sorted(map(re.escape, special), key=len, reverse=True)) or r"(?!)")
        self.template, self.encoder = Template(tokenizer, self.specials), Encoder(tokenizer, self.specials)

    def render(self, row: Row) -> Rendered:
        """One row as one text.

        Raises:
            Unusable: the template cannot render it, or does not say where its answers are.
            DataError: there are messages and no chat template.
        """
        return self._checked(self._conversation(row, len(row.messages)) if row.messages else self._plain(row))

    def turns(self, row: Row) -> tuple[Rendered, ...]:
        """One row as one text; or as one for each answer, under a template that rewrites what came before it.

        Raises:
            Unusable, DataError: as `render`.
        """
        try:
            return (self.render(row),)
        except Rewrites:
            answers = self._answers(row, len(row.messages))
            if len(answers) < 2:
                raise
            return tuple(self._checked(self._conversation(row, index + 1, alone=True)) for index in answers)

    def prompt(self, asked: str | Messages, tools: Sequence[Any] = ()) -> Rendered:
        """What a model is asked, up to where its answer begins, as a row shows it in training.

        Raises:
            Unusable, DataError: as `render`.
        """
        if isinstance(asked, str):
            mark = self._mark(asked)
            return self._checked(Rendered(self._escaped(asked, mark), (), mark, special=True))
        text, mark, *_ = self._written(asked, tools, prompt=True)
        return self._checked(Rendered(text, (), mark))

    def whole(self, messages: Messages) -> Rendered:
        """A conversation as it stands, none of it trained.

        Raises:
            Unusable, DataError: as `render`.
        """
        text, mark, *_ = self._written(messages, ())
        return self._checked(Rendered(text, (), mark))

    def unclosed(self, rendered: Rendered) -> Rendered:
        """The same without the end of its last answer: what is said, and not that it ends."""
        (start, end), before = rendered.spans[-1], rendered.spans[:-1]
        said = re.sub(rf"(?:\s|{self.specials.pattern})+\Z", "", rendered.text[start:end])
        return replace(rendered, spans=(*before, (start, start + len(said))), close=False)

    def encode(self, rendered: Sequence[Rendered]) -> list[tuple[list[int], list[float]]]:
        """(ids, weights) of each text; weight 1 where a token lies inside of a trained span."""
        return self.encoder.encode(rendered)

    def _plain(self, row: Row) -> Rendered:
        mark = self._mark([row.prompt, row.completion])
        prompt, completion = self._escaped(row.prompt, mark), self._escaped(row.completion, mark)
        cut, end = len(prompt), len(prompt) + len(completion)
        spans = ((0 if self.train_on == "all" else cut, end),)
        return Rendered(prompt + completion, spans, mark, close=True, special=True, cut=cut)

    def _answers(self, row: Row, upto: int) -> list[int]:
        found = [i for i, m in enumerate(row.messages[:upto]) if m["role"] == "assistant" and i >= row.learn_from]
        return found[-1:] if self.train_on == "last" else found

    def _conversation(self, row: Row, upto: int, alone: bool = False) -> Rendered:
        """The first messages of a row as a text; `alone`: only the last answer is trained."""
        text, mark, messages, tools = self._written(row.messages[:upto], row.tools)
        if self.train_on == "all":
            return Rendered(text, ((0, len(text)),), mark)
        answers = self._answers(row, upto)
        spans = self.template.spans(messages, tools, answers[-1:] if alone else answers, text)
        end = spans[-1][1] if spans else len(text)
        if not spans or self.template.closed(text, end):
            return Rendered(text, spans, mark)
        if text[end:].strip():
            return Rendered(text, spans, mark, unended=True)
        return Rendered(text[:end], spans, mark, close=True)

    def _written(
        self, given: Messages, given_tools: Sequence[Any], prompt: bool = False
    ) -> tuple[str, str, Messages, Sequence[Any]]:
        """What the template makes of messages whose special-token text is marked: (text, mark, messages, tools)."""
        if not self.tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template, and the rows are messages",
                fix="set model.template to a file with one",
                key="model.template",
            )
        plain: tuple[Any, Any] = list(given), list(given_tools)
        mark = self._mark(plain)
        messages, tools = (_each(part, lambda text: self._escaped(text, mark)) for part in plain)
        text = self.template.text(messages, tools, prompt)
        if mark and text.replace(mark, "") != self.template.text(*plain, prompt):
            raise Unusable("the chat template changes special-token text in messages")
        if tools and text == self.template.text(messages, prompt=prompt):
            raise Unusable("the chat template does not show the row's tools")
        return text, mark, messages, tools

    def _mark(self, values: Any) -> str:
        held = "".join(_strings(values))
        if not self.specials.search(held):
            return ""
        if OPEN in held or not self.encoder.keeps_plain:
            raise Unusable("special-token text, which this tokenizer cannot encode as plain text")
        return next(chr(code) for code in PRIVATE if chr(code) not in held)

    def _escaped(self, text: str, mark: str) -> str:
        return self.specials.sub(lambda match: mark.join(match[0]), text) if mark else text

    def _checked(self, rendered: Rendered) -> Rendered:
        try:
            rendered.text.encode()
        except UnicodeEncodeError as cause:
            raise Unusable("half a surrogate pair, which no UTF-8 has") from cause
        return rendered


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [text for part in parts for text in _strings(part)]


def _each(value: Any, change: Any) -> Any:
    """The same shape with every text changed but roles."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: item if key == "role" else _each(item, change) for key, item in value.items()}
    return [_each(item, change) for item in value] if isinstance(value, list | tuple) else value

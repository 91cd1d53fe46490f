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
from llmkit.data.messages import arguments_as_text, python_in
from llmkit.data.rows import NoTools, Row, Unusable
from llmkit.data.template import PRIVATE, Messages, Rewrites, Template
from llmkit.data.thoughts import TAGS, Layer, blocks, field_of, layered, placed, thought_of

__all__ = ["Rendered", "Renderer"]

DROPPED = "the chat template does not show an answer's thought"


class Renderer:
    """Renders rows for one tokenizer. `train_on`: assistant, last, all, or the roles that are trained.

    Raises:
        ModelError: the tokenizer cannot say which letters a token stands for.
    """

    def __init__(
        self, tokenizer: Any, train_on: str | Sequence[str] = "assistant", train_reasoning: bool = True
    ) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} does not tell the places of its tokens",
                fix="give the model a tokenizer.json",
                key="model",
            )
        self.tokenizer, self.train_on, self.train_reasoning = tokenizer, train_on, train_reasoning
        self.roles = {"assistant"} if isinstance(train_on, str) else set(train_on)
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
            answers = [i for i in self._chosen(row, len(row.messages)) if row.messages[i]["role"] == "assistant"]
            if len(answers) < 2:
                raise
            begins = [0, *(index + 1 for index in answers)]
            return tuple(
                self._checked(self._conversation(row, index + 1, begin))
                for begin, index in zip(begins, answers, strict=False)
            )

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

    def whole(self, messages: Messages, tools: Sequence[Any] = ()) -> Rendered:
        """A conversation as it stands, none of it trained.

        Raises:
            Unusable, DataError: as `render`.
        """
        text, mark, *_ = self._written(messages, tools)
        return self._checked(Rendered(text, (), mark))

    def after(self, messages: Messages, tools: Sequence[Any] = ()) -> Rendered:
        """What stands between the last answer of a conversation and the next one: what others said since.

        Raises:
            Unusable, DataError: as `render`; or there is no answer.
        """
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise Unusable("no assistant turn")
        text, mark, given, given_tools = self._written(messages, tools, prompt=True)
        whole = self.template.text(given, given_tools)
        ((_, end),) = self.template.spans(given, given_tools, answers[-1:], whole)
        if not text.startswith(whole[:end]):
            raise Rewrites("the chat template's generation prompt changes what was said before it")
        return self._checked(Rendered(text[end:], (), mark))

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

    def _chosen(self, row: Row, upto: int) -> dict[int, float]:
        """Which of the first messages are trained, and their weights: a message's own word comes before its role."""
        own, made = row.weights or (None,) * len(row.messages), {}
        for index, message in enumerate(row.messages[:upto]):
            weight = 1.0 if message["role"] in self.roles and index >= row.learn_from else 0.0
            made[index] = weight if (said := own[index]) is None else said
        if self.train_on == "last":
            last = max((i for i, m in enumerate(row.messages[:upto]) if m["role"] == "assistant"), default=-1)
            made = {last: made[last]} if last >= 0 else {}
        return {index: weight for index, weight in made.items() if weight > 0}

    def _conversation(self, row: Row, upto: int, begin: int = 0) -> Rendered:
        """The first messages of a row as a text; those before `begin` are not trained."""
        text, mark, messages, tools = self._written(row.messages[:upto], row.tools)
        chosen = {index: weight for index, weight in self._chosen(row, upto).items() if index >= begin}
        layers: list[Layer] = [(0, len(text), 1.0)] if self.train_on == "all" else []
        if layers:  # only what says its weight, or thinks, is looked for
            said = dict(enumerate(row.weights[:upto]))
            chosen = {i: w for i, w in said.items() if w is not None and w != 1.0}
            if not self.train_reasoning:
                chosen |= {i: 1.0 for i, m in enumerate(messages) if thought_of(m) and i not in chosen}
        layers += self._layers(messages, tools, chosen, text)
        spans, weights = layered(layers) if len(layers) > 1 or any(w != 1.0 for *_, w in layers) else _alone(layers)
        end = spans[-1][1] if spans else len(text)
        if not spans or self.train_on == "all" or self.template.closed(text, end):
            return Rendered(text, spans, mark, weights=weights)
        if text[end:].strip():
            return Rendered(text, spans, mark, unended=max(chosen) == upto - 1, weights=weights)
        return Rendered(text[:end], spans, mark, close=True, weights=weights)

    def _layers(self, messages: Messages, tools: Sequence[Any], chosen: Mapping[int, float], text: str) -> list[Layer]:
        """Where the chosen messages stand, with their weights; over them, what of it is thought, where that is not
        trained."""
        answers = [index for index in chosen if messages[index]["role"] == "assistant"]
        others = [index for index in chosen if messages[index]["role"] != "assistant"]
        places = dict(zip(answers, self.template.spans(messages, tools, answers, text), strict=True)) if answers else {}
        if others:
            places |= dict(zip(others, self.template.contents(messages, tools, others, text), strict=True))
        layers = [(*places[index], chosen[index]) for index in sorted(places)]
        for index in answers:
            thought, (start, end) = thought_of(messages[index]), places[index]
            if thought and thought not in text[start:end]:
                raise (Rewrites if index < len(messages) - 1 else Unusable)(DROPPED)
            if not self.train_reasoning:
                layers += [(*place, 0.0) for place in blocks(text, start, end, thought)]
        return layers

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
        field = field_of(self.tokenizer.get_chat_template(tools=list(given_tools) or None))
        messages, tools = [placed(message, field) for message in given], list(given_tools)
        texts = arguments_as_text(messages)
        try:
            made = self._marked(messages, tools, prompt)
        except Unusable:  # some templates join arguments to text
            if texts is None:
                raise
            return self._marked(texts, tools, prompt)
        return self._marked(texts, tools, prompt) if texts is not None and python_in(made[0], messages) else made

    def _marked(
        self, given: Messages, given_tools: Sequence[Any], prompt: bool
    ) -> tuple[str, str, Messages, Sequence[Any]]:
        plain: tuple[Any, Any] = list(given), list(given_tools)
        mark = self._mark([[_each(m, lambda t: TAGS.sub("", t)) if _answers(m) else m for m in given], plain[1]])
        messages = [_each(m, lambda text, m=m: self._escaped(text, mark, _answers(m))) for m in given]
        tools = _each(plain[1], lambda text: self._escaped(text, mark))
        text = self.template.text(messages, tools, prompt)
        if mark and text.replace(mark, "") != self.template.text(*plain, prompt):
            raise Unusable("the chat template changes special-token text in messages")
        if tools and text == self.template.text(messages, prompt=prompt):
            raise NoTools("the chat template does not show the row's tools")
        return text, mark, messages, tools

    def _mark(self, values: Any) -> str:
        held = "".join(_strings(values))
        if not self.specials.search(held):
            return ""
        if OPEN in held or not self.encoder.keeps_plain:
            raise Unusable("special-token text, which this tokenizer cannot encode as plain text")
        return next(chr(code) for code in PRIVATE if chr(code) not in held)

    def _escaped(self, text: str, mark: str, thinks: bool = False) -> str:
        """The tags around a thought are the answer's own signs: where they are special tokens, they stay those."""
        if not mark:
            return text
        return self.specials.sub(lambda m: m[0] if thinks and TAGS.fullmatch(m[0]) else mark.join(m[0]), text)

    def _checked(self, rendered: Rendered) -> Rendered:
        try:
            rendered.text.encode()
        except UnicodeEncodeError as cause:
            raise Unusable("half a surrogate pair, which no UTF-8 has") from cause
        return rendered


def _alone(layers: Sequence[Layer]) -> tuple[tuple[tuple[int, int], ...], tuple[float, ...]]:
    """A single stretch of weight 1, or none."""
    return tuple((start, end) for start, end, _ in layers), ()


def _answers(message: Mapping[str, Any]) -> bool:
    return bool(message.get("role") == "assistant")


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

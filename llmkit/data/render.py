"""From rows to tokens with a weight each.

The tokens are those that the model will see in use: a conversation goes through the tokenizer at once, a plain prompt
apart from its completion. What is trained is found by rendering, not by searching: an answer is what the template adds
between the conversation up to it, ending in the generation prompt, and the conversation with it. A template for which
one is no beginning of the other is refused. Special-token text inside of messages is kept as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.core.errors import DataError
from llmkit.data.rows import Row, Unusable

MARK = "\ue0f3"
"""Put inside of special-token text in messages while the template runs, so that the two can be told apart."""


@dataclass(frozen=True)
class Rendered:
    """A text, the spans of it that are trained, and whether messages hold special-token text."""

    text: str
    spans: tuple[tuple[int, int], ...]
    marked: bool = False
    close: bool = False
    """Whether the end token is still to be added, and trained."""
    special: bool = False
    """Whether the tokenizer adds its own first token."""
    cut: int = 0
    """Where a prompt ends that is sent alone in use: no token may reach over it."""


class Renderer:
    """Renders rows for one tokenizer. `train_on`: assistant, last or all."""

    def __init__(self, tokenizer: Any, train_on: str = "assistant") -> None:
        self.tokenizer, self.train_on = tokenizer, train_on
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        self.specials = re.compile("|".join(sorted(map(re.escape, added), key=len, reverse=True)) or r"(?!)")
        self.ids = {token.content: id for id, token in tokenizer.added_tokens_decoder.items()}

    def render(self, row: Row) -> Rendered:
        """One row as text with its trained spans.

        Raises:
            Unusable: the template cannot render it, or does not say where its answers are.
            DataError: there are messages and no chat template.
        """
        if not row.messages:
            prompt, completion = self._escaped(row.prompt), self._escaped(row.completion)
            text, cut = prompt + completion, len(prompt)
            marked = text != row.prompt + row.completion
            return Rendered(text, ((0 if self.train_on == "all" else cut, len(text)),), marked, True, True, cut)
        return self._conversation(row)

    def _conversation(self, row: Row) -> Rendered:
        if not self.tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template, and the rows are messages",
                fix="set model.template to a file with one",
                key="model.template",
            )
        marked = any(self.specials.search(text) for text in _strings(row.messages))
        messages = [_escape(m, self._escaped) for m in row.messages] if marked else list(row.messages)
        text = self.apply(messages, row.tools)
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= row.learn_from]
        if self.train_on == "last":
            answers = answers[-1:]
        if self.train_on == "all":
            return Rendered(text, ((0, len(text)),), marked)
        spans = [self._span(messages, row.tools, i, text) for i in answers]
        close = not any(self.specials.search(text[start:end]) for start, end in spans[-1:])
        return Rendered(text.rstrip("\n") if close else text, tuple(spans), marked, close)

    def _span(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], index: int, text: str
    ) -> tuple[int, int]:
        """Where answer `index` stands in the text: from the generation prompt to its end-of-turn token."""
        before = self.apply(messages[:index], tools, prompt=True)
        upto = text if index == len(messages) - 1 else self.apply(messages[: index + 1], tools)
        if not (upto.startswith(before) and text.startswith(upto)):
            raise Unusable("the chat template rewrites earlier turns, so that its answers have no fixed place")
        ends = [match.end() for match in self.specials.finditer(upto, len(before))]
        return len(before), ends[-1] if ends else len(upto.rstrip())

    def apply(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), prompt: bool = False) -> str:
        """The template's text.

        Raises:
            Unusable: the template refuses the messages.
        """
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, TypeError, ValueError, KeyError) as cause:
            raise Unusable(f"the chat template refuses it ({str(cause).splitlines()[0][:80]})") from cause
        return text

    def encode(self, rendered: Sequence[Rendered]) -> list[tuple[list[int], list[float]]]:
        """(ids, weights) of each text; weight 1 where a token lies inside a trained span."""
        made: list[tuple[list[int], list[float]] | None] = [None] * len(rendered)
        for special in (False, True):
            plain = [i for i, r in enumerate(rendered) if not r.marked and r.special == special]
            if not plain:
                continue
            heads = self._tokens([rendered[i].text[: rendered[i].cut or None] for i in plain], special)
            tails = self._tokens([rendered[i].text[rendered[i].cut :] if rendered[i].cut else "" for i in plain], False)
            for i, (ids, offsets), (more, places) in zip(plain, heads, tails, strict=True):
                if special:
                    ids, offsets = self._open_ended(ids, offsets)
                cut = rendered[i].cut
                made[i] = self._weighed(
                    rendered[i], [*ids, *more], [*offsets, *((a + cut, b + cut) for a, b in places)]
                )
        return [pair or self._encode_marked(rendered[i]) for i, pair in enumerate(made)]

    def _tokens(self, texts: Sequence[str], special: bool) -> list[tuple[list[int], list[tuple[int, int]]]]:
        if not any(texts):
            return [([], [])] * len(texts)
        out = self.tokenizer(list(texts), add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        return list(zip(out["input_ids"], out["offset_mapping"], strict=True))

    def _open_ended(self, ids: list[int], offsets: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Without an end that the tokenizer put there by itself: ours comes after the completion."""
        closed = bool(ids) and ids[-1] == self.tokenizer.eos_token_id and offsets[-1][0] == offsets[-1][1]
        return (ids[:-1], offsets[:-1]) if closed else (ids, offsets)

    def _weighed(
        self, r: Rendered, ids: list[int], offsets: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[float]]:
        end = self.tokenizer.eos_token_id
        weights = [float(any(s <= a and b <= e for s, e in r.spans)) if b > a else 0.0 for a, b in offsets]
        if r.special and self.train_on == "all" and ids and offsets[0][0] == offsets[0][1]:
            weights[0] = 0.0
        if r.close and end is not None:
            return [*ids, end], [*weights, 1.0]
        return list(ids), weights

    def _encode_marked(self, r: Rendered) -> tuple[list[int], list[float]]:
        """A text whose messages hold special-token text: the template's own tokens are special, those are not."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        if r.special and (first := self.tokenizer("")["input_ids"][:1]):
            ids, offsets = (list(first), [(0, 0)]) if first[0] != self.tokenizer.eos_token_id else ([], [])
        for start, end in ((0, r.cut), (r.cut, len(r.text))):
            for match in self.specials.finditer(r.text, start, end):
                self._encode_plain(r.text[start : match.start()], start, ids, offsets)
                ids.append(self.ids[match[0]])
                offsets.append(match.span())
                start = match.end()
            self._encode_plain(r.text[start:end], start, ids, offsets)
        return self._weighed(r, ids, offsets)

    def _encode_plain(self, text: str, at: int, ids: list[int], offsets: list[tuple[int, int]]) -> None:
        """A run without specials of the template; places are those of the marked text."""
        bare = text.replace(MARK, "")
        if not bare:
            return
        places = [i for i, letter in enumerate(text) if letter != MARK] + [len(text)]
        out = self.tokenizer(
            bare, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
        )
        ids += out["input_ids"]
        offsets += [
            (at + places[a], at + places[b - 1] + 1 if b > a else at + places[a]) for a, b in out["offset_mapping"]
        ]

    def _escaped(self, text: str) -> str:
        return self.specials.sub(lambda match: match[0][0] + MARK + match[0][1:], text)


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [text for part in parts for text in _strings(part)]


def _escape(value: Any, escaped: Any) -> Any:
    if isinstance(value, str):
        return escaped(value)
    if isinstance(value, Mapping):
        return {key: item if key == "role" else _escape(item, escaped) for key, item in value.items()}
    return [_escape(item, escaped) for item in value] if isinstance(value, list | tuple) else value

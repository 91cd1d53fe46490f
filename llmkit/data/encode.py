"""From rendered texts to token ids with a weight each: the ids that the tokenizer gives the whole text in use."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from llmkit.core.errors import DataError
from llmkit.data.words import Words, words

Offsets = list[tuple[int, int]]
Pairs = list[tuple[list[int], Offsets]]
ANCHORS = ("\n", "x", ".")
OPEN, CLOSE = "\U000f0000", "\U000f0001"
"""Letters of a private plane: around a number they name a special token in the twin."""


@dataclass(frozen=True)
class Rendered:
    """A text and the spans of it that are trained."""

    text: str
    spans: tuple[tuple[int, int], ...]
    mark: str = ""
    """The letter inside of special-token text of the row, which is plain text; empty where there is none."""
    close: bool = False
    """Whether the end token is still to be added, and trained."""
    special: bool = False
    """Whether the tokenizer adds its own first token."""
    unended: bool = False
    """Whether the template writes more behind the last answer, which its markers leave out: no end is trained."""
    cut: int = 0
    """Where a prompt ends that is sent alone in use: no token may reach over it."""
    weights: tuple[float, ...] = ()
    """The weight of each span; empty where all are 1."""


class Encoder:
    """Encodes texts of one tokenizer; `specials` matches its special tokens."""

    def __init__(self, tokenizer: Any, specials: re.Pattern[str]) -> None:
        self.tokenizer, self.specials = tokenizer, specials

    def encode(self, rendered: Sequence[Rendered]) -> list[tuple[list[int], list[float]]]:
        """(ids, weights) of each text; a token that lies inside of a trained span has the weight of it."""
        made = self._by_words(rendered)
        for special in (False, True):
            here = [i for i, r in enumerate(rendered) if i not in made and not r.mark and r.special == special]
            heads = self._own([rendered[i].text[: rendered[i].cut or None] for i in here], special)
            tails = self._tails(
                [rendered[i].text[rendered[i].cut :] if rendered[i].cut else "" for i in here], self._own
            )
            for i, head, tail in zip(here, heads, tails, strict=True):
                made[i] = self._joined(rendered[i], head, tail, rendered[i].spans, rendered[i].cut)
        return [made[i] if i in made else self._with_twin(r) for i, r in enumerate(rendered)]

    def _by_words(self, rendered: Sequence[Rendered]) -> dict[int, tuple[list[int], list[float]]]:
        """Those that words tell, by their place."""
        made: dict[int, tuple[list[int], list[float]]] = {}
        end = self.tokenizer.eos_token_id
        for index, r in enumerate(rendered):
            if r.mark or r.special or r.cut:
                continue
            if self.words is None:  # asked for late: to make them is to read the whole vocabulary
                return made
            given = r.weights or (1.0,) * len(r.spans)
            if (found := self.words.encode(r.text, r.spans, given)) is None:
                continue
            if r.close and end is not None:
                found[0].append(end)
                found[1].append(given[-1] if given else 1.0)
            made[index] = found
        return made

    @cached_property
    def words(self) -> Words | None:
        """The tokenizer's words, where they are known."""
        return words(self.tokenizer)

    @cached_property
    def keeps_plain(self) -> bool:
        """Whether special-token text can be encoded as plain text: no word of the vocabulary stands in its way."""
        plain = {text: self.twin[0].encode(text, add_special_tokens=False).ids for text in self._names}
        return all(self.tokenizer.convert_tokens_to_ids(text) not in ids for text, ids in plain.items())

    @cached_property
    def twin(self) -> tuple[Any, dict[int, int]]:
        """The same tokenizer with other names for its special tokens, and its ids of them -> ours."""
        from tokenizers import Tokenizer

        spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
        spec["truncation"] = spec["padding"] = None
        for token in spec["added_tokens"]:
            token["content"] = self._names.get(token["content"], token["content"])
        twin: Any = Tokenizer.from_str(json.dumps(spec))
        ids = {twin.token_to_id(name): self.tokenizer.convert_tokens_to_ids(text) for text, name in self._names.items()}
        return twin, ids

    @cached_property
    def _names(self) -> dict[str, str]:
        added = self.tokenizer.added_tokens_decoder
        return {token.content: f"{OPEN}{id}{CLOSE}" for id, token in added.items() if token.special}

    def _own(self, texts: Sequence[str], special: bool) -> Pairs:
        """(ids, offsets) of each text; with the tokenizer's own first token if `special`, never with its own last."""
        if not any(texts):
            return [([], [])] * len(texts)
        out = self.tokenizer(list(texts), add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        pairs = zip(out["input_ids"], out["offset_mapping"], strict=True)
        return [self._open_ended(*pair) for pair in pairs] if special else list(pairs)

    def _other(self, texts: Sequence[str], special: bool) -> Pairs:
        """The same by the twin."""
        twin, ours = self.twin
        made = [twin.encode(text, add_special_tokens=special) for text in texts]
        pairs = [([ours.get(i, i) for i in one.ids], one.offsets) for one in made]
        return [self._open_ended(*pair) for pair in pairs] if special else pairs

    def _open_ended(self, ids: list[int], offsets: Offsets) -> tuple[list[int], Offsets]:
        """Without an end that the tokenizer put there by itself: ours comes after the completion."""
        closed = bool(ids) and ids[-1] == self.tokenizer.eos_token_id and offsets[-1][0] == offsets[-1][1]
        return (ids[:-1], offsets[:-1]) if closed else (ids, offsets)

    @cached_property
    def _begins(self) -> bool:
        """Whether a text's first word gets other tokens than the same word later (by a space put before it)."""
        (alone, _), (later, _) = self._own(["ab", "\nab"], False)
        return later[-len(alone) :] != alone

    def _tails(self, texts: Sequence[str], tokens: Callable[[Sequence[str], bool], Pairs]) -> Pairs:
        """Completions, as what goes on and does not begin."""
        if not any(texts) or not self._begins:
            return tokens(texts, False)
        return [self._after_anchor(text, tokens) if text else ([], []) for text in texts]

    def _after_anchor(self, text: str, tokens: Callable[[Sequence[str], bool], Pairs]) -> tuple[list[int], Offsets]:
        for anchor in ANCHORS:
            ((ids, offsets),) = tokens([anchor + text], False)
            size = len(anchor)
            first = next((i for i, (start, end) in enumerate(offsets) if start == size < end), None)
            if first is not None and all(end <= size for _, end in offsets[:first]):
                return ids[first:], [(start - size, end - size) for start, end in offsets[first:]]
        raise DataError(
            f"this tokenizer cannot go on with {text[:20]!r} after a prompt", fix="write the rows as messages"
        )

    def _with_twin(self, r: Rendered) -> tuple[list[int], list[float]]:
        """A text that holds special-token text: the template's tokens go by their other names, the rest is plain."""
        pieces, at = [], 0
        for match in self.specials.finditer(r.text):
            pieces += [*r.text[at : match.start()], self._names[match[0]], *[""] * (len(match[0]) - 1)]
            at = match.end()
        pieces = ["" if letter == r.mark else letter for letter in [*pieces, *r.text[at:]]]
        place = list(accumulate(map(len, pieces), initial=0))  # of each letter of the marked text in the twin's
        text, cut = "".join(pieces), place[r.cut]
        (head,) = self._other([text[: cut or None]], r.special)
        (tail,) = self._tails([text[cut:] if cut else ""], self._other)
        return self._joined(r, head, tail, tuple((place[start], place[end]) for start, end in r.spans), cut)

    def _joined(
        self,
        r: Rendered,
        head: tuple[list[int], Offsets],
        tail: tuple[list[int], Offsets],
        spans: tuple[tuple[int, int], ...],
        cut: int,
    ) -> tuple[list[int], list[float]]:
        ids = [*head[0], *tail[0]]
        places = np.array([*head[1], *((a + cut, b + cut) for a, b in tail[1])], dtype=np.int64).reshape(-1, 2)
        first, last = places[:, 0], places[:, 1]
        weights, given = np.zeros(len(ids)), r.weights or (1.0,) * len(spans)
        for (start, end), weight in zip(spans, given, strict=True):
            weights[(start <= first) & (last <= end) & (first < last)] = weight
        close = [self.tokenizer.eos_token_id] if r.close and self.tokenizer.eos_token_id is not None else []
        return ids + close, weights.tolist() + [given[-1] if given else 1.0] * len(close)

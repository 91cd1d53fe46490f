"""How likely tokens were, in the shapes of chat and of completions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmkit.inference.detokenise import speller
from llmkit.inference.request import Token

LEAST = -9999.0
"""What stands for a probability of 0: JSON has no infinity."""


class Spelling:
    """Tokens as texts."""

    def __init__(self, tokenizer: Any) -> None:
        self.bytes = speller(tokenizer)

    def text(self, id: int) -> str:
        """One token alone; half a letter is shown as a mark in its place."""
        return self.bytes(id).decode("utf-8", "replace")

    def name(self, id: int) -> str:
        """The same where tokens are told apart by it: half a letter is its bytes, as OpenAI writes them."""
        try:
            return self.bytes(id).decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes(id))

    def chat(self, tokens: Iterable[Token]) -> list[dict[str, Any]]:
        """`logprobs.content` of a chat's choice."""
        made = []
        for token in tokens:
            top = [self._entry(id, value) for id, value in _ranked(token.top)]
            made.append(self._entry(token.id, token.logprob) | {"top_logprobs": top})
        return made

    def _entry(self, id: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self.text(id), "logprob": _finite(logprob), "bytes": list(self.bytes(id))}

    def completion(self, tokens: Sequence[Token | None], ids: Sequence[int], offset: int, most: int) -> dict[str, Any]:
        """`logprobs` of a completion's choice, whose first token's text begins at `offset`; `ids` are the tokens, of
        which the first of a prompt has no probability."""
        texts, offsets = [], []
        for id in ids:
            texts.append(self.name(id))
            offsets.append(offset)
            offset += len(self.text(id))
        tops = [None if token is None else self._top(token, most) for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [None if token is None else _finite(token.logprob) for token in tokens],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _top(self, token: Token, most: int) -> dict[str, float]:
        made: dict[str, float] = {}
        for id, value in (*_ranked(token.top)[:most], (token.id, token.logprob)):
            made.setdefault(self.name(id), _finite(value))
        return made


def _ranked(top: Mapping[int, float]) -> list[tuple[int, float]]:
    return sorted(top.items(), key=lambda item: (-item[1], item[0]))


def _finite(value: float | None) -> float:
    return LEAST if value is None or value < LEAST else value

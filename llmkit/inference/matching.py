"""A grammar at work: which tokens may come next, by llguidance."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from llmkit.inference.request import RequestError

SLOW = 0.25
"""Seconds of computing that one mask may take."""
LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=100_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)


def described(tokenizer: Any) -> str:
    """A tokenizer as text, as llguidance reads it.

    Raises:
        RequestError: it is not one of the `tokenizers` package.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        what = f"{type(tokenizer).__name__} does not say which bytes its tokens are"
        raise RequestError(what, fix="leave grammar out, or use a model with a tokenizer.json", key="grammar")
    return json.dumps(json.loads(backend.to_str()) | {"padding": None, "truncation": None})


def vocabulary(description: str, words: int, ends: Sequence[int]) -> Any:
    """llguidance's view of a tokenizer (half a second for 49,152 tokens)."""
    return LLTokenizer(description, n_vocab=words, eos_token=list(ends))


def begun(tokens: Any, source: str) -> Match:
    """A matcher before its first token.

    Raises:
        RequestError: the grammar is none, or a part of it would not be enforced.
    """
    inner = LLMatcher(tokens, source, limits=LIMITS, log_level=0)
    wrong = inner.get_error() if inner.is_error() else "; ".join(inner.get_grammar_warnings())
    if wrong:
        raise refused(wrong)
    return Match(inner)


def refused(why: str) -> RequestError:
    """Why a grammar is not taken."""
    said = why.removesuffix("<non-verbose/>").strip()
    return RequestError(f"cannot be enforced: {said}", fix="give a simpler grammar", key="grammar")


class Match:
    """The state of one text under a grammar."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def mask(self, words: int) -> NDArray[np.bool_]:
        """(V,): which tokens may come next; those that end a text where the grammar may end.

        Raises:
            RequestError: it takes too long, or leads nowhere.
        """
        began = time.thread_time()
        raw = np.frombuffer(self.inner.compute_bitmask(), np.uint8)
        if self.inner.is_error():
            raise refused(self.inner.get_error())
        if time.thread_time() - began > SLOW:
            raise refused(f"the next token takes more than {SLOW} s to find")
        bits = np.unpackbits(raw, count=min(words, 8 * len(raw)), bitorder="little").astype(np.bool_)
        return bits if len(bits) == words else np.concatenate([bits, np.zeros(words - len(bits), np.bool_)])

    def take(self, token: int) -> None:
        """This one came; one that may not come is told by the next `mask`."""
        self.inner.consume_token(token)

    def back(self, count: int) -> None:
        """The last `count` did not come."""
        self.inner.rollback(count)

    def fork(self) -> Match:
        """The same state once more."""
        return Match(self.inner.deep_copy())

"""How the next token is chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from llmkit.core.config import Conflict, config, setting
from llmkit.inference.grammar import Grammar

MOST = {"stop": (64, 4096), "bad_words": (1024, 1024)}
"""Of texts, and of the letters of one."""


@config
class Sampling:
    """How the next token is chosen."""

    temperature: float = setting(default=0.0, least=0.0)
    """0 is greedy."""
    top_k: int = setting(default=0, least=0)
    """Only the k likeliest tokens; 0 is all."""
    top_p: float = setting(default=1.0, above=0.0, most=1.0)
    """Only the likeliest tokens that hold this much of the mass."""
    min_p: float = setting(default=0.0, least=0.0, most=1.0)
    """Only tokens at least this likely, as a share of the likeliest."""
    max_tokens: int = setting(default=128, least=1)
    min_tokens: int = setting(default=0, least=0)
    """Nothing ends a text before it has so many, but the end of its grammar."""
    seed: int = setting(default=0, least=0)
    """A text depends on it, on its prompt and on which of `n` it is, and on nothing beside it."""
    n: int = setting(default=1, least=1)
    """Answers to each prompt."""
    beams: int = setting(default=1, least=1)
    """Texts that are followed side by side; of those that they come to the `n` likeliest are given, at the end."""
    length_penalty: float = 1.0
    """Of beams: the sum of log-probabilities is divided by the length to this power."""
    early_stopping: bool | Literal["never"] = False
    """Of beams: whether as many ended texts as there are beams are enough; else the search goes on while a better one
    is likely, or, with `never`, possible."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not part of it."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end an answer, beside the model's own."""
    ignore_eos: bool = False
    """Whether the model's own end is a token like any other; under a grammar: whether a text goes on as long as the
    grammar has room."""
    repetition_penalty: float = setting(default=1.0, least=0.01, most=100.0)
    """Divides the positive logits of tokens that were there, in the prompt or after it, and multiplies the negative
    ones (CTRL, arXiv:1909.05858)."""
    presence_penalty: float = setting(default=0.0, least=-2.0, most=2.0)
    """Taken from the logit of each token that was made already."""
    frequency_penalty: float = setting(default=0.0, least=-2.0, most=2.0)
    """The same, once for each time."""
    logit_bias: Mapping[int, float] = setting(default_factory=dict)
    """Token -> what is added to its logit."""
    allowed_ids: tuple[int, ...] = ()
    """If there are any, no other token is made."""
    bad_words: tuple[str, ...] = ()
    """Texts that are not made, as the tokens that they become, with and without a space before them."""
    drafts: int | None = setting(default=None, least=0)
    """Drafts of this answer that a step looks at, at most; 0 has none, and left out it is as the engine's `speculation`
    says. The text is the same."""
    logprobs: int | None = setting(default=None, least=0)
    """How many of the likeliest tokens to tell at each place, beside the one that was chosen; none tells nothing."""
    prompt_logprobs: int | None = setting(default=None, least=0)
    """The same for the prompt."""
    grammar: Grammar | None = None
    """What the text as a whole must look like; only `max_tokens` can end it before its grammar does."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts, and what is too much."""
        if self.min_tokens > self.max_tokens:
            yield Conflict("min_tokens", f"{self.min_tokens} is more than {self.max_tokens}", "lower it", "max_tokens")
        for key in ("stop", "stop_ids"):
            if self.grammar is not None and getattr(self, key):
                what = "the text would end before its grammar does"
                yield Conflict(key, what, "leave it out, or make it part of the grammar", "grammar")
        for key, (count, letters) in MOST.items():
            texts: tuple[str, ...] = getattr(self, key)
            if len(texts) > count:
                yield Conflict(key, f"{len(texts)} texts are more than {count}", "give fewer")
            if (longest := max(map(len, texts), default=0)) > letters:
                yield Conflict(key, f"{longest} letters are more than {letters}", "give shorter texts")
        if wrong := [value for value in self.logit_bias.values() if not abs(value) <= 1e6]:
            yield Conflict("logit_bias", f"{wrong[0]} is out of range", "give values from -1e6 to 1e6")

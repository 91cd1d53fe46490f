"""From the logits of one place to its token: a pure function of the logits, what was said, and the seed.

Randomness is one number for each (seed, answer, place), so that a text does not depend on what is made beside it, on
preemption, or on how many tokens are checked at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkit.core.seed import mixed
from llmkit.inference.request import Token
from llmkit.inference.sampling import Sampling

NEVER = float("-inf")


def pick(logits: Tensor, law: Tensor, sampling: Sampling, index: int, place: int) -> Token:
    """The token at `place` of answer `index`.

    `logits` (V,): the model's own. `law` (V,): after penalties, bias and what is allowed (`steer.py`); the same tensor
    where there are none.
    """
    if sampling.temperature == 0:
        chosen = int(law.argmax())
        return Token(chosen, told(logits, chosen, sampling), 0.0, tops(logits, sampling.logprobs))
    probs = torch.softmax(truncated(law / sampling.temperature, sampling), 0)
    chosen = drawn(probs, uniform(sampling.seed, index, place))
    own = float(probs[chosen].log())
    return Token(chosen, told(logits, chosen, sampling), own, tops(logits, sampling.logprobs))


def uniform(seed: int, index: int, place: int) -> float:
    """A number in [0, 1) of its own for each place of each answer."""
    return (mixed(seed, index, place) >> 10) / (1 << 53)


def drawn(probs: Tensor, at: float) -> int:
    """The token whose share of the mass holds `at`, in the order of the vocabulary."""
    mass = torch.cumsum(probs.double(), 0)
    chosen = int(torch.searchsorted(mass, torch.tensor([at * float(mass[-1])], dtype=mass.dtype), right=True))
    return min(chosen, len(probs) - 1) if probs[min(chosen, len(probs) - 1)] > 0 else int(probs.argmax())


def truncated(law: Tensor, sampling: Sampling) -> Tensor:
    """Only the likeliest tokens: `top_k`, then `top_p` of what is left, then `min_p` of what is left of that."""
    if 0 < sampling.top_k < len(law):
        law = law.masked_fill(law < law.topk(sampling.top_k).values[-1], NEVER)
    if sampling.top_p < 1:
        falling, order = torch.sort(law, descending=True, stable=True)
        before = torch.cumsum(torch.softmax(falling, 0), 0) - torch.softmax(falling, 0)
        law = law.index_fill(0, order[before >= sampling.top_p], NEVER)
    if sampling.min_p > 0:
        probs = torch.softmax(law, 0)
        law = law.masked_fill(probs < sampling.min_p * probs.max(), NEVER)
    return law


def told(logits: Tensor, chosen: int, sampling: Sampling) -> float | None:
    """The model's own log-probability of a token, where it was asked for."""
    return None if sampling.logprobs is None else float(logits[chosen] - logits.logsumexp(0))


def tops(logits: Tensor, count: int | None) -> dict[int, float]:
    """The `count` likeliest tokens by the model itself, with their log-probabilities."""
    if not count:
        return {}
    best = (logits - logits.logsumexp(0)).topk(min(count, len(logits)))
    return dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def scored(logits: Tensor, given: int, count: int | None) -> Token:
    """A token of the prompt."""
    logprob = float(logits[given] - logits.logsumexp(0))
    return Token(given, logprob, logprob, tops(logits, count))

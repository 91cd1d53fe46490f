"""From the logits of one place to its token: a pure function of the logits, what was said, and the seed.

Randomness is one number for each (seed, answer, place), so that a text does not depend on what is made beside it, on
preemption, or on how many tokens are checked at once. Rows are worked on one by one on the host: on a CPU that is
faster than torch's own operations on all of them, and a row's bits cannot depend on its neighbours. Draws of a step are
one call of the compiled row (`llmkit_kernels/draw`) where it is. What is on another device is copied once a step, but
for greedy rows, of which only the token comes over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmkit.core.seed import mixed
from llmkit.inference.request import RequestError, Token, alone
from llmkit.inference.sampling import Sampling
from llmkit.inference.shortlist import Row, draws, largest, total
from llmkit.inference.steer import Steer

Numbers = Callable[[int, int, int], float]
"""(seed, answer, place) -> a number in [0, 1)."""


@dataclass(frozen=True)
class Open:
    """A place of which one token is to be chosen."""

    logits: Row
    law: Row
    best: float
    """The largest of `law`."""
    steer: Steer
    token: Token | None = None
    """Where it is not drawn."""


def choose(
    rows: Sequence[Tensor], steers: Sequence[Steer], number: Numbers | None = None
) -> list[Token | RequestError]:
    """For each row of logits (V,) its next token, or why there is none: one request's fault is no other's. `number`
    gives what a place is drawn by, where it is not `uniform`."""
    if all(row.device.type == "cpu" for row in rows):
        return _on_host([row.numpy() for row in rows], steers, number)
    return _from_device(torch.stack(list(rows)), steers)


def _from_device(logits: Tensor, steers: Sequence[Steer]) -> list[Token | RequestError]:
    """The same for logits (R, V) that lie elsewhere: rows of which only the likeliest token is asked stay there."""
    simple = [at for at, steer in enumerate(steers) if steer.greedy]
    rest = [at for at, steer in enumerate(steers) if not steer.greedy]
    made: dict[int, Token | RequestError] = {}
    if simple:
        best = (logits[torch.tensor(simple, device=logits.device)] if rest else logits).max(-1)
        both = torch.stack([best.indices.double(), best.values.double()]).tolist()  # exact, and waited for once
        for at, token, value in zip(simple, *both, strict=True):
            made[at] = Token(int(token), None, 0.0) if np.isfinite(value) else no_token(value)
    if rest:
        host = logits[torch.tensor(rest, device=logits.device)].cpu().numpy()
        made |= dict(zip(rest, _on_host(list(host), [steers[at] for at in rest]), strict=True))
    return [made[at] for at in range(len(steers))]


def _on_host(rows: Sequence[Row], steers: Sequence[Steer], number: Numbers | None = None) -> list[Token | RequestError]:
    return [one if isinstance(one, RequestError) else one[0] for one in with_laws(rows, steers, number)]


def with_laws(
    rows: Sequence[Row], steers: Sequence[Steer], number: Numbers | None = None
) -> list[tuple[Token, Row] | RequestError]:
    """What `choose` gives for rows on the host, each token with the law (V,) of its place. Laws are made one by one,
    and draws together: the compiled row has them side by side on all threads."""
    made = [_tried(row, steer) for row, steer in zip(rows, steers, strict=True)]
    tokens = iter(_drawn([one for one in made if isinstance(one, Open)], number))
    return [(next(tokens), one.law) if isinstance(one, Open) else one for one in made]


def _tried(row: Row, steer: Steer) -> Open | RequestError:
    """What nobody foresaw is its request's too: the others of the step have nothing to do with it."""
    try:
        with alone("its next token cannot be chosen"):
            return _opened(row, steer)
    except RequestError as wrong:
        return wrong


def pick(logits: Row, steer: Steer) -> Token:
    """The next token of an answer.

    Raises:
        RequestError: the model gave no numbers, nothing may be made here, or a processor of the request failed.
    """
    return _drawn([_opened(logits, steer)])[0]


def _opened(logits: Row, steer: Steer) -> Open:
    """The law of a place, and its likeliest token where that is what is asked for."""
    law = steer.law(logits)
    best = int(law.argmax())
    if not np.isfinite(law[best]):
        raise no_token(float(law[best]))
    sampling = steer.rules.sampling
    token = _told(logits, best, 0.0, sampling.logprobs) if sampling.temperature == 0 else None
    return Open(logits, law, float(law[best]), steer, token)


def _drawn(places: Sequence[Open], number: Numbers | None = None) -> list[Token]:
    made = []
    found = iter(draws([_ask(one, number or uniform) for one in places if one.token is None]))
    for one in places:
        if one.token is not None:
            made.append(one.token)
            continue
        chosen, mass = next(found)
        sampling = one.steer.rules.sampling
        own = (float(one.law[chosen]) - one.best) / sampling.temperature - math.log(mass)
        made.append(_told(one.logits, chosen, own, sampling.logprobs))
    return made


def _ask(one: Open, number: Numbers) -> tuple[Row, Sampling, float]:
    sampling = one.steer.rules.sampling
    return one.law, sampling, number(sampling.seed, one.steer.index, len(one.steer.made))


def no_token(value: float) -> RequestError:
    """Why nothing can be chosen, by the largest value that there is."""
    if value == float("-inf"):
        return RequestError("no token may be made here", fix="allow more", key="allowed_ids")
    return RequestError(f"the logits hold {value}", fix="look for numbers that overflow in the model or a processor")


def uniform(seed: int, index: int, place: int) -> float:
    """A number in [0, 1) of its own for each place of each answer."""
    return (mixed(seed, index, place) >> 10) / (1 << 53)


def _told(logits: Row, chosen: int, own: float, count: int | None) -> Token:
    """A token with what was asked about it and about the `count` likeliest of its place: the model's own
    log-probabilities."""
    if count is None:
        return Token(chosen, None, own)
    whole = normaliser(logits)
    return Token(chosen, float(logits[chosen]) - whole, own, tops(logits, count, whole))


def tops(logits: Row, count: int, whole: float) -> dict[int, float]:
    """The `count` likeliest tokens, of equal ones the first; `whole` is the normaliser."""
    if not count:
        return {}
    at = largest(logits, min(count, len(logits)))
    best = at[np.argsort(-logits[at], kind="stable")][:count]
    return {int(token): float(logits[token]) - whole for token in best}


def normaliser(logits: Row) -> float:
    """log sum exp."""
    most = float(logits.max())
    if not np.isfinite(most):
        raise no_token(most)
    weights = logits - np.float32(most)
    return most + math.log(total(np.exp(weights, out=weights)))


def scored(logits: Tensor, given: int, count: int | None) -> Token:
    """A token of the prompt, by the logits (V,) before it.

    Raises:
        RequestError: the model gave no numbers.
    """
    row = logits.cpu().numpy()
    whole = normaliser(row)
    logprob = float(row[given]) - whole
    return Token(given, logprob, logprob, tops(row, count or 0, whole))

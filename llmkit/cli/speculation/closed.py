"""The exact law on a toy model, and how often drafts are kept there, beside their closed forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from llmkit.cli.acceptance.verdict import Check, at_most
from llmkit.inference.sampling import Sampling
from llmkit.inference.speculation.certificate import Ends, apart, law_of, leaves, likely, overlap
from llmkit.inference.speculation.toy import (
    LENGTH,
    PROMPT,
    WORDS,
    Case,
    Choose,
    Law,
    Numbers,
    Run,
    Toy,
    installed,
    made,
    plainly,
    shares,
    steered,
    target,
)

EXACT, ROUNDED = 1e-9, 1e-6
"""Bars: of a law in fp64, and of one whose weights are summed in fp32."""
DRAFTS = 2
SAMPLINGS: Mapping[str, Sampling] = {
    "greedy": Sampling(),
    "temperature": Sampling(temperature=1.0),
    "top_k, top_p": Sampling(temperature=1.3, top_k=4, top_p=0.9),
    "min_p, penalties": Sampling(temperature=0.8, min_p=0.05, repetition_penalty=1.3, presence_penalty=0.4),
    "bias, allowed": Sampling(temperature=1.0, logit_bias={2: 1.5}, allowed_ids=(0, 2, 3, 4)),
}
Asked = Callable[[Sequence[int]], NDArray[np.float64]]
"""A text -> the law (V,) of what is drafted after it."""


def by_model(toy: Toy, sampling: Sampling) -> Asked:
    """A model's."""

    def asked(text: Sequence[int]) -> NDArray[np.float64]:
        steer = steered(sampling)
        for token in text[len(PROMPT) :]:
            steer.take(token)
        return shares(toy, steer)

    return asked


def by_text(text: Sequence[int]) -> NDArray[np.float64]:
    """One token that the text itself says, for sure."""
    law = np.zeros(WORDS)
    law[text[len(text) // 2]] = 1.0
    return law


def drawn_by(asked: Asked, move: int = 0) -> Callable[[Sequence[int], Numbers], list[int]]:
    """Drafts by the numbers of their places, as a draft model draws them; `move`: taken for another word."""

    def drafts(text: Sequence[int], numbers: Numbers) -> list[int]:
        found = list(text)
        for number in numbers[:DRAFTS]:
            token = int(np.searchsorted(np.cumsum(asked(found)), number, side="right"))
            found.append((min(token, WORDS - 1) + move) % WORDS)
        return found[len(text) :]

    return drafts


def cases(toy: Toy, sampling: Sampling) -> Iterator[tuple[Case, Asked | None]]:
    """Who drafts for the toy, and by which law: nobody, the text, another model, the model itself, and one that is told
    what comes and says something else."""
    other, own = by_model(Toy(toy.seed + 1), sampling), by_model(toy, sampling)
    yield Case("nobody", sampling, lambda text, numbers: []), None
    for name, asked in {"the text": by_text, "another model": other, "itself": own}.items():
        yield Case(name, sampling, drawn_by(asked)), asked
    yield Case("wrong on purpose", sampling, drawn_by(own, 1)), None


def law(seed: int) -> Iterator[Check]:
    """Whether drafts change the law of texts, and whether it is the model's."""
    toy, beside, rounded, model, count = Toy(seed), 0.0, 0.0, 0.0, 0
    for sampling in SAMPLINGS.values():
        closed, none, ends = target(toy, sampling, LENGTH), dict[Choose, Law](), dict[Choose, Ends]()
        for case, _ in cases(toy, sampling):
            count += 1
            ours, plain = (
                law_of(partial(made, toy, case, choose=choose), LENGTH, ends.setdefault(choose, {}))
                for choose in (installed, plainly)
            )
            beside = max(beside, apart(ours, none.setdefault(installed, ours)))
            beside = max(beside, apart(plain, none.setdefault(plainly, plain)))
            rounded, model = max(rounded, apart(ours, closed)), max(model, apart(plain, closed))
    said = f"{count} cases: {len(SAMPLINGS)} ways of choosing, {count // len(SAMPLINGS)} that draft or do not"
    yield at_most("law with drafts - without", beside, EXACT, said)
    yield at_most("law with drafts - closed form", model, EXACT, "token by token in fp64, draws with sums in fp64")
    yield at_most("this build's sampler - closed form", rounded, ROUNDED, "the same where draws have sums in fp32")


def kept(seed: int) -> Iterator[Check]:
    """How often a draft is kept, exactly: as often as draws of both laws by one number agree."""
    toy, worst, ratios = Toy(seed), 0.0, list[float]()
    for case, asked in cases(toy, SAMPLINGS["temperature"]):
        if asked is None:
            continue
        found, (formed, most) = np.zeros(LENGTH - 1), expected(by_model(toy, case.sampling), asked)
        for share, run in leaves(partial(told, toy, case), LENGTH):
            found += share * np.array(run.kept[:-1] if run is not None else [0.0] * (LENGTH - 1))
        worst, ratios = max(worst, float(np.abs(found - formed).max())), [*ratios, *(found / most)]
    yield at_most("kept on the toy - closed form", worst, EXACT, f"{len(ratios)} places: the overlap of both laws")
    yield at_most("kept / sum min(p, q), the most", max(ratios), 1 + EXACT, f"the least {min(ratios):.3f}")


def told(toy: Toy, case: Case, numbers: Numbers) -> Run:
    """What is made, told apart by what was kept too."""
    run = made(toy, case, numbers, plainly)
    return run._replace(decided=tuple(zip(run.text, run.kept, strict=True)))


def expected(own: Asked, asked: Asked) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each place but the last: how often a draft is kept, and sum min(p, q)."""
    formed, most = np.zeros(LENGTH - 1), np.zeros(LENGTH - 1)
    before: dict[tuple[int, ...], float] = {(): 1.0}
    for place in range(LENGTH - 1):
        laws = {text: (own([*PROMPT, *text]), asked([*PROMPT, *text])) for text in before}
        formed[place] = sum(share * overlap(*laws[text]) for text, share in before.items())
        most[place] = sum(share * likely(*laws[text]) for text, share in before.items())
        before = {
            (*text, word): share * float(laws[text][0][word]) for text, share in before.items() for word in range(WORDS)
        }
    return formed, most

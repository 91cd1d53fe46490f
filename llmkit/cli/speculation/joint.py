"""The law of several tokens together, as the engine makes them with drafts, beside that of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from llmkit.cli.speculation.drafters import Make
from llmkit.cli.speculation.laws import joint
from llmkit.cli.speculation.trial import Made, Schedule, Trial
from llmkit.inference.request import Request
from llmkit.inference.sampling import Sampling

WORDS, LENGTH, PROMPT = 5, 4, (1, 4, 2, 1, 4)
"""A prompt whose end was there before, so that looking back drafts something."""
AT_ONCE, SMALLEST = 80, 5.0
"""Answers of one request, side by side, as many as a drafter reads at once; and the least number that a cell is to
expect, else others join it."""


def drawn(trial: Trial, make: Make, sampling: Sampling, draws: int, seed: int, length: int = LENGTH) -> Made:
    """What an engine makes of `draws` answers to one prompt, each drawn by numbers of its own."""
    more = {"max_tokens": length, "n": AT_ONCE, "ignore_eos": True}
    asked = [
        Request(str(at), PROMPT, Sampling(**{**vars(sampling), **more, "seed": seed + at}))
        for at in range(-(-draws // AT_ONCE))
    ]
    schedule = Schedule(seed, blocks=8 * AT_ONCE, tokens=8 * AT_ONCE, sequences=AT_ONCE, drafts=3)
    return trial.run(asked, schedule, make(trial, Made(), schedule))


def chance(law: Mapping[tuple[int, ...], float], counted: Mapping[tuple[int, ...], int]) -> float:
    """How likely counts are at least as far from the law as these, by the G-test; 0 where what cannot be was made."""
    from scipy.stats import power_divergence

    if any(law.get(text, 0.0) <= 0 for text in counted):
        return 0.0
    draws, bins = sum(counted.values()), [[0.0, 0.0]]
    for text, share in sorted(law.items(), key=lambda one: -one[1]):  # rare ones share a cell
        if bins[-1][1] >= SMALLEST:
            bins.append([0.0, 0.0])
        bins[-1][0], bins[-1][1] = bins[-1][0] + counted.get(text, 0), bins[-1][1] + share * draws
    if len(bins) > 1 and bins[-1][1] < SMALLEST:
        seen, expected = bins.pop()
        bins[-1][0], bins[-1][1] = bins[-1][0] + seen, bins[-1][1] + expected
    seen_, expected_ = zip(*bins, strict=True)
    return float(power_divergence(seen_, expected_, lambda_="log-likelihood").pvalue) if len(bins) > 1 else 1.0


def counts(made: Made) -> Counter[tuple[int, ...]]:
    """How often each text came."""
    return Counter(tuple(made.tokens(key)) for key in made.events)


def law(trial: Trial, sampling: Sampling, length: int = LENGTH) -> dict[tuple[int, ...], float]:
    """That of the model."""
    return joint(trial.decoder, trial.words, PROMPT, length, sampling)

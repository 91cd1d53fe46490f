"""The weighted sum of several rewards: scores of every answer, or an error that names the answer that has none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmkit.core.errors import DataError, LlmkitError, Problem
from llmkit.rl.bench import Bench
from llmkit.rl.rewards_node import Reward, names
from llmkit.rl.sample import UNREACHED, Fault, Sample, Score

TOLD = 5
"""Reasons for no score that are told in one go."""
MOST = 1e15
"""The largest score: squares of larger ones overflow in fp32."""


@dataclass(frozen=True)
class Scores:
    """What N answers are worth."""

    total: tuple[float, ...]
    """(N,): the weighted sums."""
    each: Mapping[str, tuple[float, ...]]
    """(N,) each, by the reward's name, before its weight."""
    failed: Mapping[str, int]
    """How many answers got what `failed` says, by the reward's name; those of which none did are left out."""
    told: Mapping[str, float] = field(default_factory=dict)
    """Other figures, such as a judge's agreement with itself: `NAME.agreement`."""

    def beside(self) -> dict[str, float]:
        """Figures that are of no single answer: shares that failed, and what rewards tell of themselves, by
        NAME.FIGURE."""
        n = max(1, len(self.total))
        return dict(self.told) | {f"{name}.failed": count / n for name, count in self.failed.items()}

    def figures(self) -> dict[str, float]:
        """For a log: `reward`, the mean of the sums, `reward.NAME`, that of each, and what is beside them."""
        n = max(1, len(self.total))
        told = {name: sum(scores) / n for name, scores in self.each.items()} | self.beside()
        return {"reward": sum(self.total) / n} | {f"reward.{name}": value for name, value in told.items()}


def score(rewards: Sequence[Reward], samples: Sequence[Sample], bench: Bench, key: str = "reward") -> Scores:
    """The scores of all samples by all rewards. With no samples it opens what rewards need, so that what is missing is
    told before anything is made.

    Raises:
        DataError: a sample has no score, or one that is no finite number; it is named with its row.
        RecipeError, ResourceError, ModelError: a reward cannot be opened.
    """
    each: dict[str, tuple[float, ...]] = {}
    failed: dict[str, int] = {}
    told: dict[str, float] = {}
    for at, (name, reward) in enumerate(zip(names(rewards), rewards, strict=True)):
        place = f"{key}.{at}" if len(rewards) > 1 else key
        try:
            with bench.turn:
                bench.told = {}
                found, beside = reward.score(samples, bench), bench.told
        except LlmkitError as error:
            error.below(place, "reward")
            raise
        each[name] = _whole(found, samples, getattr(reward, "failed", None), f"{place} ({name})", failed, name)
        told |= {f"{name}.{figure}": value for figure, value in beside.items()}
    weights = [reward.weight for reward in rewards]
    columns = zip(*each.values(), strict=True)
    total = tuple(math.fsum(w * s for w, s in zip(weights, row, strict=True)) for row in columns)
    return Scores(total, each, failed, told)


def _whole(
    found: Sequence[Score],
    samples: Sequence[Sample],
    instead: float | None,
    place: str,
    failed: dict[str, int],
    name: str,
) -> tuple[float, ...]:
    """The scores with `instead` in the place of faults."""
    made: list[float] = []
    wrong: dict[Fault, list[int]] = {}
    for index, one in enumerate(found):
        if one is UNREACHED:
            continue
        if isinstance(one, Fault) and instead is not None and not one.certain:
            failed[name] = failed.get(name, 0) + 1
            made.append(instead)
        elif isinstance(one, Fault):
            wrong.setdefault(one, []).append(index)
        elif not math.isfinite(one):
            fault = Fault(f"has the score {one}", "let the reward give finite numbers")
            wrong.setdefault(fault, []).append(index)
        elif abs(one) > MOST:
            fault = Fault(f"has the score {one:g}, of which no loss can be told", f"give scores up to {MOST:g}")
            wrong.setdefault(fault, []).append(index)
        else:
            made.append(one)
    if wrong:
        told = list(wrong.items())[:TOLD]
        raise DataError(problems=[_problem(fault, of, samples[of[0]], place) for fault, of in told])
    return tuple(made)


def _problem(fault: Fault, of: Sequence[int], sample: Sample, place: str) -> Problem:
    """A fault, told of the first of the answers that have it."""
    others = f" and {len(of) - 1} more" if len(of) > 1 else ""
    what = f"answer {of[0]} (to {sample.begins}){others}: {fault.why}"
    return Problem(what, fault.fix, sample.file, sample.line, key=place)

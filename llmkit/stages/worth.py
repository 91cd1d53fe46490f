"""Answers that were judged: as lines of a file, as examples of which nothing is learned yet, and their figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmkit.data.asked import Asked
from llmkit.data.rolled import Rolled, figures, rolled, spread_out
from llmkit.inference.detokenise import Detokeniser
from llmkit.rl.learned import Learned
from llmkit.rl.rollout import Answer

Known = Mapping[str, list[list[float]] | None]
"""What models say of the tokens of all answers, by its name; None of what nobody asked for."""


@dataclass(frozen=True)
class Worth:
    """A group of answers, judged."""

    prompt: int
    answers: list[Answer]
    total: list[float]
    each: dict[str, list[float]]
    """By reward."""


def bare(asked: Asked, held: Sequence[Worth], drop: bool, count: Callable[[int, float], float]) -> Rolled:
    """The answers as examples, before it is known what they teach. `drop`: those that were cut short teach nothing.
    `count`: of so many completions with so many tokens, what they add to the count that a step is divided by."""
    ids = [[answer.ids for answer in worth.answers] for worth in held]
    weights = [
        [answer.weights(0.0 if drop and not answer.ended else 1.0) for answer in worth.answers] for worth in held
    ]
    tokens = [sum(map(sum, own)) for own in weights]
    heads = [worth.answers[0].prompt_ids for worth in held]
    shares = [count(len(group), n) for group, n in zip(ids, tokens, strict=True)]
    if not sum(shares):  # of a step of which nothing is learned
        shares[0] = 1.0
    prompts = [worth.prompt for worth in held]
    return rolled(asked, prompts, ids, weights, shares, heads if all(heads) else ())


def figured(held: Sequence[Worth], calls: bool) -> dict[str, list[float]]:
    """What is told of all answers, (K,) each; `calls`: of calls of tools too."""
    answers = [answer for worth in held for answer in worth.answers]
    made = {"reward": [x for worth in held for x in worth.total], "length": [float(len(a.ids)) for a in answers]}
    if calls:
        made["calls"] = [float(sum(one["role"] == "tool" for one in answer.turns)) for answer in answers]
    made["unended"] = [float(not answer.ended) for answer in answers]
    for name in held[0].each:
        made[f"reward.{name}"] = [x for worth in held for x in worth.each[name]]
    return made


def weights_of(made: Rolled) -> list[list[float]]:
    """Of each answer the weights of its tokens."""
    return [made.weights[a:b].tolist() for i in range(len(made)) for a, b in made.completions(i)]


def lessons(made: Rolled, held: Sequence[Worth], lesson: Learned, known: Known, calls: bool) -> Rolled:
    """The answers as examples with what they teach, with what models say of their tokens (`known`, and the engine that
    drew them) and with their figures; `calls`: with those of tools."""
    engine = [[np.nan if x is None else x for x in answer.logps] for worth in held for answer in worth.answers]
    each = {**lesson.each, "engine": engine, **{name: own for name, own in known.items() if own is not None}}
    per = {**lesson.per, **figured(held, calls)}
    return replace(made, per=figures(per), each={name: spread_out(made, own) for name, own in each.items()})


def told(
    number: int,
    version: int | None,
    asked: Asked,
    held: Sequence[Worth],
    made: Rolled,
    known: Known,
    words: Callable[[], Detokeniser],
) -> Iterator[dict[str, Any]]:
    """A line for each answer of rollout `number`; `version`: of the weights that drew it. The first of a group has what
    was asked, and where tokens have advantages of their own, the text of each stands beside (`words`)."""
    at = 0
    for group, worth in enumerate(held):
        file, line = asked.places[worth.prompt]
        for i, answer in enumerate(worth.answers):
            alone = "advantage" not in made.each
            question = {} if i else {"question": asked.rows[worth.prompt].question}
            pieces = {} if alone else {"pieces": spelt(answer.ids, words())}
            yield {
                "rollout": number,
                "version": version,
                "group": group,
                "prompt": worth.prompt,
                "row": f"{file}:{line}",
                **answer.told(),
                "reward": worth.total[i],
                "rewards": {name: x[i] for name, x in worth.each.items()},
                "advantage": _advantage(made, at, len(answer.ids)),
                **({"return": _own(made, "return", at, len(answer.ids))} if "return" in made.each else {}),
                **question,
                **pieces,
                **{name: None if column is None else column[at] for name, column in known.items()},
            }
            at += 1


def _advantage(made: Rolled, at: int, tokens: int) -> float | list[float] | None:
    """Of an answer, or where they have their own, of each of its tokens."""
    if "advantage" in made.each:
        return _own(made, "advantage", at, tokens)
    return float(made.per["advantage"][at]) if "advantage" in made.per else None


def _own(made: Rolled, name: str, at: int, tokens: int) -> list[float]:
    begin = int(made.forks[at])
    own: list[float] = made.each[name][begin : begin + tokens].tolist()
    return own


def spelt(ids: Sequence[int], words: Detokeniser) -> list[str]:
    """The text of each token; of a letter that several make, with the last of them."""
    made = [words.add(id) for id in ids]
    return [*made[:-1], made[-1] + words.rest()] if made else []


def read(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> tuple[list[Worth], Known]:
    """The answers of a rollout from its lines, and what is known of them by these names."""
    held = [_worth([line for line in lines if line["group"] == at]) for at in range(lines[-1]["group"] + 1)]
    columns = {name: [line[name] for line in lines] for name in names}
    return held, {name: None if None in column else column for name, column in columns.items()}


def _worth(lines: Sequence[Mapping[str, Any]]) -> Worth:
    each = {name: [line["rewards"][name] for line in lines] for name in lines[0]["rewards"]}
    return Worth(lines[0]["prompt"], [Answer.of(line) for line in lines], [line["reward"] for line in lines], each)

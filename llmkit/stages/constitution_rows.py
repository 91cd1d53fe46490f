"""What the steps of constitutional AI come to: supervised rows and preferences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.rl import constitution as words
from llmkit.rl.sample import Messages
from llmkit.stages.constitutional import Constitutional

Line = dict[str, Any]
Rounds = Sequence[tuple[Sequence[Line], Sequence[Line]]]
"""Of each round what was said of the answers, and what came of them."""


@dataclass
class Found:
    """What the steps made, line by line: a line of each prompt."""

    asked: Sequence[str | Messages]
    harmless: Sequence[str | Messages]
    sampled: Sequence[Line] = ()
    rounds: Rounds = ()
    judged: Sequence[Line] = ()
    calm: Sequence[Line] = ()
    calmed: Rounds = ()


def last(sampled: Sequence[Line], rounds: Rounds) -> list[str]:
    """The answers as they are after all rounds."""
    answers = [str(line["answers"][0]) for line in sampled]
    for _, new in rounds:
        answers = [line["answer"] or before for line, before in zip(new, answers, strict=True)]
    return answers


def supervised(found: Found, digests: Mapping[str, str], counts: Counter[str]) -> list[Line]:
    """A row of each prompt of which the critic said clearly, at least once, whether its answer may stay."""
    made = list[Line]()
    for row, asked in enumerate(found.asked):
        said, first = [one[row] for one, _ in found.rounds], found.sampled[row]["answers"][0]
        new = [line[row]["answer"] for _, line in found.rounds if line[row]["answer"]]
        answer = new[-1] if new else first
        if all(line["objects"] is None for line in said) or not answer.strip():
            counts["supervised: no verdict" if answer.strip() else "supervised: no answer"] += 1
            continue
        counts["supervised: revised" if answer != first else "supervised: unchanged"] += 1
        principles = [line["principle"] for line in said]
        more = {"principles": principles, "changed": answer != first, "rounds": len(new), "digests": dict(digests)}
        if isinstance(asked, str):
            made.append({"prompt": asked, "completion": answer, **more})
        else:
            made.append({"messages": [*asked, {"role": "assistant", "content": answer}], **more})
    return made


def preferred(node: Constitutional, found: Found, digests: Mapping[str, str], counts: Counter[str]) -> list[Line]:
    """A row of each pair of which one is better."""
    made = list[Line]()
    for row, asked in enumerate(found.asked):
        line, sides = found.judged[row], found.sampled[row]["answers"]
        told = words.soft([(one, other) for one, other in line["votes"]], node.clip)
        if told is None or (why := _unfit(sides, told, node.disagreeing)):
            counts[f"preferences: {'no verdict' if told is None else why}"] += 1
            continue
        first, agree = told
        counts["preferences: kept" if agree else "preferences: orders disagree, weighed"] += 1
        chosen, rejected = sides if first > 0.5 else sides[::-1]
        if not isinstance(asked, str):
            chosen, rejected = ([{"role": "assistant", "content": side}] for side in (chosen, rejected))
        more: Line = {"probability": max(first, 1 - first), "weight": 1.0 if agree else abs(2 * first - 1)}
        more |= {"agree": agree, "votes": line["votes"], "principle": line["principle"], "digests": dict(digests)}
        prompt = asked if isinstance(asked, str) else list(asked)
        made.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, **more})
    return made


def _unfit(sides: Sequence[str], told: tuple[float, bool], disagreeing: str) -> str:
    """Why a pair makes no row, or nothing."""
    first, agree = told
    if not all(side.strip() for side in sides):
        return "no answer"
    if not agree and (disagreeing == "drop" or first == 0.5):
        return "orders disagree"
    return "tie" if first == 0.5 else ""

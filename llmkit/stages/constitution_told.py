"""What a run of `kind: constitutional` tells: how much was changed, how good the judge is, and refusals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from llmkit.core.metrics import Lines
from llmkit.core.run import Run
from llmkit.core.types import Report
from llmkit.rl import agreement
from llmkit.rl.constitution import refuses
from llmkit.rl.judge import Verdict
from llmkit.rl.worded import request
from llmkit.stages.constitution_rows import Found, last
from llmkit.stages.report import write_reports
from llmkit.stats.bootstrap import ratio

EXAMPLES = 8
"""Answers that were changed and are shown."""


def tell(run: Run, found: Found, counts: Counter[str], seed: int) -> dict[str, Any]:
    """Leaves figures with their intervals and some examples; gives what the manifest has of them."""
    for name, count in sorted(counts.items()):
        run.console.notice(f"{name} {count}")
    reports = [*_objections(found, seed), *_refusals(found, seed)]
    facts: dict[str, Any] = {}
    if verdicts := list(_verdicts(found)):
        facts = {"judge": _judge(run, verdicts)}
        same = [agreement.agreement([verdict]) for verdict in verdicts]  # what is no verdict agrees with nothing
        reports.append(ratio("judge.agreement", same, seed=seed))
    write_reports(run, reports)
    _examples(run, found)
    return facts


def _objections(found: Found, seed: int) -> Iterator[Report]:
    """In each round the share of answers that the critic objects to, of those of which it says so; by principle too."""
    said = [line for one, _ in found.rounds for line in one if line["objects"] is not None]
    for turn, (one, _) in enumerate(found.rounds, 1):
        clear = [float(line["objects"]) for line in one if line["objects"] is not None]
        if clear:
            yield ratio("objections", clear, seed=seed, slice=f"round {turn}")
    for name in dict.fromkeys(line["principle"] for line in said):
        yield ratio("objections", [float(x["objects"]) for x in said if x["principle"] == name], seed=seed, slice=name)


def _refusals(found: Found, seed: int) -> Iterator[Report]:
    """The share of harmless prompts that were refused, before and after."""
    if found.calm:
        before = [float(refuses(line["answers"][0])) for line in found.calm]
        after = [float(refuses(answer)) for answer in last(found.calm, found.calmed)]
        yield ratio("over_refusal", before, seed=seed, slice="before")
        yield ratio("over_refusal", after, seed=seed, slice="after")


def _verdicts(found: Found) -> Iterator[Verdict]:
    for line in found.judged:
        one, *others = (len(answer) for answer in found.sampled[line["row"]]["answers"])
        for first, second in line["votes"]:
            yield Verdict(0, 1, first, second, one - sum(others), line["row"])


def _judge(run: Run, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Whether the judge says the same in both orders, and what else it goes by."""
    place, longer = agreement.place(verdicts), agreement.longer(verdicts)
    made = {
        "agreement": agreement.agreement(verdicts),
        "unclear": agreement.unclear(verdicts),
        "first": place.share,
        "biased": place.biased,
        "longer": longer.share,
    }
    if place.biased:
        where = "first" if place.share > 0.5 else "second"
        what = (
            f"of {place.of} verdicts that changed with the order {max(place.share, 1 - place.share):.0%} were for the"
        )
        run.console.notice(f"the judge goes by the place: {what} {where} answer")
    return made


def _examples(run: Run, found: Found) -> None:
    """Answers that were changed, before and after, for the page."""
    path = run.folder / "samples.jsonl"
    path.unlink(missing_ok=True)
    lines, after = Lines(path), last(found.sampled, found.rounds)
    before = [line["answers"][0] for line in found.sampled]
    changed = [row for row, text in enumerate(after) if text != before[row]][:EXAMPLES]
    for step, texts in enumerate((before, after)):
        for row in changed:
            principles = ", ".join(one[row]["principle"] for one, _ in found.rounds if one[row]["objects"])
            lines.add({"step": step, "prompt": request(found.asked[row]), "expected": principles, "answer": texts[row]})

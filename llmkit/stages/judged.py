"""What the likeliest answers to validation prompts are worth."""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.data.asked import Asked
from llmkit.data.prepare import Prepared
from llmkit.evals.run import Subject, at_rest
from llmkit.inference.generate import ends
from llmkit.inference.request import Ask, Prompt
from llmkit.inference.sampling import Sampling
from llmkit.rl.rollout import answers, samples
from llmkit.rl.scoring import score
from llmkit.stages.from_rollouts import FromRollouts


def judged(node: FromRollouts, subject: Subject, valid: Prepared, ids: Sequence[int]) -> dict[str, float]:
    """`valid.reward`, each reward's own mean, and the mean length of the answers."""
    if not isinstance(valid, Asked):
        raise TypeError("rewards are of answers to prompts")
    share, longest = subject.share, node.data.max_length
    mine = list(ids[share.index :: share.count])
    asks, ended = [], tuple(ends(subject.model, subject.tokenizer))
    for index in mine:
        prompt = tuple(valid.example(index)[0].tolist())
        most = min(node.rollout.max_tokens, longest - len(prompt))
        how = Sampling(max_tokens=most, stop=node.rollout.stop, stop_ids=ended)
        asks.append(Ask(Prompt(prompt), how))
    with at_rest(subject), subject.autocast(), subject.writer() as writer:
        made = subject.scored.inside(lambda: [one.sound() for one in writer.each(asks)])
    drawn = [answers(one) for one in made]
    found = score(node.reward, samples(valid, mine, drawn), subject.bench)
    rows = [[total, *each] for total, *each in zip(found.total, *found.each.values(), strict=True)]
    rows = [[*row, float(len(own[0].ids))] for row, own in zip(rows, drawn, strict=True)]
    rows = [row for part in share.gather(rows) for row in part]
    names = ["reward", *(f"reward.{name}" for name in found.each), "length"]
    return {
        f"valid.{name}": sum(column) / len(rows) for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }

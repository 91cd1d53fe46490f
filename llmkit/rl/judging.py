"""The reward `judge` at work: its questions, its verdicts, and what they say of the judge itself."""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.core.errors import DataError
from llmkit.inference.request import Completion, asked_by
from llmkit.rl import agreement
from llmkit.rl.bench import Bench
from llmkit.rl.judge import compared, graded, rivals, standing
from llmkit.rl.rewards_node import Judge
from llmkit.rl.sample import Messages, Sample, Score
from llmkit.rl.speaker import Speaker, speaker


def judged(node: Judge, samples: Sequence[Sample], bench: Bench) -> list[Score]:
    """A score for each; figures of the judge go to the bench.

    Raises:
        ModelError, ResourceError: the judge cannot be asked.
        DataError: a row lacks the column that answers are held against.
    """
    mouth = bench.kept(f"judge {node.generator} {node.model}", lambda: _opened(node, bench))
    if not samples:
        return []

    def say(asked: Sequence[Messages]) -> list[Completion]:
        with asked_by("sampling", {"prompt": "model"}):
            return mouth.ask(asked, node.sampling)

    if node.how == "scale":
        return graded(samples, say, node.rubric, node.scale)
    pairs = (
        [_against(node, at, one) for at, one in enumerate(samples)]
        if node.against
        else list(rivals(samples, node.rivals))
    )
    verdicts = compared(samples, pairs, say, node.rubric)
    bench.told = {"agreement": agreement.agreement(verdicts), "unclear": agreement.unclear(verdicts)}
    bench.told |= {"first": agreement.place(verdicts).share, "longer": agreement.longer(verdicts).share}
    return standing(len(samples), verdicts, node.failed is not None)


def _opened(node: Judge, bench: Bench) -> Speaker:
    return speaker(node.generator, node.model, bench)


def _against(node: Judge, at: int, sample: Sample) -> tuple[int, int, str]:
    text = sample.row.get(node.against)
    if not isinstance(text, str):
        what = f"answer {at} (to {sample.begins}): its row has no text in column {node.against}"
        raise DataError(what, fix="give rows with it, or leave `against` out", file=sample.file, line=sample.line)
    return at, -1, text

"""Beams over shared blocks: a text with several continuations is forked, one that has none is given up."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from llmkit.inference.beam import Beam, Beams, Branch
from llmkit.inference.scheduler import Scheduler
from llmkit.inference.sequence import Sequence


def branch(scheduler: Scheduler, beams: Beams, turn: Seq[Branch]) -> set[Sequence]:
    """The search's next open texts, of which each has its token; the sequences that they are."""
    children: dict[Beam, list[Branch]] = {}
    for one in turn:
        children.setdefault(one[1], []).append(one)
    scheduler.remove([beam.sequence for beam in beams.open.values() if beam not in children])
    beams.open = {}
    for parent, branches in children.items():
        first = parent.sequence
        scheduler.rest(first, False)
        sequences = [first, *scheduler.fork(first, [first.index] * (len(branches) - 1))]
        for sequence, (score, _, token) in zip(sequences, branches, strict=True):
            sequence.tokens.append(token.id)
            steer = parent.steer.fork(0)
            steer.take(token.id)
            beams.open[sequence] = Beam(sequence, steer, score, (*parent.path, token))
    return set(beams.open)

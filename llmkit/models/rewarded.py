"""Reward models are classifiers of transformers: one number for a whole answer, or two classes at the end of a step."""

from __future__ import annotations

from llmkit.models.node import Head

OUTCOME = ("reward",)
"""The one output of a head that scores answers."""


def scores_answers(head: Head | None) -> bool:
    """Whether a head has one number for a whole row, whatever that is called."""
    return head is not None and head.task == "sequence" and len(head.labels) == 1


def judges_steps(head: Head | None) -> bool:
    """Whether a head tells two classes apart at places of a row."""
    return head is not None and head.task == "token" and len(head.labels) == 2


def kind_of(head: Head | None) -> str:
    """What a model with such a head is called, which scores no answers."""
    return "a language model" if head is None else f"a {head.task} classifier of {len(head.labels)} classes"


def continues(head: Head, there: Head) -> bool:
    """Whether training a head may begin with the one that is there: it tells apart the same; one number is a reward by
    any name."""
    return there.task == head.task and (there.labels == head.labels or (scores_answers(head) and scores_answers(there)))

"""Completions behind prompts that they do not answer: from them KTO tells how far a policy is from its reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llmkit.data.groups import Groups


def mismatched(groups: Groups, ids: Sequence[int], most: int) -> Groups:
    """Of the examples of a step, in its order, each prompt with the completions of the example before it, the first one
    with those of the last; what is longer than `most` tokens is cut.

    It follows from the step alone, not from ranks or micro-batches. Completions keep no figures.

    Raises:
        ValueError: there is one example, whose only completions are those that answer it.
    """
    if len(ids) < 2:
        raise ValueError("a step of one example has no other whose completions its prompt could have")
    ids_T, weights_T = np.asarray(groups.ids), np.asarray(groups.weights)
    tokens, weights, sizes, counts = [], [], list[int](), list[int]()
    for index, other in zip(ids, [ids[-1], *ids[:-1]], strict=True):
        first, border = int(groups.starts[index]), groups.completions(index)[0][0]
        spans = [(begin, min(end, begin + most - (border - first))) for begin, end in groups.completions(other)]
        tokens += [ids_T[first:border], *(ids_T[begin:end] for begin, end in spans)]
        weights += [weights_T[first:border] * 0, *(weights_T[begin:end] for begin, end in spans)]
        sizes += [border - first, *(end - begin for begin, end in spans)]
        counts.append(len(spans))
    edges, heads = np.cumsum([0, *sizes]), np.cumsum([0, *(count + 1 for count in counts)])
    return replace(
        groups,
        ids=np.concatenate(tokens),
        weights=np.concatenate(weights),
        starts=edges[heads],
        forks=np.delete(edges, heads),
        firsts=np.cumsum([0, *counts]),
        rows=(),
        places=(),
        begins=(),
        per={},
        each={},
    )

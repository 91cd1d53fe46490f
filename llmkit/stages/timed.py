"""How long a step of a stage takes on devices whose data sheet is known."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from llmkit.core.shape import Shape
from llmkit.plan.account import Choice, Held
from llmkit.plan.beside import Round
from llmkit.plan.devices import Device
from llmkit.plan.drawing import decoding, passed
from llmkit.plan.shares import shares
from llmkit.plan.times import Times, Work, times
from llmkit.stages.companions import shape_of
from llmkit.stages.holding import held_by
from llmkit.stages.training import Training


def step_times(node: Training, shape: Shape, device: Device, ranks: int, choice: Choice, turns: int) -> Times:
    """What a step of a stage takes on each of `ranks` devices, in `turns` micro-batches at most."""
    held = replace(held_by(node, shape, "cuda", ranks, device.memory), recompute=choice.recompute)
    degrees, length = node.parallel.degrees(ranks), node.data.max_length
    tokens = ceil(node.batch.examples / degrees.data) * node.example_tokens  # of a rank, which packs them
    turns = min(turns, ceil(tokens / (choice.rows * node.row_tokens)))
    work = Work(choice.rows * node.row_tokens, length, turns, node.forwards_beside)
    if node.example_tokens < node.row_tokens:
        work = replace(work, tokens=tokens // turns)
    spent = times(shape, held, shares(node.parallel.resolve(ranks), degrees), degrees, device, work)
    draws = node.draws(ranks)
    return spent if draws is None else _drawn(node, shape, held, device, ranks, draws, spent)


def _drawn(node: Training, shape: Shape, held: Held, device: Device, ranks: int, draws: Round, spent: Times) -> Times:
    """The step with what comes before it; answers that several steps learn from count in each with their share."""
    length = draws.prompt + draws.answer
    made = ceil(node.batch.examples / node.parallel.degrees(ranks).data) * node.example_tokens
    scoring = draws.passes * passed(shape, held, device, made, length)
    for one in node.beside(ranks):
        tokens = draws.answers(1) * length if one.alone else made
        scoring += one.passes * passed(shape_of(one, node, shape)[0], held, device, tokens, length)
    rollout = decoding(shape, held, device, draws, ranks).seconds
    return spent.after(rollout / draws.reuse, scoring / draws.reuse, draws.answers(1))

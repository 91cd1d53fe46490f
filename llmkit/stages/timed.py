"""How long a step of a stage takes on devices whose data sheet is known."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from llmkit.core.shape import Shape
from llmkit.plan.account import Held
from llmkit.plan.beside import Round
from llmkit.plan.choice import Choice
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
    tokens = ceil(node.step_examples / degrees.data) * node.example_tokens  # of a rank, which packs them
    turns = min(turns, ceil(tokens / (choice.rows * node.row_tokens)))
    work = Work(choice.rows * node.row_tokens, length, turns, node.forwards_beside)
    if node.example_tokens < node.row_tokens:
        work = replace(work, tokens=tokens // turns)
    cut = shares(node.parallel.resolve(ranks), degrees)
    spent = times(shape, held, cut, degrees, device, work)
    for trunk in held.trunks:
        spent = spent.beside(times(_headless(trunk.shape), trunk.beside(held), cut, degrees, device, work))
    draws = node.draws(ranks)
    return spent if draws is None else _drawn(node, shape, held, device, ranks, draws, spent)


def _drawn(node: Training, shape: Shape, held: Held, device: Device, ranks: int, draws: Round, spent: Times) -> Times:
    """The step with what comes before it; answers that several steps learn from count in each with their share."""
    length = draws.prompt + draws.answer
    made = ceil(node.batch.examples / node.parallel.degrees(ranks).data) * node.example_tokens
    scoring = draws.passes * passed(shape, held, device, made, length)
    for one in node.beside(ranks):
        tokens = draws.all * length if one.alone else made
        own = shape_of(one, node, shape)[0]
        scoring += one.passes * passed(_headless(own) if one.learns else own, held, device, tokens, length)
    rollout = decoding(shape, held, device, draws, ranks).seconds
    return spent.after(rollout / draws.reuse, scoring / draws.reuse, round(draws.all / draws.reuse))


def _headless(shape: Shape) -> Shape:
    """Of a model whose states are read by a head of one number."""
    return replace(shape, vocab=0)

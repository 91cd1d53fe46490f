"""Steps of a model whose layers lie on several ranks, a stage each, and of copies of such a row of ranks.

The micro-batches of a step go through the stages in the order called 1F1B (arXiv:1806.03377, with one flush a step as
in arXiv:2006.09503): a stage runs as many forwards ahead as there are stages after it, then one forward and one
backward in turn, so that it holds the activations of that many micro-batches and no more. Every rank knows all of the
step's micro-batches, and with them the shape of all that is sent.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmkit.core.seed import mixed, seeded
from llmkit.core.types import Batch, LossSum
from llmkit.parallel.ddp import alike
from llmkit.parallel.grid import Grid
from llmkit.parallel.pipeline import Border, Stages, tried
from llmkit.parallel.pipeline_links import Links
from llmkit.parallel.steps import PLAIN, Loss, Parts, Steps, autocast, numbers
from llmkit.parallel.sums import gradients, sum_over
from llmkit.parallel.team import Sums, Whole, norm, summed


class Row(Whole):
    """The team of the ranks that hold a model's stages, and of their copies."""

    def __init__(self, stages: Stages, links: Links, grid: Grid, model: nn.Module, trained: Mapping[str, Any]) -> None:
        self.stages, self.links, self.grid = stages, links, grid
        homes = _homes(stages, model)
        self.params = {name: p for name, p in trained.items() if links.index in homes[id(p)]}
        """The trained parameters of this stage."""
        self.shared = _shared(trained, homes)
        self.groups = {held: _group(links, held) for held in dict.fromkeys(self.shared.values())}
        """Stages that hold the same parameter (tied embeddings are the head too) -> those of this row, as a group."""
        self.foreign = _foreign(model, homes)
        """What the main rank needs of other stages for the result, by name: the stage, the shape and the type."""
        for stage in range(links.count):
            if not any(stage in homes[id(p)] for p in trained.values()):
                stages.refuse(f"nothing is trained in stage {stage}, layers {_told(stages.layers(stage))}")

    def after(self, index: int, turns: int) -> None:
        """When all passes are done: gradients are summed over copies, then over the stages that share a parameter."""
        if self.grid.degrees.replicate > 1:
            sum_over(gradients(self.params.values()), self.grid.group("replicate"))
        for held, group in self.groups.items():
            if self.links.index in held:
                some = (p for name, p in self.params.items() if self.shared.get(name) == held)
                sum_over(gradients(some), group)

    def totals(self, own: Sums) -> dict[str, tuple[float, ...]]:
        """What the last stages of all copies say, in the order of ranks."""
        said = self.grid.peers.gather(own)
        return summed(one for rank, one in enumerate(said) if self._place(rank)["pipeline"] == self.links.count - 1)

    def _place(self, rank: int) -> dict[str, int]:
        return self.grid.degrees.place(rank)

    def norm(self, params: Mapping[str, nn.Parameter]) -> float:
        """Over all stages of the first copy, which has the same gradients as the others: what several hold, once."""
        mine = [p for name, p in params.items() if min(self.shared.get(name, (self.links.index,))) == self.links.index]
        said = self.grid.peers.gather(norm(mine))
        return math.hypot(*(one for rank, one in enumerate(said) if not self._place(rank)["replicate"]))

    def assemble(self, model: nn.Module, peers: Any) -> None:
        """The first copy's stages send what the main rank lacks, tensor by tensor, in the host's memory."""
        main = peers.ranks.main
        if main:
            self.stages.show(None)
        held = dict(model.named_parameters())
        for name, (stage, shape, dtype) in self.foreign.items():
            if main:
                room = torch.empty(shape, dtype=dtype)
                dist.recv(room, self.links.ranks[stage], group=peers.host)
                held[name].data = room
            elif self.grid.rank == stage * self.grid.degrees.replicate:
                dist.send(held[name].detach().cpu().contiguous(), 0, group=peers.host)


@dataclass
class Flight:
    """A micro-batch between its forward and its backward."""

    given: Tensor | None
    """Hidden states of the stage before."""
    made: Tensor
    """Those for the next stage, or the loss."""


class Piped(Steps):
    """Steps in 1F1B order."""

    def __init__(self, parts: Parts, params: Mapping[str, nn.Parameter], team: Row, borders: Sequence[Border]) -> None:
        super().__init__(parts.scored, params, parts.optimizer(params, among=parts.params), parts.ways, team)
        self.row, self.links, self.stages, self.say = team, team.links, team.stages, parts.say
        self.before = None if self.links.first else borders[self.links.index - 1]
        self.phase = team.grid.peers.phase
        self.own_forward: Any = parts.scored.forward
        parts.scored.forward = self._asked  # of our own module: what evaluations call
        self.warned = False

    def accumulate(self, batches: Iterable[Batch], loss: Loss, count: float, turns: int = 1) -> LossSum:
        """Adds the gradients of sum(loss) / count; all micro-batches are known before the first one runs."""
        work = [(batch, torch.initial_seed()) for batch in batches]  # the iterator sets the seed of each
        self._warn(len(work))
        own: Sums = {}
        flights: deque[Flight] = deque()
        ahead = min(len(work), self.links.count - 1 - self.links.index)
        for index in range(len(work) + ahead):
            if index < len(work):
                flight, sums = self._forward(*work[index], loss, count)
                flights.append(flight)
                own = summed([own, sums])
            if index >= ahead:
                self._backward(flights.popleft())
        self.links.settle()
        self.phase("reduce")
        self.row.after(len(work) - 1, len(work))
        made, wait = self.sums(own), self.links.count - 1
        idle = torch.tensor(float(wait)), torch.tensor(float(len(work) + wait))
        return LossSum(made.total, made.count, {**made.extras, "bubble": idle})

    def _warn(self, turns: int) -> None:
        """Says once that few micro-batches leave stages idle."""
        stages = self.links.count
        if turns < stages and not self.warned:
            idle = (stages - 1) / (turns + stages - 1)
            what = f"{turns} micro-batches a step for {stages} stages: each is idle for {idle:.0%} of it"
            self.say(f"{what}; lower micro_batch, or raise batch.rows")
        self.warned = True

    def _forward(self, batch: Batch, seed: int, loss: Loss, count: float) -> tuple[Flight, Sums]:
        given = self._given(batch)
        seeded(mixed(seed, self.links.index) if self.links.index else seed)  # as one process draws, in the first stage
        self.phase("forward")
        if given is not None:
            given.requires_grad_(True)
        needs = getattr(loss, "needs", PLAIN)
        with self._keeping(), self.autocast(), self.stages.begun(given):
            if not self.links.last:
                made = cast(Any, self.scored).hidden(batch)
            else:
                scores = self.own_forward(batch) if needs == PLAIN else self.own_forward(batch, needs)
        if not self.links.last:
            self.links.ahead(made)
            return Flight(given, made), {}
        part = loss(scores, batch)
        scale = self.ways.scaler.scale if self.ways.scaler else 1.0
        return Flight(given, part.total / count * scale), numbers([part])[0]

    def _backward(self, flight: Flight) -> None:
        grad = None
        if not self.links.last:
            self.phase("reduce")
            grad = self.links.from_next(torch.empty_like(flight.made))
        self.phase("backward")
        if flight.made.requires_grad:  # a row without weights may give a loss that nothing leads to
            torch.autograd.backward(flight.made, grad)
        if flight.given is not None:
            own = flight.given.grad
            self.links.back(torch.zeros_like(flight.given) if own is None else own)

    def _given(self, batch: Batch) -> Tensor | None:
        """Hidden states of the stage before, (B, T, H); None in the first."""
        if self.before is None:
            return None
        shape = (*batch.tokens.shape, self.before.width)
        room = torch.empty(shape, dtype=self.before.dtype, device=batch.tokens.device)
        self.phase("reduce")  # as the watch calls it when a rank waits for others
        return self.links.from_before(room)

    def _asked(self, batch: Batch, *more: Any) -> Tensor:
        """The scored module's forward, without gradients: all stages call it, and all get what the last one gives."""
        if torch.is_grad_enabled():
            raise ValueError("stages learn through `accumulate`: call the model under torch.no_grad()")
        made: Tensor | None = None
        given = self._given(batch)
        self.phase("evaluate")
        with self.stages.begun(given):
            if self.links.last:
                made = self.own_forward(batch, *more)
            else:
                self.links.ahead(cast(Any, self.scored).hidden(batch))
        self.phase("reduce")
        told = self.links.told(made, batch.tokens.device)
        self.links.settle()
        self.phase("evaluate")
        return told


def stepper(parts: Parts, grid: Grid) -> Steps:
    """Steps of the stages along the axis `pipeline`; what is left of the model on each rank is its own stage.

    Raises:
        ModelError: the family cannot run in stages, or one would have nothing to learn.
    """
    scored = cast(Any, parts.scored)
    scored.fills = False  # stages hand on hidden states of the batch's own shape
    stages = Stages(cast(nn.Module, parts.base), grid.degrees.pipeline)
    borders = tried(stages, scored, partial(autocast, parts.ways, parts.params))
    links = Links(grid.group("pipeline"))
    team = Row(stages, links, grid, scored.model, parts.params)
    if grid.degrees.replicate > 1:
        alike(team.params, grid.group("replicate"))
    for held, group in team.groups.items():
        if links.index in held:
            alike({name: p for name, p in team.params.items() if team.shared.get(name) == held}, group)
    stages.settle(links.index)
    spread = ", ".join(f"{_told(stages.layers(stage))} on stage {stage}" for stage in range(links.count))
    parts.say(f"layers {spread}")
    return Piped(parts, team.params, team, borders)


def _told(layers: Sequence[int]) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])


def _homes(stages: Stages, model: nn.Module) -> dict[int, tuple[int, ...]]:
    """The stages that hold each parameter, by its identity."""
    found: dict[int, tuple[int, ...]] = {}
    for stage in range(stages.count):
        stages.show(stage)
        for p in model.parameters():
            found[id(p)] = (*found.get(id(p), ()), stage)
    stages.show(None)
    return found


def _shared(trained: Mapping[str, nn.Parameter], homes: Mapping[int, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The trained parameters that several stages hold, by name."""
    return {name: homes[id(p)] for name, p in trained.items() if len(homes[id(p)]) > 1}


def _group(links: Links, held: tuple[int, ...]) -> Any:
    """The ranks of this row that are these stages, as a group; None on the others."""
    if links.index not in held:
        return None
    return dist.new_group([links.ranks[stage] for stage in held], use_local_synchronization=True)


def _foreign(
    model: nn.Module, homes: Mapping[int, tuple[int, ...]]
) -> dict[str, tuple[int, tuple[int, ...], torch.dtype]]:
    """What the first stage lacks: all of a model's parameters, and of an adapter its own."""
    mine = {id(p) for p in model.parameters()}
    if hasattr(model, "peft_config"):
        factors = {id(p) for module in model.modules() for p in _factors(module)}
        mine = {id(p) for p in model.parameters() if p.requires_grad or id(p) in factors}
    return {
        name: (homes[id(p)][0], tuple(p.shape), p.dtype)
        for name, p in model.named_parameters()
        if id(p) in mine and 0 not in homes[id(p)]
    }


def _factors(module: Any) -> Iterable[nn.Parameter]:
    """What an adapter put beside a linear, learned or not."""
    for name in getattr(module, "adapter_layer_names", ()):
        held = getattr(module, name, None)
        if isinstance(held, nn.Module):
            yield from held.parameters()

"""Ranks that share the optimizer's state, the gradients or the weights of one model, by DeepSpeed's ZeRO.

DeepSpeed holds each rank's part of every tensor in flat buffers and drives the recipe's own optimizer over them. What
is ours stays ours: sums and their counts, the norm before the update, clipping, the guard's word on a step, rates and
checkpoints. Of DeepSpeed's own checkpoints none is written, for they are pickles.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmkit.core.peers import Alone, Peers
from llmkit.core.sliced import Slice
from llmkit.core.types import Batch, LossSum
from llmkit.parallel.grid import Grid
from llmkit.parallel.node import Zero
from llmkit.parallel.optimizers import Optimizers
from llmkit.parallel.shards import Shards
from llmkit.parallel.steps import Loss, Parts, Steps
from llmkit.parallel.team import Sums, summed
from llmkit.parallel.zero_engine import imported


class Zeroed(Steps):
    """Steps whose gradients and updates are DeepSpeed's."""

    def __init__(self, parts: Parts, grid: Grid | None, config: dict[str, Any]) -> None:
        import deepspeed

        inner = parts.optimizer(parts.params)
        self.world = 1 if grid is None else grid.degrees.world
        self.factor = 1.0
        """Of the gradients, before the optimizer reads them."""
        inner.parts[0].register_step_pre_hook(self._scaled)
        if parts.ways.compute is not None:
            parts.scored.register_forward_pre_hook(self._enter, prepend=True)
            parts.scored.register_forward_hook(self._leave, always_call=True)
        self.inside: list[AbstractContextManager[Any]] = []
        """The autocasts that are entered."""
        _read(parts, config)
        self.engine: Any = deepspeed.initialize(
            model=parts.scored, optimizer=inner.parts[0], config=config, dist_init_required=False
        )[0]
        self.shards = Shards(self.engine, parts.params)
        team = Sharers(self.engine, self.shards, grid)
        for p in parts.params.values():
            p.register_post_accumulate_grad_hook(team.summing)
        super().__init__(self.engine, parts.params, Driven(inner, self.engine, self.shards), parts.ways, team)

    def accumulate(self, batches: Iterable[Batch], loss: Loss, count: float, turns: int = 1) -> LossSum:
        """As `Steps`; DeepSpeed gives the mean over ranks of gradients that are to be summed."""
        self.factor = 1.0
        return super().accumulate(batches, loss, count / self.world, turns)

    def grad_norm(self) -> float:
        """The norm of all gradients together."""
        return super().grad_norm() * self.factor

    def autocast(self) -> AbstractContextManager[Any]:
        """As `Steps`, and a weight's copy in 16 bits goes when the weight goes."""
        if self.ways.compute is None:
            return nullcontext()
        return torch.autocast(self.engine.device.type, dtype=self.ways.compute, cache_enabled=False)

    def _enter(self, *_: Any) -> None:
        """DeepSpeed switches off an autocast that is around its forward pass."""
        self.inside.append(self.autocast())
        self.inside[-1].__enter__()

    def _leave(self, *_: Any) -> None:
        self.inside.pop().__exit__(None, None, None)

    def _scale(self, factor: float) -> None:
        self.factor *= factor

    def _scaled(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before an update of a flat buffer: its gradients are scaled where that was asked for."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.factor != 1.0 and grads:
            torch._foreach_mul_(grads, self.factor)

    def state(self) -> dict[str, Tensor | Slice]:
        """As `Steps`, each tensor whole on one rank and empty on the others: called by every rank."""
        held = dict(self.shards.state())
        if scaler := self.ways.scaler:
            held |= {"scaler/scale": torch.tensor(scaler.scale), "scaler/good": torch.tensor(scaler.good)}
        return held

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave: called by every rank."""
        self.shards.load(tensors)
        if (scaler := self.ways.scaler) and "scaler/scale" in tensors:
            scaler.scale, scaler.good = float(tensors["scaler/scale"]), int(tensors["scaler/good"])

    def assemble(self, models: Sequence[nn.Module], peers: Peers) -> None:
        """The trained weights come whole to the main rank, from where updates were made; DeepSpeed is done."""
        import deepspeed

        whole = [(p, self.shards.whole(p, flat, None)) for flat, p in self.shards.pairs()]
        self.engine.destroy()
        deepspeed.comm.destroy_process_group(self.shards.group)  # a later stage's engine makes its own
        for p, tensor in whole:
            if isinstance(tensor, Tensor):
                p.data = tensor


class Driven(Optimizers):
    """The recipe's optimizer, whose updates DeepSpeed makes."""

    def __init__(self, inner: Optimizers, engine: Any, shards: Shards) -> None:
        super().__init__(inner.parts, inner.carried)
        self.engine, self.shards = engine, shards

    def step(self) -> None:
        """Applies all gradients, and gives every rank the weights that it holds."""
        self.engine.step()

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        self.shards.forget()


class Sharers:
    """The team of ranks that share one model's state."""

    def __init__(self, engine: Any, shards: Shards, grid: Grid | None) -> None:
        self.engine, self.shards = engine, shards
        self.say = grid.data() if grid is not None else lambda own: [own]
        """A JSON value of this rank -> those of all."""
        self.peers: Peers = grid.peers if grid is not None else Alone()
        self.told = False
        """That gradients of this micro-batch are being summed."""

    def assemble(self, model: nn.Module, peers: Peers) -> None:
        """Done by the stepper, which ends DeepSpeed first."""

    def around(self, index: int, turns: int) -> AbstractContextManager[Any]:
        """Says to DeepSpeed which micro-batch is the last."""
        self.engine.set_gradient_accumulation_boundary(index + 1 == turns)
        self.told = False
        return nullcontext()

    def summing(self, _: Tensor) -> None:
        """A gradient is there: DeepSpeed sums it with the next ones that come."""
        if not self.told:
            self.told = True
            self.peers.phase("reduce")

    def after(self, index: int, turns: int) -> None:
        """Done in the backward pass."""

    def totals(self, own: Sums) -> dict[str, tuple[float, ...]]:
        """Summed over ranks, in their order."""
        return summed(self.say(own))

    def norm(self, params: Mapping[str, nn.Parameter]) -> float:
        """Each rank has a part of every gradient."""
        return math.sqrt(float(self.shards.squares()))

    def part(self, name: str, like: Tensor, value: Tensor) -> Tensor | Slice:
        """Not asked: `Zeroed.state` gathers."""
        return value

    def lying(self, name: str, p: Tensor) -> Sequence[Slice]:
        """All of it, or in stage 3 a stretch of it laid flat."""
        return self.shards.lying(p)

    def own(self, name: str, like: Tensor, whole: Tensor) -> Tensor:
        """Not asked: `Zeroed.load` cuts."""
        return whole


def stepper(parts: Parts, grid: Grid | None, node: Zero) -> Steps:
    """Steps of one rank of several, or of one that keeps a part of its state elsewhere.

    Raises:
        RecipeError: the optimizer or a lever of memory cannot be together with ZeRO.
        ModelError: DeepSpeed is not installed.
    """
    device = next(iter(parts.params.values())).device.type
    imported(device)
    if grid is None and not dist.is_initialized():
        alone: Any = vars(dist)["HashStore"]()  # nothing leaves the process
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=alone, rank=0, world_size=1)
    trained = sum(p.numel() for p in parts.params.values())
    return Zeroed(parts, grid, _fitted(node.settings(_precision(parts)), trained, device))


def _read(parts: Parts, config: dict[str, Any]) -> None:
    """Reads what is still in the files: where weights are shared, a layer is dealt out before the next one is read.
    DeepSpeed moves no model to the device of which a part is dealt out already."""
    import deepspeed

    held, zero = parts.deferred, config["zero_optimization"]
    place = zero.get("offload_param", {}).get("device", "none")
    mixed = len({p.dtype for p in parts.scored.parameters()}) > 1  # which DeepSpeed makes one, of a whole model
    for layer in parts.layers if held and zero["stage"] == 3 and place != "nvme" and not mixed else ():
        held.fill(layer)
        kind = next(layer.parameters()).dtype
        options = {} if place == "none" else {"remote_device": place, "pin_memory": zero["offload_param"]["pin_memory"]}
        deepspeed.zero.Init(module=layer, config_dict_or_path=config, dtype=kind, **options)
    held.fill(parts.scored)


def _precision(parts: Parts) -> str:
    if next(iter(parts.params.values())).dtype == torch.bfloat16:
        return "bf16"
    return {None: "fp32", torch.bfloat16: "bf16_mixed", torch.float16: "fp16_mixed"}[parts.ways.compute]


def _fitted(config: dict[str, Any], trained: int, device: str) -> dict[str, Any]:
    """A configuration whose buckets are no larger than what is trained, and that pins memory for a device alone."""
    zero = dict(config["zero_optimization"])
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        if isinstance(zero.get(key), int | float):
            zero[key] = max(1024, min(int(zero[key]), trained + trained % 2))
    for key in ("offload_optimizer", "offload_param"):
        if device == "cpu" and key in zero:
            zero[key] = zero[key] | {"pin_memory": False}
    return config | {"zero_optimization": zero}

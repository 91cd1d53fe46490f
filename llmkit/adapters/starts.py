"""Where LoRA's factors start other than at (random, 0), with the base left as it is.

PiSSA and OLoRA take the start's product out of the base weight. Here the base keeps its bits and a second, frozen
adapter (`START`) takes it out of the output instead: y = W x + s B A x - s B0 A0 x. So the base without its adapter is
still the base, and nothing is rounded. Saved, the two are one plain LoRA of twice the rank, [A; A0] and [B, -B0], which
peft puts on the original base (`joined`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor

from llmkit.adapters.method import Around
from llmkit.adapters.node import Lora
from llmkit.core.errors import ModelError

START = "start"
Factors = tuple[Tensor, Tensor]
"""A (rank, in) and B (out, rank)."""


def start(model: Any, node: Lora, around: Around) -> None:
    """Sets the factors of a freshly attached LoRA as `init` says.

    Raises:
        ModelError: a weight has fewer directions than the rank asks for, or is no linear's.
    """
    if node.init == "default":
        return
    _check_linears(model, node)
    for name, layer in _layers(model):
        most = min(layer.in_features, layer.out_features)
        if node.rank > most:
            what = f"{node.init} takes {node.rank} directions of each linear, and {name} has {most}"
            raise ModelError(what, fix=f"set adapter.rank={most} at most, or leave {name} out", key="adapter.rank")
    if node.init == "loftq":
        for name, layer in _layers(model):
            _set(layer, "default", loftq(around.stored(f"{name}.weight"), _weight(layer), _scale(layer), node.rank))
    elif node.init in ("pissa", "olora"):
        _beside(model)
        for _, layer in _layers(model):
            down, up = _principal(node, _weight(layer), _scale(layer))
            _set(layer, "default", (down, up))
            _set(layer, START, (down, -up))
            for part in (layer.lora_A, layer.lora_B):
                freeze(part[START])


def _principal(node: Lora, weight: Tensor, scale: float) -> Factors:
    return olora(weight, node.rank) if node.init == "olora" else pissa(weight, scale, node.rank, node.pissa_niter)


def pissa(weight: Tensor, scale: float, rank: int, niter: int | None = None) -> Factors:
    """scale B A is the best approximation of weight (out, in) of that rank (PiSSA, arXiv:2404.02948)."""
    if niter is None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        left, values, columns = torch.svd_lowrank(weight, rank, niter=niter)
        right = columns.T
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def olora(weight: Tensor, rank: int) -> Factors:
    """The first columns of Q and rows of R of weight (out, in) = Q R (OLoRA, arXiv:2406.01775)."""
    left, right = torch.linalg.qr(weight)
    return right[:rank], left[:, :rank]


def loftq(stored: Tensor, held: Tensor, scale: float, rank: int) -> Factors:
    """held + scale B A is as near to the weight as it was before quantisation as this rank allows: one alternation of
    LoftQ (arXiv:2310.08659); more would change the base."""
    return pissa(stored.to(held) - held, scale, rank)


def eva(model: Any, node: Lora, batches: Iterable[Any], forward: Callable[[Any], object]) -> None:
    """A is the principal directions of each linear's inputs at the first `eva_tokens` trained positions of the data
    (EVA, arXiv:2410.07170), all of equal rank; B stays 0.

    Raises:
        ModelError: there are fewer such positions than the rank asks for.
    """
    seen, training = _inputs(model, node.eva_tokens, batches, forward), model.training
    model.train(training)
    made: dict[int, Tensor] = {}
    for name, layer in _layers(model):
        rows = seen[name]
        if len(rows) <= node.rank:
            what = f"eva needs more positions than rank {node.rank}, and the data has {len(rows)} trained ones"
            raise ModelError(what, fix="lower adapter.rank, or give more data", key="adapter.init")
        if id(rows) not in made:
            made[id(rows)] = components(rows, node.rank)
        _set(layer, "default", (made[id(rows)], layer.lora_B["default"].weight))


def components(rows: Tensor, rank: int) -> Tensor:
    """The first principal directions of rows (N, in): (rank, in), orthonormal, with signs that do not depend on the
    solver."""
    centred = (rows - rows.mean(0)).double()
    wide = centred.shape[1] > len(centred)  # the smaller of the two products has the same spectrum
    values, vectors = torch.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    first = vectors[:, -rank:].flip(1)
    found: Tensor = (centred.T @ first / values[-rank:].flip(0).clamp_min(1e-300).sqrt()).T if wide else first.T
    sign = found.gather(1, found.abs().argmax(1, keepdim=True)).sign()
    return (found * sign).to(rows.dtype)


def _inputs(model: Any, most: int, batches: Iterable[Any], forward: Callable[[Any], object]) -> dict[str, Tensor]:
    """The inputs (N, in) of each linear at trained positions; linears that read one input share the tensor."""
    parts: dict[str, list[Tensor]] = {name: [] for name, _ in _layers(model)}
    count, chosen, last = 0, torch.zeros(0), (torch.zeros(0), torch.zeros(0))

    def keep(name: str, x: Tensor) -> None:
        nonlocal last
        if last[0] is not x:
            rows = x.reshape(-1, x.shape[-1])
            last = (x, (rows[chosen.flatten()] if len(rows) == chosen.numel() else rows).float())
        parts[name].append(last[1])

    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: keep(name, given[0]))
        for name, layer in _layers(model)
    ]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            chosen = batch.weights != 0
            chosen &= (chosen.flatten().cumsum(0) <= most - count).view_as(chosen)
            count += int(chosen.sum())
            with torch.no_grad():
                forward(batch)
            if count >= most:
                break
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return _shared(parts)


def _shared(parts: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    made: dict[tuple[int, ...], Tensor] = {}
    for rows in parts.values():
        key = tuple(map(id, rows))
        made[key] = made[key] if key in made else torch.cat(rows) if rows else torch.zeros(0, 0)
    return {name: made[tuple(map(id, rows))] for name, rows in parts.items()}


def _beside(model: Any) -> None:
    """A second adapter of the same shape, in use beside the first."""
    own = model.peft_config["default"]
    model.add_adapter(
        START,
        LoraConfig(
            r=own.r,
            lora_alpha=own.lora_alpha,
            use_rslora=own.use_rslora,
            target_modules=own.target_modules,
            task_type=own.task_type,
        ),
    )
    for _, layer in _layers(model):
        layer.set_adapter(["default", START])


def joined(model: Any) -> None:
    """Makes one LoRA of twice the rank of the adapter and its start, with the same outputs."""
    if START not in model.peft_config:
        return
    own = model.peft_config["default"]
    grown = 2**0.5 if own.use_rslora else 2.0  # the scale stays
    with torch.no_grad():
        for _, layer in _layers(model):
            down = torch.cat([layer.lora_A[name].weight for name in ("default", START)])
            up = torch.cat([layer.lora_B[name].weight for name in ("default", START)], 1)
            _set(layer, "default", (down, up))
            layer.r["default"] *= 2
            layer.lora_alpha["default"] *= grown
    model.delete_adapter(START)
    own.r, own.lora_alpha = 2 * own.r, own.lora_alpha * grown


def freeze(linear: Any) -> None:
    """Makes a weight a buffer: peft switches the gradients of parameters on when an adapter is enabled again."""
    weight = linear.weight
    del linear.weight
    linear.register_buffer("weight", weight.detach())


def _check_linears(model: Any, node: Lora) -> None:
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_embedding_A:
            what = f"{node.init} starts linears, and {name} is none"
            raise ModelError(what, fix="leave it out of adapter.targets", key="adapter.init")


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """The linears with LoRA, by the names that they have in the base."""
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            yield name, module


def _weight(layer: Any) -> Tensor:
    """(out, in), fp32, dequantised."""
    held: Tensor = dequantize_module_weight(layer.get_base_layer()).detach().float()
    return held.T if getattr(layer, "fan_in_fan_out", False) else held


def _scale(layer: Any) -> float:
    return float(layer.scaling["default"])


def _set(layer: Any, name: str, factors: Factors) -> None:
    with torch.no_grad():
        for part, value in zip((layer.lora_A[name], layer.lora_B[name]), factors, strict=True):
            part.weight.data = value.to(part.weight).contiguous().clone()

"""IA3, VeRA, OFT and BOFT through peft: what each does to which linears, checked before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any, cast

import torch
from peft import BOFTConfig, IA3Config, OFTConfig, PeftModel, TaskType, VeraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmkit.adapters.method import Around
from llmkit.adapters.names import ALL_LINEAR, meant, short, targeted
from llmkit.adapters.rotations import Boft, Oft
from llmkit.adapters.scaled import KEYS_AND_VALUES, Ia3, Vera
from llmkit.adapters.select import check_read, unread
from llmkit.core.errors import ModelError
from llmkit.core.memory import is_out_of_memory


def ia3(model: Any, node: Ia3, around: Around) -> PeftModel:
    """peft's IA3 over `model`.

    Raises:
        ModelError: `targets` names no linear of this model.
    """
    wanted = (*KEYS_AND_VALUES, *node.feedforward) if node.targets == "auto" else node.targets
    found = targets(model, wanted, around)
    names = _short(model, found)
    kinds = {end: {meant(node.feedforward, name) for name in found if meant((end,), name)} for end in names}
    if any(len(kind) > 1 for kind in kinds.values()):  # one ending has both kinds
        names, kinds = list(found), {name: {meant(node.feedforward, name)} for name in found}
    inside = [name for name in names if True in kinds[name]]
    given = IA3Config(target_modules=names, feedforward_modules=inside, task_type=TaskType.CAUSAL_LM)
    return _adapted(model, given)


def vera(model: Any, node: Vera, around: Around) -> PeftModel:
    """peft's VeRA over `model`.

    Raises:
        ModelError: `targets` names no linear of this model.
    """
    given = VeraConfig(
        r=node.rank,
        vera_dropout=node.dropout,
        d_initial=node.d_initial,
        projection_prng_key=node.projection_prng_key,
        target_modules=_short(model, targets(model, node.targets, around)),
        task_type=TaskType.CAUSAL_LM,
    )
    return _adapted(model, given)


def oft(model: Any, node: Oft, around: Around) -> PeftModel:
    """peft's OFT over `model`.

    Raises:
        ModelError: `targets` names no linear of this model, or a block does not divide one.
    """
    found = targets(model, node.targets, around)
    _check_blocks(found, node.block_size, 1)
    given = OFTConfig(
        oft_block_size=node.block_size,
        module_dropout=node.dropout,
        block_share=node.share,
        use_cayley_neumann=node.cayley_neumann,
        target_modules=_short(model, found),
        task_type=TaskType.CAUSAL_LM,
    )
    return _adapted(model, given)


def boft(model: Any, node: Boft, around: Around) -> PeftModel:
    """peft's BOFT over `model`.

    Raises:
        ModelError: `targets` names no linear of this model, a block does not divide one, or there is no extension.
    """
    from peft.tuners.boft.layer import get_fbd_cuda

    if node.butterfly_factors > 1 and get_fbd_cuda() is None:  # peft would take 1 instead
        what = f"{node.butterfly_factors} factors need peft's CUDA extension, which cannot be built here"
        raise ModelError(what, fix="use butterfly_factors: 1", key="adapter.butterfly_factors")
    found = targets(model, node.targets, around)
    _check_blocks(found, node.block_size, 1 << (node.butterfly_factors - 1))
    given = BOFTConfig(
        boft_block_size=node.block_size,
        boft_n_butterfly_factor=node.butterfly_factors,
        boft_dropout=node.dropout,
        target_modules=_short(model, found),
        task_type=TaskType.CAUSAL_LM,
    )
    return _adapted(model, given)


def targets(model: Any, wanted: str | Sequence[str], around: Around) -> dict[str, nn.Module]:
    """The linears that `wanted` names, by name: none of those in idle modules, of the head and, unasked, of routers.

    Raises:
        ModelError: there is none.
    """
    head, fused = model.get_output_embeddings(), unread(model)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and targeted(wanted, name)
        and not (wanted == ALL_LINEAR and (module is head or name in fused or name.endswith(".router")))
        and not any(name == one or name.startswith(f"{one}.") for one in around.idle)
    }
    if not found:
        said = ", ".join(wanted) if not isinstance(wanted, str) else wanted
        there = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)})
        raise ModelError(
            f"{said} names no linear of {type(model).__name__}",
            fix=f"name endings such as {', '.join(there[:4])}",
            key="adapter.targets",
        )
    check_read(found, fused)
    names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in found))
    around.notice(f"the adapter is on {len(found)} linears: {names}")
    return found


def _short(model: Any, found: Mapping[str, nn.Module]) -> list[str]:
    """The fewest endings for peft, which knows no exceptions."""
    return short(list(found), [name for name, _ in model.named_modules()])


def _check_blocks(found: Mapping[str, nn.Module], size: int, times: int) -> None:
    """peft would take other blocks than were asked for."""
    widths = {name: _width(module) for name, module in found.items()}
    for name, width in widths.items():
        if width % (size * times):
            whole = gcd(*widths.values()) // times
            near = min((n for n in range(2, whole + 1) if whole % n == 0), key=lambda n: abs(n - size), default=0)
            raise ModelError(
                f"blocks of {size} do not divide the {width} inputs of {name}",
                fix=f"use a divisor of all such as {near}" if near else "leave it out of adapter.targets",
                key="adapter.block_size",
            )


def _width(linear: Any) -> int:
    return int(linear.in_features if isinstance(linear, nn.Linear) else linear.nx)


def _adapted(model: Any, given: Any) -> PeftModel:
    """The adapter on its model, when that still runs.

    Raises:
        ModelError: peft cannot take the family's linears, or these are given what peft's cannot take.
    """
    training, kind = model.training, given.peft_type.value.lower()
    try:
        made = cast(PeftModel, get_peft_model(model, given))
        with torch.no_grad():
            made.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError) as cause:
        if is_out_of_memory(cause):
            raise
        what = f"{type(model).__name__} does not run with {kind}: {(str(cause).splitlines() or [''])[0][:90]}"
        raise ModelError(what, fix="use lora, or other adapter.targets", key="adapter.kind") from cause
    return made.train(training)

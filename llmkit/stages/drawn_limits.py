"""What answers that are drawn while a model is trained rule out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmkit.adapters.limits import virtual_tokens
from llmkit.adapters.node import Lora
from llmkit.core.config import Conflict
from llmkit.stages.reference import AdapterOff

if TYPE_CHECKING:
    from llmkit.stages.from_rollouts import FromRollouts


def limits(stage: FromRollouts) -> Iterator[Conflict]:
    """What contradicts what, in a stage that draws."""
    for odd in (_odd_reference, _odd_forwards, _odd_server, _odd_ranks, _odd_prompts):
        yield from odd(stage)


def _odd_reference(stage: FromRollouts) -> Iterator[Conflict]:
    price = stage.price_key
    if not stage.priced:
        if stage.reference != AdapterOff():
            yield Conflict("reference", "a divergence costs nothing", f"set {price}, or drop reference", price)
    elif isinstance(stage.reference, AdapterOff) and not stage.adapter.frozen_base:
        what, fix = "adapter none leaves nothing of the model as it was", f"set reference: model, or {price}=0"
        yield Conflict("reference.kind", what, fix, "adapter.kind")
    if virtual_tokens(stage.adapter):
        what = f"{stage.adapter.kind} puts tokens of its own before a row, which the engine does not"
        yield Conflict("adapter.kind", what, "use adapter: {kind: lora}", "kind")


def _odd_forwards(stage: FromRollouts) -> Iterator[Conflict]:
    """What would make a policy differ from itself."""
    if getattr(stage.adapter, "dropout", 0.0):
        what = "with dropout a policy differs from itself, and a ratio from 1"
        yield Conflict("adapter.dropout", what, "set adapter.dropout=0", "kind")
    if stage.neftune:
        yield Conflict("neftune", "with noise a policy differs from itself", "drop neftune", "kind")
    if getattr(stage.adapter, "init", "default") == "eva":
        what = "there are no answers yet that it could begin from"
        yield Conflict("adapter.init", what, "use another init", "kind")
    for name in ("context", "pipeline", "expert"):
        if getattr(stage.parallel, name) > 1:
            what = "answers are drawn and learned from by ranks that each run whole rows through all layers"
            yield Conflict(f"parallel.{name}", what, f"set parallel.{name}=1", "kind")


def _odd_server(stage: FromRollouts) -> Iterator[Conflict]:
    """What a vLLM server cannot be told."""
    adapter = stage.adapter
    if stage.rollout.vllm is None:
        return
    for key in (key for key in ("add_tokens", "add_special_tokens") if getattr(stage.model, key)):
        what = "the server has the tokens of the model as it is, and rows of embeddings are not told it"
        yield Conflict(f"model.{key}", what, f"drop model.{key}, or let the engine draw", "rollout.vllm")
    if not adapter.frozen_base:
        return
    kept = ("init", "dora", "lora_fa", "modules_to_save", "parameters", "trainable_tokens")
    other = [key for key in kept if adapter.kind == "lora" and getattr(adapter, key) != getattr(Lora(), key)]
    if adapter.kind != "lora" or other:
        key = f"adapter.{other[0] if other else 'kind'}"
        what = "vllm reads two factors of each linear, over the model as it is"
        yield Conflict(key, what, "use adapter: {kind: lora} without it, or the engine", "rollout.vllm")


def _odd_ranks(stage: FromRollouts) -> Iterator[Conflict]:
    """What is not there yet for ranks that only draw."""
    if not stage.rollout.ranks:
        return
    if stage.parallel.tensor > 1:
        what = "of a model that is cut by heads nothing is told to ranks that only draw"
        yield Conflict("rollout.ranks", what, "set parallel.tensor=1, or rollout.ranks=0", "parallel.tensor")
    if stage.quant.kind == "bnb_int8" or stage.types_name == "fp8":
        key = "precision" if stage.types_name == "fp8" else "quant.kind"
        what = "ranks that only draw compute in no 8 bits"
        yield Conflict("rollout.ranks", what, "use bf16 or quant: bnb_nf4, or set rollout.ranks=0", key)


def _odd_prompts(stage: FromRollouts) -> Iterator[Conflict]:
    data = stage.data
    odd = {"streaming": data.streaming, "decontaminate": bool(data.decontaminate)}
    odd |= {"dedup": data.dedup.kind != "none", "lint": data.lint.level == "error"}
    odd |= {"mix": data.mixed}
    for key in (key for key, said in odd.items() if said):
        yield Conflict(f"data.{key}", "prompts are read whole and as they are", f"drop data.{key}", "kind")
    if stage.rollout.environment is not None and stage.rollout.stop:
        yield Conflict("rollout.stop", "calls end where the template says", "drop it", "rollout.environment")
    if stage.rollout.environment is not None and data.sources("valid"):
        what = "evaluations ask once, without tools"
        yield Conflict("data.valid", what, "drop data.valid and data.held_out", "rollout.environment")
    if stage.batch.tokens is not None:
        what = "how long a step's answers are is not known before"
        yield Conflict("batch.tokens", what, "use batch.prompts", "kind")
    if data.overflow != type(data).overflow:
        yield Conflict("data.overflow", "prompts that leave no room are left out", "drop data.overflow", "kind")
    if data.train_on != "assistant":
        yield Conflict("data.train_on", "answers are trained, of which rows have none", "drop data.train_on", "kind")

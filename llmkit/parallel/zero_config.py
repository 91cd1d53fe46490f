"""The DeepSpeed configuration of a recipe: made from it, or given by the user and compared with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.core.errors import Problem, RecipeError

KEY = "parallel.strategy.config"
BUCKET = 50_000_000
"""Numbers that travel together; a stepper takes fewer where fewer are trained."""
WHOLE = 100_000
"""Weights of at most so many numbers stay whole on every rank in stage 3."""
LIVE = 1_000_000_000
"""Numbers of weights that are whole at a time in stage 3, at most."""
OURS = {
    "train_batch_size": "batch",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "micro_batch",
    "optimizer": "optim",
    "scheduler": "schedule",
    "amp": "precision",
    "torch_autocast": "precision",
    "fp16": "precision",
}
"""What the recipe says alone, by the key that says it."""
READ = (
    "zero_optimization",
    "gradient_clipping",
    "bf16",
    "data_types",
    "communication_data_type",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "aio",
    "comms_logger",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "wall_clock_breakdown",
)
"""What a user's configuration may say beside that."""
UNTRIED = {
    "mics_shard_size": -1,
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
}
"""Of `zero_optimization`: weights in groups of ranks, or in fewer bits, which `shards.py` would read wrongly; each with
the value that switches it off."""


@dataclass(frozen=True)
class Wanted:
    """What a recipe says of it."""

    stage: int
    optimizer: str = "none"
    params: str = "none"
    path: str | None = None
    precision: str = "fp32"
    """By its name; `auto` is fp32 or bf16_mixed, whose configurations are the same."""


def generated(wanted: Wanted) -> dict[str, Any]:
    """The configuration for a recipe: sums are ours to divide, norms ours to clip, rates ours to set."""
    zero: dict[str, Any] = {
        "stage": wanted.stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": BUCKET,
    }
    if wanted.stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": WHOLE,
            "stage3_max_live_parameters": LIVE,
            "stage3_max_reuse_distance": LIVE,
            "sub_group_size": LIVE,
        }
    else:
        zero |= {"allgather_bucket_size": BUCKET}
    for key, place in _places(wanted).items():
        if place != "none":
            zero[key] = {"device": place, "pin_memory": True, **_disk(wanted, place)}
    return _completed({"zero_optimization": zero}, wanted)


def given(path: str, wanted: Wanted) -> dict[str, Any]:
    """The user's configuration, with what the recipe says.

    Raises:
        RecipeError: it cannot be read, or contradicts the recipe; all contradictions are told.
    """
    try:
        said = json.loads(Path(path).expanduser().read_text())
    except OSError as cause:
        raise RecipeError(f"{path} cannot be read ({cause.strerror})", fix="name a JSON file", key=KEY) from cause
    except (ValueError, RecursionError) as cause:
        raise RecipeError(f"{path} is no JSON ({cause})", fix="mend it", key=KEY) from cause
    if not isinstance(said, dict):
        raise RecipeError(f"{path} is no JSON object", fix="mend it", key=KEY)
    said = _without_auto(said)
    if odd := _no_objects(said):
        raise RecipeError(f"{path}: {', '.join(odd)} is no JSON object", fix="mend it", key=KEY)
    found = [Problem(f"{path}: {what}", fix, key=KEY) for what, fix in _contradictions(said, wanted)]
    if found:
        raise RecipeError(problems=found)
    zero = {**said.get("zero_optimization", {}), "stage": wanted.stage}
    return _completed({**said, "zero_optimization": zero}, wanted)


def _completed(said: dict[str, Any], wanted: Wanted) -> dict[str, Any]:
    """With what is the same in each of them."""
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if wanted.precision == "bf16":  # weights, gradients and moments in 16 bits, as without DeepSpeed
        made["bf16"] = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
        made["data_types"] = {"grad_accum_dtype": "bf16"}
    return {**made, **said, "gradient_clipping": 0.0}


def _places(wanted: Wanted) -> dict[str, str]:
    return {"offload_optimizer": wanted.optimizer, "offload_param": wanted.params}


def _disk(wanted: Wanted, place: str) -> dict[str, str]:
    return {"nvme_path": str(Path(wanted.path).expanduser())} if place == "nvme" and wanted.path else {}


def _without_auto(said: Mapping[str, Any]) -> dict[str, Any]:
    """Without the values that other frameworks fill in, and without what then says nothing."""
    kept = {}
    for key, value in said.items():
        inner = _without_auto(value) if isinstance(value, Mapping) else value
        if value != "auto" and (inner != {} or value == {}):
            kept[key] = inner
    return kept


def _no_objects(said: Mapping[str, Any]) -> list[str]:
    """The keys of what must be a section, and is something else."""
    zero = said.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        return ["zero_optimization"]
    inner = {f"zero_optimization.{key}": zero.get(key) for key in ("offload_optimizer", "offload_param")}
    return [key for key, value in inner.items() if not isinstance(value, Mapping | None)]


def _contradictions(said: Mapping[str, Any], wanted: Wanted) -> Iterator[tuple[str, str]]:
    """(what, fix) of each value that is not the recipe's to leave to another."""
    for key, ours in OURS.items():
        if said.get(key) and not _off(said[key]):
            yield f"{key} is what the recipe's {ours} says", f"drop {key} from it, or set it to auto"
    if said.get("gradient_clipping"):
        what = f"gradient_clipping {said['gradient_clipping']} and the recipe's optim.clip both clip"
        yield what, "drop gradient_clipping, or set it to 0"
    if _on(said.get("bf16")) and wanted.precision not in ("bf16", "bf16_mixed", "auto"):
        what = f"bf16 is enabled, and the recipe's precision is {wanted.precision}"
        yield what, "set precision=bf16_mixed, or drop bf16"
    elif _on(said.get("bf16")) and wanted.stage == 1 and wanted.precision != "bf16":
        yield "bf16 in stage 1 is another optimizer of DeepSpeed's", "set parallel.strategy.stage=2, or drop bf16"
    yield from _odd_zero(said.get("zero_optimization", {}), wanted)
    for key in said:
        if key not in READ and key not in OURS:
            yield f"{key} is nothing that llmkit leaves to DeepSpeed", f"drop {key}"


def _odd_zero(zero: Mapping[str, Any], wanted: Wanted) -> Iterator[tuple[str, str]]:
    """(what, fix) of what `zero_optimization` says against the recipe."""
    if (stage := zero.get("stage", wanted.stage)) != wanted.stage:
        yield (
            f"zero_optimization.stage is {stage}, and parallel.strategy.stage is {wanted.stage}",
            f"set parallel.strategy.stage={stage}",
        )
    for key, place in _places(wanted).items():
        theirs = (zero.get(key) or {}).get("device", "none")
        if theirs != place:
            ours = f"parallel.strategy.offload.{'optimizer' if key == 'offload_optimizer' else 'params'}"
            yield f"zero_optimization.{key}.device is {theirs}, and {ours} is {place}", f"set {ours}={theirs}"
    for key, off in UNTRIED.items():
        if zero.get(key, off) != off:
            yield f"zero_optimization.{key} lays weights out as no checkpoint here knows", f"drop {key}"


def _on(section: Any) -> bool:
    return isinstance(section, Mapping) and bool(section.get("enabled"))


def _off(section: Any) -> bool:
    """A section that is there and switched off says nothing."""
    return isinstance(section, Mapping) and section.get("enabled", True) is False

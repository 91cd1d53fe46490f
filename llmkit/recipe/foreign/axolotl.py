"""axolotl's configurations."""

from __future__ import annotations

from typing import Any

from llmkit.core.errors import RecipeError
from llmkit.recipe.foreign import arguments as shared
from llmkit.recipe.foreign.axolotl_data import data
from llmkit.recipe.foreign.draft import Draft

NEEDLESS = {
    "model_type": "the model's own configuration says its class",
    "tokenizer_type": "the tokenizer's own configuration says its class",
    "processor_type": "rows hold text alone",
    "is_llama_derived_model": "the model's own configuration says its class",
    "is_falcon_derived_model": "the model's own configuration says its class",
    "is_mistral_derived_model": "the model's own configuration says its class",
    "is_qwen_derived_model": "the model's own configuration says its class",
    "strict": "an unknown key is always an error",
    "eval_batch_size": "evaluation sizes its own forwards",
    "dataset_prepared_path": "rows are tokenised once, into a cache",
    "dataset_processes": "rows are tokenised once, into a cache",
    "pad_to_sequence_len": "packed rows have no padding",
    "eval_sample_packing": "evaluation packs what it can",
    "eot_tokens": "the end of a turn is read from the chat template",
    "lora_fan_in_fan_out": "is read from the model",
    "sample_packing_sequentially": "rows are packed in their order within a step",
    "use_kernels": "the fused kernels are always on where they are live: llmkit doctor",
    "lora_mlp_kernel": "LoRA's linears are fused",
    "lora_qkv_kernel": "LoRA's linears are fused",
    "lora_o_kernel": "LoRA's linears are fused",
    "cut_cross_entropy": "the head never makes all logits",
    "chunked_cross_entropy": "the head never makes all logits",
    "flash_attn_cross_entropy": "the head never makes all logits",
    "wandb_watch": "gradient norms are in metrics.jsonl",
    "wandb_log_model": "the result stays in the run's folder",
    "loss_watchdog_threshold": "the guard watches for a loss far above its median",
    "loss_watchdog_patience": "the guard watches for a loss far above its median",
    "flash_attn_rms_norm": "norms are fused",
    "flash_attn_fuse_mlp": "gated MLPs are fused",
}
LOST = {
    "lora_model_dir": "training goes on from a whole model: llmkit merge it first, and give the result as model",
    "unfrozen_parameters": "with adapter none give adapter.train as globs over parameter names",
    "gptq": "a GPTQ base cannot be trained on: use quant: {kind: bnb_nf4}",
    "relora": "ReLoRA is not there",
    "relora_steps": "ReLoRA is not there",
    "lisa_n_layers": "LISA is not there: see adapter.freeze",
    "qat": "training through quantisation is not there",
    "torchdistx_path": "is not used",
    "dp_shard_size": "more than one rank comes later: parallel.strategy",
    "dp_replicate_size": "more than one rank comes later: parallel.strategy",
    "context_parallel_size": "more than one rank comes later: parallel.context",
    "sequence_parallel_degree": "more than one rank comes later: parallel.context",
    "tensor_parallel_size": "more than one rank comes later: parallel.tensor",
    "expert_parallel_size": "more than one rank comes later: parallel.expert",
    "fsdp_version": "more than one rank comes later: parallel.strategy",
    "special_tokens": "the tokenizer's own are used (rows are never padded into the loss); new ones: model.add_tokens",
    "model_config": "is read from the model's folder",
    "overrides_of_model_config": "is read from the model's folder",
    "adapter": "has no counterpart",
}
OTHER_STAGES = {"rl": "preference or policy", "reward_model": "reward", "process_reward_model": "reward"}


def convert(draft: Draft) -> None:
    """Turns the whole of it.

    Raises:
        RecipeError: it is a kind of training that has no stage yet.
    """
    for key, stage in OTHER_STAGES.items():
        if draft.get(key):
            what = f"{draft.get(key)} makes it a {stage} stage, which is not available yet in this version"
            raise RecipeError(what, fix="import a configuration of supervised training", key=key, line=draft.lines[key])
    draft.put("kind", "pretrain" if draft.get("pretraining_dataset") else "sft")
    draft.rename({"base_model": "model.name", "revision_of_model": "model.revision", "output_dir": "out"})
    draft.rename({"seed": "seed", "neftune_noise_alpha": "neftune"})
    if isinstance(draft.get("tokens"), list):
        draft.put("model.add_tokens", draft.get("tokens"), "tokens")
    shared.attention(draft, "attn_implementation")
    _attention(draft)
    full = not draft.get("adapter")
    _adapter(draft)
    data(draft)
    packed = int(draft.get("sequence_len", 512)) if draft.get("sample_packing") is True else 0
    shared.batch(draft, "micro_batch_size", 1, packed)
    shared.length(draft, "num_epochs", 1)
    shared.optimizer(draft, "optimizer", 5e-5)
    shared.schedule(draft, "lr_scheduler", "cosine")
    draft.rename({"cosine_min_lr_ratio": "schedule.floor"})
    shared.precision(draft, "bf16", full)
    _memory(draft)
    _when(draft)
    shared.saving(draft)
    _logs(draft)
    shared.hub(draft)
    liger = {key: "the fused kernels are always on" for key in draft.said if key.startswith("liger_")}
    wanted = {key: "is empty" for key in ("fsdp", "deepspeed", "special_tokens") if not draft.get(key)}
    if set(draft.get("special_tokens") or {}) == {"pad_token"}:
        wanted["special_tokens"] = "padding is never trained, and packed rows have none"
    plugins = [name for name in draft.get("plugins", []) if "liger" not in str(name) and "cut_cross" not in str(name)]
    draft.needless(
        {**NEEDLESS, **shared.NEEDLESS, **liger, **wanted, **({} if plugins else {"plugins": "fused kernels"})}
    )
    draft.lost({**LOST, **shared.LOST, "plugins": "plugins of axolotl cannot run here"})


def _attention(draft: Draft) -> None:
    for key, name in {"flash_attention": "flash", "sdp_attention": "sdpa", "eager_attention": "eager"}.items():
        if draft.get(key) is True and "attention" not in draft.recipe["model"]:
            draft.put("model.attention", name, key)
    draft.lost({key: "use model.attention" for key in ("xformers_attention", "s2_attention", "flash_attention")})


def _adapter(draft: Draft) -> None:
    name = draft.get("adapter")
    if name in ("lora", "qlora"):
        draft.put("adapter.kind", "lora", "adapter")
        draft.rename({"lora_r": "adapter.rank", "lora_alpha": "adapter.alpha", "lora_dropout": "adapter.dropout"})
        names = {"peft_use_dora": "dora", "peft_use_rslora": "rslora", "loraplus_lr_ratio": "lora_plus"}
        names |= {"lora_modules_to_save": "modules_to_save", "lora_target_parameters": "parameters"}
        draft.rename({theirs: f"adapter.{ours}" for theirs, ours in names.items()})
        _targets(draft)
    elif name is None:
        draft.put("adapter.kind", "none")
        idle = "nothing but adapter lora or qlora reads it"
        draft.needless({key: idle for key in draft.said if key.startswith("lora_") and key != "lora_model_dir"})
    shared.quantised(draft)


def _targets(draft: Draft) -> None:
    targets = draft.get("lora_target_modules")
    if draft.get("lora_target_linear") is True:
        draft.put("adapter.targets", "all-linear", "lora_target_linear")
        draft.needless({"lora_target_modules": "lora_target_linear names all of them"} if targets else {})
    elif targets:
        draft.put("adapter.targets", targets, "lora_target_modules")
    draft.lost({"lora_target_linear": "give adapter.targets", "lora_target_modules": "give adapter.targets"})


def _memory(draft: Draft) -> None:
    asked: Any = draft.get("gradient_checkpointing")
    if asked is not None:
        draft.put("memory.recompute", "none" if asked is False else "full", "gradient_checkpointing")
        if asked in ("offload", "offload_disk"):
            draft.put("memory.offload_activations", True, "gradient_checkpointing")
    if draft.get("activation_offloading"):
        draft.put("memory.offload_activations", True, "activation_offloading")


def _when(draft: Draft) -> None:
    valid = bool(draft.recipe["data"].get("valid") or draft.recipe["data"].get("held_out"))
    for key, node in {"evals_per_epoch": "evaluate", "saves_per_epoch": "checkpoint"}.items():
        times = draft.get(key)
        if node == "evaluate" and times and not valid:
            draft.needless({key: "there are no validation rows"})
        elif isinstance(times, int) and times > 0:
            draft.put(f"{node}.per_epoch", times, key)
        elif times is not None:
            draft.lost({key: f"give {node}.every"})


def _logs(draft: Draft) -> None:
    made: list[dict[str, Any]] = []
    tools = {
        "wandb": {"wandb_project": "project", "wandb_name": "name", "wandb_run_id": "", "wandb_entity": "entity"},
        "mlflow": {"mlflow_experiment_name": "project", "mlflow_run_name": "name", "mlflow_tracking_uri": "uri"},
        "comet": {"comet_project_name": "project", "comet_workspace": "workspace"},
        "trackio": {"trackio_project_name": "project", "trackio_run_name": "name"},
    }
    for tool, names in tools.items():
        first = next(iter(names))
        if draft.get(first) or draft.get(f"use_{tool}") is True:
            given = {ours: draft.get(theirs) for theirs, ours in names.items() if ours and draft.get(theirs)}
            made.append({"kind": tool, **given})
            for key in (*(k for k, ours in names.items() if ours and draft.get(k)), f"use_{tool}"):
                if draft.get(key):
                    draft.tell("taken", key, "log")
        draft.needless({key: f"nothing turns {tool} on" for key in names})
    if draft.get("use_tensorboard") is True:
        draft.put("log", [{"kind": "tensorboard"}], "use_tensorboard")
    if made:
        draft.recipe["log"] = [*draft.recipe.get("log", []), *made]

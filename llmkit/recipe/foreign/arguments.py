"""What the tools around transformers' Trainer share: optimizers, schedules, batches, precision, saving, logs."""

from __future__ import annotations

from typing import Any

from llmkit.recipe.foreign.draft import Draft

OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw": "adamw",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "lion": "lion",
    "lion_32bit": "lion",
    "muon": "muon",
    "schedule_free_adamw": "schedule_free",
    "sgd": "sgd",
}
SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "warmup_stable_decay": "wsd",
}
ATTENTION = {
    "flash_attention_2": "flash",
    "fa2": "flash",
    "flash_attention_3": "flash",
    "sdpa": "sdpa",
    "eager": "eager",
    "flex_attention": "flex",
    "auto": "auto",
    "disabled": "eager",
}
ADAM = {"weight_decay": "weight_decay", "adam_beta1": "beta1", "adam_beta2": "beta2", "adam_epsilon": "eps"}
NEEDLESS = {
    "do_train": "a run trains",
    "do_eval": "data.valid is evaluated where there is one",
    "logging_steps": "every step is logged",
    "logging_strategy": "every step is logged",
    "logging_first_step": "every step is logged",
    "log_level": "the run log holds everything",
    "overwrite_output_dir": "a run goes on where it stopped; another recipe in its folder is refused",
    "remove_unused_columns": "columns that no row format reads are left out",
    "ddp_timeout": "is no matter of the recipe",
    "save_only_model": "checkpoints hold what exact resume needs; model/ holds the model alone",
    "save_safetensors": "nothing else is ever written",
    "dataloader_num_workers": "rows are tokenised once, into a cache",
    "dataloader_pin_memory": "rows are tokenised once, into a cache",
    "dataloader_prefetch_factor": "rows are tokenised once, into a cache",
    "dataset_num_proc": "rows are tokenised once, into a cache",
    "preprocessing_num_workers": "rows are tokenised once, into a cache",
    "overwrite_cache": "the cache is keyed by what it is made from",
    "gradient_checkpointing_kwargs": "recompute is never reentrant",
    "use_reentrant_gc": "recompute is never reentrant",
    "per_device_eval_batch_size": "evaluation sizes its own forwards",
    "average_tokens_across_devices": "a step's loss is always the mean over all of its tokens",
    "include_tokens_per_second": "every step's speed is logged",
    "use_liger_kernel": "the head never makes all logits, and the fused kernels are always on",
    "enable_liger_kernel": "the head never makes all logits, and the fused kernels are always on",
    "plot_loss": "report.html has the curves",
    "disable_tqdm": "progress goes to standard error",
    "ddp_find_unused_parameters": "is no matter of the recipe",
    "group_by_modality_length": "rows hold text alone",
}
LOST = {
    "deepspeed": "more than one rank comes later: parallel.strategy",
    "fsdp": "more than one rank comes later: parallel.strategy",
    "fsdp_config": "more than one rank comes later: parallel.strategy",
    "ray_num_workers": "more than one rank comes later: parallel.strategy",
    "torch_compile": "what is worth compiling is compiled already",
    "resume_from_checkpoint": "give it on the command line: llmkit run --resume FOLDER",
    "trust_remote_code": "grant it on the command line: llmkit run --allow-code",
    "auto_find_batch_size": "micro_batch: auto asks the memory account instead",
}


def optimizer(draft: Draft, key: str, rate: float, default: str = "adamw") -> None:
    """The kind of optimizer with its rate (`rate` where nothing is said there), betas and decay."""
    name, keys = str(draft.get(key, "adamw_torch")), draft.given(key)
    if name in OPTIMIZERS:
        draft.put("optim.kind", OPTIMIZERS[name], *keys)
    else:
        draft.put("optim.kind", default)
        draft.tell("lost", key, f"{name} has no counterpart; optim.kind is {default} until you choose")
    if OPTIMIZERS.get(name) == "adafactor":
        what = "optim.lr is relative to the size of each weight here, and absolute there: choose it"
        draft.tell("changed", "learning_rate", what)
    else:
        draft.put("optim.lr", draft.get("learning_rate", rate), *draft.given("learning_rate"))
    draft.rename({"max_grad_norm": "optim.clip"})
    adam = OPTIMIZERS.get(name, default) in ("adamw", "adamw_8bit", "paged_adamw_8bit")
    for theirs, ours in ADAM.items():
        if draft.get(theirs) is not None and (adam or ours == "weight_decay"):
            draft.put(f"optim.{ours}", draft.get(theirs), theirs)
    draft.lost({"optim_args": "give the optimizer's own keys under optim", "optim_target_modules": "see optim.groups"})


def schedule(draft: Draft, key: str, default: str) -> None:
    """The schedule with its warm-up."""
    name = str(draft.get(key, default))
    if name not in SCHEDULES:
        draft.put("schedule.kind", default)
        draft.tell("lost", key, f"{name} has no counterpart; schedule.kind is {default} until you choose")
    else:
        draft.put("schedule.kind", SCHEDULES[name], *draft.given(key))
    _warmup(draft, name)
    more, rate = draft.get("lr_scheduler_kwargs", {}), draft.get("learning_rate")
    if len(more) == 1 and name.startswith("cosine") and "min_lr_rate" in more:
        draft.put("schedule.floor", more["min_lr_rate"], "lr_scheduler_kwargs")
    elif len(more) == 1 and name.startswith("cosine") and "min_lr" in more and rate:
        draft.put("schedule.floor", float(more["min_lr"]) / float(rate), "lr_scheduler_kwargs")
    draft.lost({"lr_scheduler_kwargs": "give the schedule's own keys, such as schedule.floor"})


def _warmup(draft: Draft, name: str) -> None:
    """Steps count before a share where both are said, and 0 steps say nothing."""
    if name == "constant":
        draft.needless({"warmup_steps": "constant has none there", "warmup_ratio": "constant has none there"})
        return
    said = [key for key in ("warmup_steps", "warmup_ratio") if draft.get(key)]
    zero = [key for key in ("warmup_steps", "warmup_ratio") if draft.get(key) == 0]
    if said or zero or draft.tool != "axolotl":
        draft.put("schedule.warmup", draft.get(said[0]) if said else 0, *said[:1])
    else:
        draft.put("schedule.warmup", 0.03)
        draft.tell("changed", "warmup_ratio", "schedule.warmup: 3 % of the run, which stops at 100 steps there")
    draft.needless({key: f"{said[0]} is what counts" for key in said[1:]})
    draft.needless(dict.fromkeys(zero, "is none"))


def length(draft: Draft, key: str, default: int) -> None:
    """Epochs or steps; of the two, steps are what counts."""
    steps, epochs = draft.get("max_steps", -1), draft.get(key)
    if isinstance(steps, int) and steps > 0:
        draft.put("steps", steps, "max_steps")
        draft.needless({key: "max_steps is what counts"})
        return
    if draft.get("max_steps") is not None:
        draft.tell("needless", "max_steps", "is turned off")
    epochs = default if epochs is None else epochs
    if float(epochs) == int(epochs) and epochs >= 1:
        draft.put("epochs", int(epochs), *draft.given(key))
    else:
        draft.tell("lost", key, "an epoch is a whole pass: give steps")


def batch(draft: Draft, key: str, size: int, packed: int) -> None:
    """What one step of one process sees; of packed rows (of `packed` tokens) the tokens are what counts."""
    micro, times = draft.get(key, size), draft.get("gradient_accumulation_steps", 1)
    keys = [name for name in (key, "gradient_accumulation_steps") if draft.get(name) is not None]
    each = "of one process: multiply it by the number of your GPUs"
    if not isinstance(micro, int) or not isinstance(times, int):
        draft.tell("lost", key, "give batch.rows")
        return
    if packed:
        draft.put("batch.tokens", micro * times * packed, *keys, changed=f"batch.tokens: full packed rows {each}")
    else:
        draft.put("batch.rows", micro * times, *keys, changed=f"batch.rows: {each}")


def attention(draft: Draft, key: str) -> None:
    """The attention kernel."""
    name = draft.get(key)
    if name is None:
        return
    if name in ATTENTION:
        draft.put("model.attention", ATTENTION[name], key)
    else:
        draft.tell("lost", key, "use one of auto, sdpa, flash, flex, eager")


def precision(draft: Draft, weights: Any, full: bool) -> None:
    """The precision; weights that are all trained and loaded in bf16 are held in it."""
    half, held = draft.get("bf16"), str(weights).removeprefix("torch.")
    if draft.get("fp16") in (True, "auto"):
        draft.put("precision", "fp16_mixed", "fp16")
    elif half in (True, "auto", "full"):
        name = "bf16" if full and held in ("bfloat16", "bf16") else "bf16_mixed"
        draft.put("precision", name, "bf16")
    elif half is False or draft.get("fp16") is False:
        draft.put("precision", "fp32", *(k for k in ("bf16", "fp16") if draft.get(k) is not None))
    draft.lost({"fp16": "precision has one value", "bf16": "precision has one value"})
    draft.needless({"tf32": "products of fp32 are at torch's own setting"})


def quantised(draft: Draft) -> None:
    """How the base is held."""
    if draft.get("load_in_4bit") is True:
        draft.put("quant.kind", "bnb_nf4", "load_in_4bit")
    elif draft.get("load_in_8bit") is True:
        draft.put("quant.kind", "bnb_int8", "load_in_8bit")
    draft.lost({"load_in_4bit": "load_in_8bit is what counts", "load_in_8bit": "load_in_4bit is what counts"})
    if draft.get("use_bnb_nested_quant") is not None and draft.get("load_in_4bit"):
        draft.put("quant.double", draft.get("use_bnb_nested_quant"), "use_bnb_nested_quant")


def saving(draft: Draft) -> None:
    """When checkpoints are written and evaluations run."""
    _when(draft, "save_strategy", "save_steps", "checkpoint", 500)
    _when(draft, "eval_strategy", "eval_steps", "evaluate", 0)
    draft.rename({"save_total_limit": "checkpoint.keep"})
    if draft.get("early_stopping_patience") is not None:
        draft.put("evaluate.patience", draft.get("early_stopping_patience"), "early_stopping_patience")
        draft.put("checkpoint.best", "valid.loss")
    if draft.get("load_best_model_at_end") is True:
        metric = draft.get("metric_for_best_model", "loss")
        if metric in ("loss", "eval_loss"):
            draft.put("checkpoint.best", "valid.loss", "load_best_model_at_end")
            draft.needless({"metric_for_best_model": "is checkpoint.best", "greater_is_better": "is checkpoint.best"})
        else:
            draft.tell("lost", "metric_for_best_model", "checkpoint.best takes valid.loss, or a stage's own metric")


def _when(draft: Draft, how: str, steps: str, node: str, default: int) -> None:
    said = str(draft.get(how, "steps" if draft.get(steps) else "no")).lower()
    if said == "epoch":
        draft.put(f"{node}.per_epoch", 1, how)
        draft.needless({steps: f"{how} is epoch"})
    elif said == "steps":
        every = draft.get(steps, default)
        if isinstance(every, int) and every > 0:
            draft.put(f"{node}.every", every, *(k for k in (how, steps) if draft.get(k) is not None))
        else:
            draft.tell("lost", steps, f"a share of a run is no number of steps: give {node}.every or {node}.per_epoch")
    else:
        draft.needless({how: "without it: at the end alone", steps: f"{how} is {said}"})


def loggers(draft: Draft, project: str, name: str) -> None:
    """Where metrics go beside the run's own folder."""
    said = draft.get("report_to")
    asked = [said] if isinstance(said, str) else list(said or [])
    known = {
        "tensorboard": "tensorboard",
        "wandb": "wandb",
        "mlflow": "mlflow",
        "trackio": "trackio",
        "comet_ml": "comet",
    }
    made = [{"kind": known[each]} for each in asked if each in known]
    for log in made if project and draft.get(project) else []:
        if log["kind"] != "tensorboard":
            log["project"] = draft.get(project)
            draft.tell("taken", project, "log")
    for log in made if name and draft.get(name) else []:
        if log["kind"] != "tensorboard":
            log["name"] = draft.get(name)
            draft.tell("taken", name, "log")
    if made:
        draft.put("log", made, "report_to")
    odd = [each for each in asked if each not in (*known, "none", "all")]
    if odd or "all" in asked:
        draft.tell("lost", "report_to", "log takes tensorboard, wandb, mlflow, trackio, comet")
    elif not made:
        draft.needless({"report_to": "metrics.jsonl is always written"})
    if name and draft.get(name) and not made:
        draft.tell("needless", name, "no log takes a name")


def template(draft: Draft, key: str, file: str) -> None:
    """A chat template: one that is written out goes to a file beside the recipe."""
    text = draft.get(key)
    if text is None:
        return
    if "{%" in text or "{{" in text:
        draft.files[file] = text
        draft.put("model.template", file, key)
    else:
        draft.put("model.template", text, key)


def hub(draft: Draft) -> None:
    """A push of the result; never by itself."""
    repo = str(draft.get("hub_model_id", ""))
    if draft.get("push_to_hub") is True and "/" in repo:
        draft.put("push.repo", draft.get("hub_model_id"), "hub_model_id", "push_to_hub")
        if draft.get("hub_private_repo") is not None:
            draft.put("push.private", draft.get("hub_private_repo"), "hub_private_repo")
        draft.needless({"hub_strategy": "the result is pushed at the end", "hub_model_revision": "is the newest"})
    else:
        draft.lost({"push_to_hub": "give push: {repo: OWNER/NAME}"})
        draft.needless({"hub_model_id": "nothing is pushed", "hub_strategy": "nothing is pushed"})


def held_out(draft: Draft, key: str, share: Any) -> None:
    """Training rows that validate: a share of them; how many of them nobody can say before they are read."""
    if not share:
        draft.needless({key: "is turned off"})
    elif 0 < float(share) < 1:
        draft.put("data.held_out", share, key)
    else:
        draft.tell("lost", key, f"{share} rows are no share of them: give data.held_out as one")

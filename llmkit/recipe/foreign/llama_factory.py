"""LLaMA-Factory's configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmkit.core.errors import RecipeError
from llmkit.recipe.foreign import arguments as shared
from llmkit.recipe.foreign.draft import Draft
from llmkit.recipe.foreign.sources import source

STAGES = {"rm": "reward", "dpo": "preference", "kto": "preference", "ppo": "ppo"}
NEEDLESS = {
    "dataset_dir": "names the folder of dataset_info.json",
    "use_fast_tokenizer": "is always so",
    "tokenized_path": "rows are tokenised once, into a cache",
    "eval_on_each_dataset": "evaluation is over data.valid",
    "upcast_layernorm": "norms compute in fp32",
    "image_max_pixels": "rows hold text alone",
    "video_max_pixels": "rows hold text alone",
    "lora_bias": "adapters train no bias",
    "use_unsloth": "LoRA's linears are fused",
    "quantization_method": "is bitsandbytes",
    "include_num_input_tokens_seen": "tokens are counted",
}
LOST = {
    "adapter_name_or_path": "training goes on from a whole model: llmkit merge it first, and give the result as model",
    "template": "the tokenizer's own is used; give another as a file: model.template",
    "enable_thinking": "see data.train_reasoning",
    "rope_scaling": "give model.rope with its factor: {kind: yarn, factor: 4.0}",
    "shift_attn": "S2 attention is not there",
    "mixture_of_depths": "mixture of depths is not there",
    "use_llama_pro": "block expansion is not there",
    "use_badam": "BAdam is not there",
    "use_adam_mini": "Adam-mini is not there: adamw_8bit holds a quarter of the state",
    "freeze_trainable_layers": "give adapter.train as globs over parameter names, such as model.layers.31.*",
    "freeze_trainable_modules": "give adapter.train as globs over parameter names",
    "freeze_extra_modules": "give adapter.train as globs over parameter names",
    "use_asft_loss": "ASFT is not there",
    "asft_alpha": "ASFT is not there",
    "use_eaft_loss": "EAFT is not there",
    "mix_strategy": "give each source its weight",
    "interleave_probs": "give each source its weight",
    "predict_with_generate": "give a stage of kind evaluate",
    "compute_accuracy": "give a stage of kind evaluate",
    "do_predict": "give a stage of kind evaluate",
    "fp8": "see precision",
    "fp8_backend": "see precision",
    "additional_target": "give adapter.modules_to_save",
}


def convert(draft: Draft) -> None:
    """Turns the whole of it.

    Raises:
        RecipeError: it is a kind of training that has no stage yet, or no training at all.
    """
    stage = str(draft.get("stage", "sft"))
    if stage in STAGES:
        what = f"{stage} makes it a {STAGES[stage]} stage, which is not available yet in this version"
        raise RecipeError(
            what, fix="import a configuration with stage sft or pt", key="stage", line=draft.lines["stage"]
        )
    if not draft.get("do_train"):
        raise RecipeError("it does not train", fix="import a configuration with do_train: true", key="do_train")
    draft.put("kind", {"pt": "pretrain"}.get(stage, "sft"), *(["stage"] if draft.get("stage") else []))
    draft.rename({"model_name_or_path": "model.name", "model_revision": "model.revision", "output_dir": "out"})
    draft.rename({"seed": "seed", "neftune_noise_alpha": "neftune"})
    shared.attention(draft, "flash_attn")
    _adapter(draft)
    _quantised(draft)
    _data(draft, stage)
    cut = int(draft.get("cutoff_len", 2048))
    shared.batch(draft, "per_device_train_batch_size", 8, cut if draft.recipe["data"]["packing"] != "none" else 0)
    shared.length(draft, "num_train_epochs", 3)
    _optimizer(draft)
    shared.schedule(draft, "lr_scheduler_type", "linear")
    full = draft.recipe["adapter"]["kind"] == "none"
    if draft.get("pure_bf16") is True:
        draft.put("precision", "bf16", "pure_bf16")
        draft.needless({"bf16": "pure_bf16 is what counts"})
    else:
        shared.precision(draft, None, full)  # trained weights are in fp32 there, unless pure_bf16 is said
    off = draft.get("disable_gradient_checkpointing") is True or draft.get("gradient_checkpointing") is False
    keys = [key for key in ("disable_gradient_checkpointing", "gradient_checkpointing") if draft.get(key) is not None]
    draft.put("memory.recompute", "none" if off else "full", *keys)
    if draft.get("use_dft_loss") is True:
        draft.put("loss.kind", "dft", "use_dft_loss")
    shared.saving(draft)
    shared.loggers(draft, "", "run_name")
    shared.hub(draft)
    draft.needless({**NEEDLESS, **shared.NEEDLESS})
    draft.lost({**LOST, **shared.LOST})


def _adapter(draft: Draft) -> None:
    kind = str(draft.get("finetuning_type", "lora"))
    keys = ["finetuning_type"] if draft.get("finetuning_type") else []
    if kind == "lora":
        draft.put("adapter.kind", "lora", *keys)
        draft.put("adapter.rank", draft.get("lora_rank", 8), *draft.given("lora_rank"))
        alpha = draft.get("lora_alpha", 2 * draft.get("lora_rank", 8))  # its own rule where nothing is said
        draft.put("adapter.alpha", alpha, *draft.given("lora_alpha"))
        _targets(draft, "lora_target")
        names = {
            "lora_dropout": "dropout",
            "use_dora": "dora",
            "use_rslora": "rslora",
            "loraplus_lr_ratio": "lora_plus",
        }
        draft.rename({theirs: f"adapter.{ours}" for theirs, ours in names.items()})
        if draft.get("pissa_init") is True:
            draft.put("adapter.init", "pissa", "pissa_init")
            iterations = draft.get("pissa_iter", 16)
            if iterations > 0:
                draft.put("adapter.pissa_niter", iterations, *draft.given("pissa_iter"))
            draft.needless({"pissa_convert": "the saved adapter is one for the original base"})
    elif kind == "oft":
        draft.put("adapter.kind", "oft", *keys)
        draft.rename({"oft_block_size": "adapter.block_size"})
        _targets(draft, "oft_target")
    elif kind == "full":
        draft.put("adapter.kind", "none", *keys)
    else:
        draft.put("adapter.kind", "none")
        draft.tell(
            "lost", "finetuning_type", f"{kind}: say what is trained in adapter.train, such as model.layers.3?.*"
        )
    extra = draft.get("additional_target")
    if extra and kind == "lora":
        draft.put("adapter.modules_to_save", _names(extra), "additional_target")
    for key in ("add_tokens", "add_special_tokens"):
        if draft.get(key):
            draft.put("model.add_tokens", _names(draft.get(key)), key)
    draft.needless({"resize_vocab": "follows from model.add_tokens"})


def _names(given: Any) -> list[str]:
    return [name.strip() for name in given.split(",")] if isinstance(given, str) else list(given)


def _targets(draft: Draft, key: str) -> None:
    names = _names(draft.get(key, "all"))
    draft.put("adapter.targets", "all-linear" if names == ["all"] else names, *draft.given(key))


def _quantised(draft: Draft) -> None:
    bits, method = draft.get("quantization_bit"), draft.get("quantization_method", "bnb")
    if bits in (4, 8) and method in ("bnb", "bitsandbytes"):
        draft.put("quant.kind", "bnb_nf4" if bits == 4 else "bnb_int8", "quantization_bit")
        if draft.get("double_quantization") is not None and bits == 4:
            draft.put("quant.double", draft.get("double_quantization"), "double_quantization")
    else:
        draft.lost({"quantization_bit": f"a base held by {method} in {bits} bits is not there: use quant: bnb_nf4"})
        draft.lost({"quantization_method": "use quant: bnb_nf4"})


def _optimizer(draft: Draft) -> None:
    special = [name for name in ("galore", "apollo", "muon") if draft.get(f"use_{name}") is True]
    shared.optimizer(draft, "optim", 5e-5)
    for name in special:
        draft.put("optim.kind", name, f"use_{name}")
        draft.rename({f"{name}_rank": "optim.rank", f"{name}_scale": "optim.scale"})
        draft.rename({f"{name}_update_interval": "optim.every"})
        draft.needless({f"{name}_target": "matrices alone are projected", f"{name}_scale_type": "is the kind's own"})
        draft.lost({f"{name}_layerwise": "see memory.optimizer_in_backward"})


def _data(draft: Draft, stage: str) -> None:
    known = _data_sets(draft)
    draft.put("data.train", _sources(draft, "dataset", known), *draft.given("dataset"))
    if draft.get("eval_dataset"):
        draft.put("data.valid", _sources(draft, "eval_dataset", known), "eval_dataset")
    shared.held_out(draft, "val_size", draft.get("val_size"))
    draft.put("data.max_length", draft.get("cutoff_len", 2048), *draft.given("cutoff_len"))
    draft.put("data.overflow", "truncate")
    packs = draft.get("packing", draft.get("neat_packing", stage == "pt")) is True
    keys = draft.given("packing", "neat_packing")
    mixed = "data.packing: examples of a row never see each other"
    draft.put("data.packing", "first_fit" if packs else "none", *keys, changed=mixed if packs and keys else "")
    on = "all" if draft.get("train_on_prompt") else "last" if draft.get("mask_history") else "assistant"
    draft.put("data.train_on", on, *draft.given("train_on_prompt", "mask_history"))
    if stage == "pt":
        del draft.recipe["data"]["train_on"], draft.recipe["data"]["overflow"]
    draft.rename({"default_system": "data.system", "streaming": "data.streaming"})
    draft.lost({"max_samples": "give each source take: N"} if not draft.recipe["data"]["train"] else {})


def _data_sets(draft: Draft) -> dict[str, Any]:
    """What its table of data sets says, where it is at hand."""
    folder = str(draft.get("dataset_dir", "data"))
    for place in (draft.folder / folder, Path(folder), *(parent / "data" for parent in draft.folder.resolve().parents)):
        path = place / "dataset_info.json"
        if path.is_file():
            try:
                said = json.loads(path.read_text("utf-8"))
            except ValueError as cause:
                raise RecipeError(f"is not JSON ({cause})", fix="mend it", file=str(path)) from cause
            return {name: {**row, "folder": place} for name, row in said.items()}
    return {}


def _sources(draft: Draft, key: str, known: dict[str, Any]) -> list[dict[str, Any]]:
    made = []
    for name in _names(draft.get(key, [])):
        if name not in known:
            draft.tell("lost", f"{key}.{name}", "is a name in dataset_info.json, which is not at hand: give the source")
            continue
        made.append(_source(draft, f"{key}.{name}", known[name]))
    if draft.get("max_samples") is not None:
        made = [{**row, "take": draft.get("max_samples")} for row in made]
        if made:
            draft.tell("taken", "max_samples", "take")
    return made


def _source(draft: Draft, place: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row of its table: where the data are, and what their columns are called."""
    if row.get("ranking"):
        draft.tell("lost", place, "holds preferences: no rows for supervised training")
    if row.get("file_name"):
        made = source(str(row["folder"] / row["file_name"]))
    else:
        named = row.get("hf_hub_url") or row.get("ms_hub_url") or ""
        made = source(str(named), row.get("subset"), row.get("split"))
    columns, tags = dict(row.get("columns") or {}), dict(row.get("tags") or {})
    made |= _columns(draft, place, columns, str(row.get("formatting", "alpaca")))
    sharegpt = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}
    openai = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    if any(tags.get(key, value) not in (value, openai[key]) for key, value in sharegpt.items()):
        draft.tell("lost", f"{place}.tags", "turns are role + content, or from + value")
    return made


def _columns(draft: Draft, place: str, columns: dict[str, str], form: str) -> dict[str, Any]:
    if form == "sharegpt":
        name = columns.pop("messages", "conversations")
        made = {} if name in ("conversations", "messages") else {"messages": name}
        made |= {"tools": columns.pop("tools")} if columns.get("tools", "tools") != "tools" else {}
        return _left(draft, place, columns, made, ("tools", "system"))
    prompt, query, response = (columns.pop(key, name) for key, name in ALPACA.items())
    if prompt == "text" and not query and not response:
        return _left(draft, place, columns, {}, ())
    plain = (prompt, response) == ("instruction", "output")
    made = {} if plain else {"prompt": prompt, "completion": response}
    if not plain and query not in ("input", None, ""):
        draft.tell("lost", f"{place}.columns.query", f"prompt is {prompt} alone: put {query} into it")
    return _left(draft, place, columns, made, ("system", "history"))


ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}


def _left(
    draft: Draft, place: str, columns: dict[str, str], made: dict[str, str], passed: tuple[str, ...]
) -> dict[str, Any]:
    for key in columns:
        if key not in passed or key == "history":
            draft.tell("lost", f"{place}.columns.{key}", "no row format has it")
    return {"columns": made} if made else {}

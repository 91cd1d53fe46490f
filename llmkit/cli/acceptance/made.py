"""Recipes for a proof: those made on the spot, with a model of random weights, or the user's own, cut short."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkit.cli.acceptance.trials import Kit
from llmkit.cli.prove import short
from llmkit.core.errors import RecipeError
from llmkit.core.files import ensure, write_json
from llmkit.recipe.load import load_recipe
from llmkit.stages.training import Training

ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8}
TINY |= {"num_key_value_heads": 4, "vocab_size": 320, "max_position_embeddings": 512, "tie_word_embeddings": True}
SPEED = {
    "cpu": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    | {"num_key_value_heads": 4, "vocab_size": 8192, "max_position_embeddings": 512, "tie_word_embeddings": True},
    "cuda": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 16}
    | {"num_key_value_heads": 8, "vocab_size": 32768, "max_position_embeddings": 4096, "tie_word_embeddings": True},
}
"""Large enough that a step is work and not waiting: 33 million parameters on CPUs, 0.8 billion on GPUs."""
LENGTH = {"cpu": 256, "cuda": 4096}
STEPS = {"cpu": 6, "cuda": 16}
ROWS = {"cpu": 2, "cuda": 8}
"""Of a rank, two in a micro-batch: what is sent hides behind the last one alone."""
LEFT_OUT = 2
"""Steps at the beginning, in which memory is found and kernels are chosen."""
LONG = (80, 5)
"""Steps of a run that is struck, and after how many it saves; of the user's recipe `LONG_OWN`."""
LONG_OWN = (12, 3)


def prepare(kit: Kit) -> None:
    """Models, rows and recipes, once for all ranks."""
    kit.main(lambda: _prepare(kit))


def words(kit: Kit, kind: str, more: Sequence[str], out: str) -> list[str]:
    """The command line of a run: `kind` is tiny or speed."""
    path = kit.recipe or kit.work / f"{kind}.yaml"
    return ["run", str(path), *kit.overrides, *short(node(kit, kind), None), *more, f"out={kit.work / out}"]


def node(kit: Kit, kind: str, more: Sequence[str] = ()) -> Training:
    """The stage of a recipe.

    Raises:
        RecipeError: it is not one stage that trains.
    """
    path = str(kit.recipe or kit.work / f"{kind}.yaml")
    stages = load_recipe(path, [*kit.overrides, *(["epochs=null", *more] if more else [])]).stages
    found = stages[0][1]
    if len(stages) > 1 or not isinstance(found, Training):
        raise RecipeError("one stage that trains is what can be proved", fix="give its recipe", file=path)
    return found


def _prepare(kit: Kit) -> None:
    ensure(kit.work)
    if kit.recipe is not None:
        node(kit, "tiny")
        return
    length, world = LENGTH[kit.device], kit.world
    _model(kit.work / "tiny", TINY)
    _model(kit.work / "speed", SPEED[kit.device])
    asked = [("hello world " * (1 + i % 5) + str(i), "the lazy dog " * (1 + i % 3)) for i in range(max(48, 4 * world))]
    _rows(kit.work / "tiny.jsonl", asked)
    _rows(kit.work / "speed.jsonl", [("hello", "the quick brown fox " * (length // 4))] * (ROWS[kit.device] * world))
    tiny = {"batch": {"rows": max(12, 4 * world)}, "micro_batch": 1, "precision": "fp32"}
    # clipping would take a factor out of gradients that are wrong by one
    tiny |= {"optim": {"kind": "sgd", "lr": 0.05, "momentum": 0.0, "clip": 0.0}, "steps": 3}
    _recipe(kit.work, "tiny", 64, tiny)
    speed = {"batch": {"rows": ROWS[kit.device] * world}, "micro_batch": 2, "optim": {"kind": "adamw", "lr": 1e-5}}
    _recipe(kit.work, "speed", length, speed | {"steps": STEPS[kit.device]})


def _recipe(work: Path, name: str, length: int, more: dict[str, Any]) -> None:
    data = {"train": [{"kind": "jsonl", "path": str(work / f"{name}.jsonl")}], "max_length": length}
    said = {"kind": "sft", "model": str(work / name), "adapter": {"kind": "none"}, "out": str(work / "out")}
    said |= {"data": data | {"overflow": "truncate"}, "schedule": {"kind": "constant"}, "guard": {"spike": 0.0}}
    write_json(work / f"{name}.yaml", said | more)  # YAML holds JSON


def _rows(path: Path, asked: Sequence[tuple[str, str]]) -> None:
    path.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in asked))


def _model(folder: Path, sizes: dict[str, Any]) -> None:
    """A Llama of random weights, whose tokens are bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = {token: index for index, token in enumerate([*special, *alphabet])}
    made = Tokenizer(models.BPE(vocab=known, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**sizes, **ENDS)).save_pretrained(folder)

"""What must hold of every method on every family: one check, for the matrices of the tests beside this."""

import copy
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
import transformers as hf
from peft import PeftModel

from llmkit.adapters.method import Around
from llmkit.build.opening import load
from llmkit.data.batches import micro_batches
from llmkit.data.node import FirstFit, NoPacking
from llmkit.data.prepare import Prepared
from llmkit.models.export import export
from llmkit.models.heads import Scored
from llmkit.models.load import How, quiet
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve
from llmkit.models.wrappers import towers
from tests.conftest import make_tokenizer

SIZES = {"vocab_size": 448, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EXPERTS = {"num_experts_per_tok": 2, "tie_word_embeddings": False}
FAMILIES = {
    "llama": (hf.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen3": (hf.Qwen3Config, {"tie_word_embeddings": False}),
    "gemma3": (hf.Gemma3TextConfig, {"sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gemma2": (hf.Gemma2Config, {"sliding_window": 16, "query_pre_attn_scalar": 8}),
    "phi3": (hf.Phi3Config, {"tie_word_embeddings": False}),
    "mixtral": (hf.MixtralConfig, {"num_local_experts": 4, **EXPERTS}),
    "qwen3_moe": (hf.Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 16, **EXPERTS}),
}
SHARED = {"moe_intermediate_size": 16, **EXPERTS}
SHARED_EXPERTS = {
    "qwen2_moe": (hf.Qwen2MoeConfig, {"num_experts": 4, "shared_expert_intermediate_size": 24, **SHARED}),
    "glm4_moe": (hf.Glm4MoeConfig, {"n_routed_experts": 4, "first_k_dense_replace": 1, **SHARED}),
}
"""Families with linears beside their experts."""
IDS = torch.tensor([[5, 77, 301, 8, 260, 19, 33, 120, 7, 64, 201]])


@cache
def folder(family):
    """A tiny model of the family with a tokenizer, made once: do not write into it."""
    made = Path(mkdtemp()) / family
    config, more = (FAMILIES | SHARED_EXPERTS)[family]
    torch.manual_seed(0)
    with quiet():
        model = hf.AutoModelForCausalLM.from_config(config(**(SIZES | more)))
        model.save_pretrained(made)
    make_tokenizer().save_pretrained(made)
    return made


def opened(path, **how):
    """Ours: a base, or an adapter on its base."""
    ref = ModelRef(name=str(path))
    return load(resolve(ref), ref, How(**how))


def in_peft(path, family):
    """An adapter in plain peft, on the base as transformers loads it."""
    with quiet():
        return PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(folder(family)), path).eval()


def logits(model, ids=IDS):
    with torch.no_grad():  # of the tokens themselves, where others stand before them
        return model.eval()(input_ids=ids, use_cache=False).logits[:, -ids.shape[1] :]


def near(a, b, tol=1e-6):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tol * b.abs().max(), float((a - b).abs().max() / b.abs().max())


def batches(packed=True, rows=4):
    """Micro-batches of a few short rows, packed or padded."""
    lengths = [5, 9, 7, 12][:rows]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = (np.arange(starts[-1], dtype=np.int32) * 37 + 11) % 380 + 5
    prepared = Prepared(ids, np.ones(len(ids), dtype=np.float32), starts, ())
    packing = FirstFit() if packed else NoPacking()
    return micro_batches(prepared, tuple(range(len(lengths))), packing, 32, 2, True, "cpu")


def two_steps(model, given, lr=1e-2):
    """Trains what is trainable for two steps of AdamW."""
    scored, params = Scored(model), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr)
    model.train()
    for _ in range(2):
        for batch in given:
            (-scored(batch).sum() / 30).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def linears(family):
    """(name, in, out) of each linear but the head, as the model has them."""
    with torch.device("meta"):
        config, more = (FAMILIES | SHARED_EXPERTS)[family]
        model = hf.AutoModelForCausalLM.from_config(config(**(SIZES | more)))
    head = model.get_output_embeddings()
    parts = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return [(name, m.in_features, m.out_features) for name, m in parts]


def check(
    node, family, tmp_path, count, starts=True, packed=True, merges=True, plain=True, tol=2e-6, moves=1e-4, **around
):
    """The properties of a method: `count` trained parameters; the base's logits at the start (`starts`: or what it says
    of (before, after)); base weights untouched bit for bit; saved and loaded, by us and in plain peft, with the same
    logits; merged (`merges`) with the same to 1e-6. Gives the trained model as it is before it is saved."""
    loaded = opened(folder(family))
    before = logits(loaded.model)
    held = dict(loaded.model.named_parameters())
    kept = {name: p.detach().clone() for name, p in held.items()}
    torch.manual_seed(0)
    model = node.attach(loaded.model, Around(towers(loaded.model), loaded.tokenizer, **around))
    given = batches(packed)
    node.prepare(model, iter(given), Scored(model).hidden)
    if callable(starts):
        starts(before, logits(model))
    else:
        near(logits(model), before, tol)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    two_steps(model, given)
    for name, p in kept.items():
        assert torch.equal(held[name], p), f"{name} of the base was changed"
    after = logits(model)
    assert (after - before).abs().max() > moves * before.abs().max()  # the control: two steps changed something
    trained = copy.deepcopy(model)
    node.finish(model)
    near(logits(model), after, tol)
    export(model, loaded.tokenizer, tmp_path / "model", loaded.resolved)
    ours = opened(tmp_path / "model").model
    near(logits(ours), after, tol)
    if plain:
        near(logits(in_peft(tmp_path / "model", family)), after, 1e-5)
    if merges:
        whole = ours.merge_and_unload()
        near(logits(whole), after, tol)
        export(whole, loaded.tokenizer, tmp_path / "whole", loaded.resolved)
        near(logits(opened(tmp_path / "whole").model), after, tol)  # no weight shared that is no longer the same
    return trained


def lora_count(family, rank, only=lambda name: True):
    """Parameters of a LoRA on linears."""
    return sum(rank * (i + o) for name, i, o in linears(family) if only(name))


__all__ = ["FAMILIES", "batches", "check", "folder", "in_peft", "linears", "logits", "lora_count", "near"]

"""A model cut over ranks gives what the whole one gives."""

import json

import pytest
import torch
import transformers as hf

from llmkit import run
from llmkit.core.errors import LlmkitError
from llmkit.core.ranks import ranks
from llmkit.parallel.group import joined
from llmkit.parallel.tensor import Place, cut
from tests.adapters.properties import FAMILIES, folder, logits, opened
from tests.distributed import QUIET, ended, equal, launched, lines, sft, together, trained, weights

FULL = {"kind": "none"}
LORA = {"kind": "lora", "rank": 4}
KINDS = pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])
EVAL = {"every": 2, "samples": 1, "max_tokens": 4}


def both(world, model, rows, tmp_path, tensor=None, **more):
    """The folders of a run cut over ranks, and of one process."""

    def make(out, **parallel):
        return sft(model, rows, out, **(more | parallel))

    split = {"tensor": tensor or world}
    cut = trained(world, lambda out: make(out, parallel=split), tmp_path, "cut")
    return cut, trained(1, make, tmp_path, "whole")


def tiny_of(config, tmp_path, **sizes):
    """A tiny model of a configuration, with the tokenizer of the others."""
    base = {"vocab_size": 448, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    base |= {"num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config(**(base | sizes)))
    for name, p in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at 0, where adding one twice shows nothing
            torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(tmp_path / "model")
    from tests.conftest import make_tokenizer

    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def layer(model, path):
    return model.get_submodule(f"model.layers.0.{path}")


@pytest.mark.parametrize("world", [2, 4])
def test_logits_equal_the_whole_model(world, tmp_path):
    """Of every family; with 4 ranks there are fewer key-value heads than ranks."""
    wholes = {family: opened(folder(family)).model for family in FAMILIES}
    before = {family: logits(model) for family, model in wholes.items()}
    held = {family: sum(p.numel() for p in model.model.layers.parameters()) for family, model in wholes.items()}

    def work(rank):
        with joined(ranks(), "cpu"):
            place = Place(rank, world, torch.distributed.group.WORLD)
            for family, model in wholes.items():
                layout = cut(model, model._tp_plan, place)
                assert not layout.whole, layout.whole
                assert sum(p.numel() for p in model.model.layers.parameters()) < held[family] * (1 / world + 0.1)
                gap = (logits(model) - before[family]).abs().max() / before[family].abs().max()
                assert gap < 1e-5, (family, gap)
                if rank == world - 1:  # the control: every part is used
                    layer(model, "self_attn.o_proj").weight.data.mul_(2.0)
                assert (logits(model) - before[family]).abs().max() > 1e-4 * before[family].abs().max()

    together(world, work, tmp_path)


@KINDS
@pytest.mark.parametrize("world", [2, 4])
def test_training_equals_one_process(world, adapter, tiny, rows, tmp_path):
    split, whole = both(world, tiny, rows, tmp_path, adapter=adapter)
    equal(split, whole)
    assert lines(whole)[0]["loss"] != lines(whole)[2]["loss"]  # the control: it learns


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_equal_one_process(family, world, adapter, rows, tmp_path):
    optim = {"kind": "sgd", "lr": 0.1, "momentum": 0.0}  # at more, a step of LoRA grows what rounding left tenfold
    equal(*both(world, folder(family), rows, tmp_path, adapter=adapter, optim=optim))


@KINDS
def test_replicas_of_cut_models(adapter, tiny, rows, tmp_path):
    equal(*both(4, tiny, rows, tmp_path, tensor=2, adapter=adapter))

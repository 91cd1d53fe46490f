"""A model whose layers are still in their files is the model that is read whole, in everything but memory."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmkit.models.layers import layers
from llmkit.models.node import Nf4
from llmkit.models.safe import check_folder
from llmkit.models.unread import unread
from tests.adapters.properties import FAMILIES, SHARED_EXPERTS, folder, logits, opened
from tests.conftest import make_model, make_tokenizer

EVERY = [*FAMILIES, *SHARED_EXPERTS]


def same(ours, theirs):
    """Two models that are alike to the bit: weights, buffers, modules, settings."""
    for kind in ("named_parameters", "named_buffers"):
        mine, other = dict(getattr(ours, kind)()), dict(getattr(theirs, kind)())
        assert mine.keys() == other.keys()
        for name, tensor in other.items():
            assert mine[name].dtype == tensor.dtype, name
            assert mine[name].requires_grad == tensor.requires_grad, name
            assert torch.equal(mine[name], tensor), name
    assert [(n, type(m)) for n, m in ours.named_modules()] == [(n, type(m)) for n, m in theirs.named_modules()]
    for key in ("config", "generation_config"):
        assert getattr(ours, key).to_dict() == getattr(theirs, key).to_dict()
    assert ours.name_or_path == theirs.name_or_path == ours.config.name_or_path
    hooks = [[(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in one.modules()] for one in (ours, theirs)]
    assert hooks[0] == hooks[1]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", EVERY)
def test_all_is_as_read_whole(family, dtype):
    whole, ours = opened(folder(family), dtype=dtype), opened(folder(family), dtype=dtype, deferred=True)
    assert ours.support == whole.support
    matrices = [p for layer in layers(ours.model) for p in layer.parameters() if p.dim() > 1]
    assert len(ours.deferred) == len(matrices) > 0
    assert all(p.untyped_storage().nbytes() <= 4 and not p.any() for p in matrices)  # the control: nothing is there
    with ours.deferred.running():
        assert torch.equal(logits(ours.model), logits(whole.model))
    assert not any(p.any() for p in matrices)
    ours.deferred.fill(ours.model)
    assert not len(ours.deferred)
    same(ours.model, whole.model)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_quantised_base_is_as_read_whole(family, double):
    quant = Nf4(double=double)
    whole, ours = opened(folder(family), quant=quant).model, opened(folder(family), quant=quant, deferred=True)
    weights = [p for layer in layers(ours.model) for p in layer.parameters() if p.dim() > 1]
    assert len(ours.deferred) == len(weights) and all(p.numel() == 32 for p in weights)  # the control
    with ours.deferred.running():
        assert torch.equal(logits(ours.model), logits(whole))
    ours.deferred.fill(ours.model)
    same(ours.model, whole)
    for (name, p), other in zip(ours.model.named_parameters(), whole.parameters(), strict=True):
        if (state := getattr(other, "quant_state", None)) is not None:
            mine, theirs = p.quant_state.as_dict(), state.as_dict()
            assert all(
                torch.equal(torch.as_tensor(mine[k]), torch.as_tensor(v))
                for k, v in theirs.items()
                if isinstance(v, torch.Tensor)
            ), name


def test_tied_embeddings_stay_tied():
    ours = opened(folder("llama"), deferred=True).model
    assert ours.lm_head.weight is ours.model.embed_tokens.weight and ours.lm_head.weight.any()


def test_a_part_is_read_of_a_weight(tiny):
    """What is cut before it is read comes as that part."""
    whole, ours = opened(tiny).model, opened(tiny, deferred=True)
    weight = ours.model.model.layers[1].mlp.up_proj.weight
    assert ours.deferred.change(weight, lambda held: held[8:16], (8, 32))
    assert weight.shape == (8, 32)
    assert not ours.deferred.change(ours.model.model.norm.weight, lambda held: held, (32,))
    ours.deferred.fill(ours.model.model.layers[1])
    assert torch.equal(weight, whole.model.layers[1].mlp.up_proj.weight[8:16])
    assert not ours.model.model.layers[0].mlp.up_proj.weight.any()  # the control: the other layer was not asked for


def test_weights_in_many_files(tmp_path):
    model = make_model(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    make_tokenizer().save_pretrained(tmp_path / "many")
    index = tmp_path / "many" / "model.safetensors.index.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 3
    ours = opened(tmp_path / "many", deferred=True)
    ours.deferred.fill(ours.model)
    same(ours.model, opened(tmp_path / "many").model)


class Kept(LlamaForCausalLM):
    """A family that holds single weights in another type."""

    _keep_in_fp32_modules_strict = ["down_proj"]
    from_config = classmethod(lambda cls, config, **more: cls._from_config(config, **more))


def test_a_model_that_changes_single_weights_is_read_whole(tiny):
    """The control: transformers' own class is not."""
    config, headers = LlamaConfig.from_pretrained(tiny), check_folder(tiny)
    assert unread(Kept, tiny, config, torch.bfloat16, headers, {}) is None
    assert unread(AutoModelForCausalLM, tiny, config, torch.bfloat16, headers, {}) is not None

"""Where LoRA starts: the factors are peft's or the definition's, and the base is still there under them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.incremental_pca import IncrementalPCA
from torch import nn

from llmkit.adapters.lora import FusedLora
from llmkit.adapters.method import Around
from llmkit.adapters.node import Lora
from llmkit.adapters.starts import components, pissa
from llmkit.core.errors import ModelError
from llmkit.models.attend import install
from llmkit.models.heads import Scored
from llmkit.models.node import Nf4
from llmkit.models.stored import Stored
from tests.adapters.properties import batches, folder, logits, near, opened
from tests.conftest import make_model


def attached(**more):
    torch.manual_seed(0)
    model = make_model()
    install(model, "auto")
    return Lora(rank=4, alpha=8, **more).attach(model)


def q(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_factors_and_gradients_are_those_of_peft(init, rslora):
    ours = attached(init=init, rslora=rslora).train()
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=rslora, target_modules="all-linear", init_lora_weights=init)
    theirs = get_peft_model(make_model(), config).train()
    assert isinstance(q(ours), FusedLora) and q(ours).part(torch.ones(1, 32)) is not None
    ids = torch.arange(3, 30)[None]
    for model in (ours, theirs):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    told = dict(theirs.named_parameters())
    named = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert named.keys() == {n for n, p in told.items() if p.requires_grad}
    for name, p in named.items():
        if init == "pissa":  # signs of singular vectors are free
            torch.testing.assert_close(p.abs(), told[name].abs(), rtol=1e-3, atol=1e-4)
        near(p.grad.norm(), told[name].grad.norm(), 1e-3)
    down, up = (getattr(q(ours), part)["default"].weight for part in ("lora_A", "lora_B"))
    other = [getattr(q(theirs), part)["default"].weight for part in ("lora_A", "lora_B")]
    near(up @ down, other[1] @ other[0], 1e-4)


def test_without_the_adapter_the_base_is_the_base_and_the_start_is_never_trained():
    base = logits(make_model().eval())
    model = attached(init="pissa")
    nn.init.normal_(q(model).lora_B["default"].weight)
    with model.disable_adapter():
        near(logits(model), base, 1e-7)
    assert (logits(model) - base).abs().max() > 1e-3
    model.train()
    assert not any("start" in name for name, p in model.named_parameters() if p.requires_grad)


def test_a_fast_pissa_is_near_the_exact_one():
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(24, 24))[0] for _ in range(2))
    weight = left @ torch.diag(0.7 ** torch.arange(24.0)) @ right
    made = [up @ down for down, up in (pissa(weight, 2.0, 4), pissa(weight, 2.0, 4, niter=16))]
    near(made[1], made[0], 1e-4)
    near(2.0 * made[0], (left[:, :4] * 0.7 ** torch.arange(4.0)) @ right[:4], 1e-5)


@pytest.mark.parametrize("double", [True, False])
def test_loftq_takes_the_largest_part_of_what_nf4_lost(double):
    def made(**more):
        model = opened(folder("qwen3"), quant=Nf4(double=double)).model
        return Lora(rank=4, alpha=8, **more).attach(model, Around(stored=Stored(folder("qwen3"))))

    stored, plain = Stored(folder("qwen3")), logits(opened(folder("qwen3")).model)
    lossy, loft = made(), made(init="loftq")
    layer = q(loft)
    from peft.utils.integrations import dequantize_module_weight

    weight = stored("model.layers.0.self_attn.q_proj.weight")
    lost = weight - dequantize_module_weight(layer.base_layer)
    left = lost - 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    best = torch.linalg.svdvals(lost)[4:].square().sum().sqrt()
    near(left.norm(), best, 1e-4)
    assert left.norm() < 0.9 * lost.norm()
    assert (logits(loft) - plain).norm() < 0.95 * (logits(lossy) - plain).norm()


def test_loftq_over_weights_of_other_names_in_the_files_is_refused():
    with pytest.raises(ModelError, match=r"adapter\.init: the files call no weight nonsense"):
        Stored(folder("qwen3"))("nonsense")


@pytest.mark.parametrize("count", [400, 9])
def test_eva_finds_the_principal_directions_that_peft_finds(count):
    torch.manual_seed(0)
    rows = torch.randn(count, 12) @ torch.diag(torch.linspace(3, 0.2, 12)) @ torch.randn(12, 12) + 5
    found = components(rows, 3)
    theirs = IncrementalPCA(n_components=3).partial_fit(rows)
    torch.testing.assert_close(found.abs(), theirs.components_.abs().float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found @ found.T, torch.eye(3), rtol=1e-5, atol=1e-5)


def test_eva_sees_trained_positions_alone_and_as_many_as_asked():
    model, given = attached(init="eva", eva_tokens=20), batches()
    scored, inputs = Scored(model), []
    layer = q(model)
    hook = layer.register_forward_pre_hook(lambda _, x: inputs.append(x[0][0]))
    Lora(rank=4, alpha=8, init="eva", eva_tokens=20).prepare(model, iter(given), scored.hidden)
    hook.remove()
    rows = torch.cat([x[batch.weights[0] != 0] for x, batch in zip(inputs, given, strict=False)])[:20]
    near(layer.lora_A["default"].weight, components(rows, 4), 1e-5)
    v = model.base_model.model.model.layers[0].self_attn.v_proj
    assert torch.equal(v.lora_A["default"].weight, layer.lora_A["default"].weight)
    assert not layer.lora_B["default"].weight.any()


@pytest.mark.parametrize("init", ["pissa", "olora", "eva"])
def test_a_rank_above_the_directions_of_a_weight_is_an_error(init):
    said = rf"adapter\.rank: {init} takes 17 directions .*k_proj has 16; fix: set adapter.rank=16"
    with pytest.raises(ModelError, match=said):
        Lora(rank=17, init=init).attach(make_model())


def test_starts_are_for_linears():
    with pytest.raises(ModelError, match=r"adapter\.init: pissa starts linears, and model\.embed_tokens is none"):
        Lora(rank=2, init="pissa", targets=("q_proj", "embed_tokens")).attach(make_model())


def test_eva_without_data_enough_is_an_error():
    with pytest.raises(ModelError, match=r"adapter\.init: eva needs more positions than rank 4"):
        Lora(rank=4, init="eva").prepare(attached(init="eva"), iter([]), lambda batch: None)


def test_lora_fa_has_the_gradients_of_lora_but_none_of_a_and_keeps_fewer_inputs():
    ids, kept, grads = torch.arange(3, 300)[None] % 440, [], []
    for more in ({}, {"lora_fa": True}):
        model = attached(**more).train()
        torch.manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.05)
        with model.disable_adapter():
            pass  # switches gradients on again
        held = {}

        def keep(tensor, held=held):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(input_ids=ids, use_cache=False).logits.square().mean()
        loss.backward()
        kept.append(sum(held.values()))
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[1].keys() == {name for name in grads[0] if "lora_B" in name}
    for name, grad in grads[1].items():
        assert torch.equal(grad, grads[0][name])
    assert kept[1] < kept[0]

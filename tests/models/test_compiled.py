"""Models with llmkit's compiled attention against transformers' own in fp64, sequence by sequence."""

import copy

import pytest
import torch
import transformers
from llmkit_kernels.build import lacks

from llmkit.models import compiled
from llmkit.models.attend import install
from llmkit.models.compare import alone, contexted, off, packed_case, tree_case
from llmkit.models.families import SMALL
from llmkit.models.fused import fuse

WIDER = {**SMALL, "hidden_size": 64, "head_dim": 16}
FAMILIES = {
    "Llama": ("LlamaConfig", {}),
    "Qwen3": ("Qwen3Config", {}),
    "Mistral": ("MistralConfig", {"sliding_window": 4}),
    "Gemma-3": ("Gemma3TextConfig", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "OLMo-2": ("Olmo2Config", {}),
}

pytestmark = pytest.mark.skipif(bool(lacks("attention")), reason=lacks("attention"))


def made(family):
    kind, changes = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**WIDER, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("of", [packed_case, tree_case], ids=["packed", "tree"])
def test_a_row_equals_each_sequence_alone(family, of, monkeypatch):
    model, case, calls = made(family), of(), []
    twin = copy.deepcopy(model).double()
    twin.set_attn_implementation("eager")
    logits, grads = alone(twin, case)
    assert install(model, "auto") == "compiled"
    fuse(model)
    true = compiled.packed
    monkeypatch.setattr(compiled, "packed", lambda *given: calls.append(1) or true(*given))
    ours, our_grads = contexted(model, case)
    assert len(calls) == 2  # a layer each
    used = sorted({place for path in case.paths for place in path})
    assert off(ours[used].double(), logits[used]) <= 1e-6
    for name, grad in grads.items():
        # transformers' norms, rotations and softmax compute in fp32 in the twin too
        assert off(our_grads[name].double(), grad) <= 2e-6, name


def test_16_bits_stay_near_fp32():
    model, case = made("Llama"), packed_case()
    install(model, "auto")
    wide = contexted(model, case)[0]
    model.zero_grad()
    half = model.to(torch.bfloat16)
    assert install(half, "auto", half=True) == "compiled"
    narrow = contexted(half, case)[0]
    assert narrow.dtype == torch.bfloat16 and off(narrow.float(), wide) < 0.05


@pytest.mark.parametrize("change,why", [({"head_dim": 8}, "multiple of 16"), ({"soft": 1}, "soft-cap")], ids=str)
def test_what_it_cannot_do_is_reported_as_sdpa(change, why):
    kind, settings = (transformers.Gemma2Config, WIDER) if "soft" in change else (transformers.LlamaConfig, WIDER)
    settings = {**settings, **{k: v for k, v in change.items() if k != "soft"}}
    model = transformers.AutoModelForCausalLM.from_config(kind(**settings))
    assert why in compiled.lacks(model)
    assert install(model, "auto") == "sdpa"

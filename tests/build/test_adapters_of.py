"""What a model's own adapter becomes in the engine."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from llmkit.build.adapters_of import Beside
from llmkit.build.llm import engine_of
from llmkit.build.opening import load
from llmkit.core.errors import ModelError
from llmkit.inference.cache import Cache
from llmkit.inference.node import OwnEngine
from llmkit.inference.request import Request
from llmkit.inference.sampling import Sampling
from llmkit.models.load import How
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve

PROMPT = tuple(range(5, 16))


def folder(tiny, to, config):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(to)
    return to


def opened(path, **beside):
    ref = ModelRef(name=str(path))
    loaded = load(resolve(ref), ref, How())
    return loaded, engine_of(loaded, OwnEngine(cache=Cache(block=4, size="1MiB")), Beside(**beside))


def said(engine, adapter=""):
    engine.add(Request("a", PROMPT, Sampling(max_tokens=8, ignore_eos=True), adapter))
    return [t.id for _ in iter(lambda: engine.idle, True) for event in engine.step() for t in event.tokens]


def own(model, **more):
    """The greedy tokens of transformers and peft."""
    made = model.generate(input_ids=torch.tensor([PROMPT]), max_new_tokens=8, min_new_tokens=8, do_sample=False, **more)
    return made[0, len(PROMPT) :].tolist()


LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
SOFT = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)


@pytest.mark.parametrize("config", [LORA, SOFT], ids=["lora", "prompt_tuning"])
def test_a_model_that_is_an_adapter_takes_others_beside_itself(config, tiny, tmp_path):
    path, other = (
        folder(tiny, tmp_path / "own", config),
        folder(tiny, tmp_path / "other", LoraConfig(r=2, target_modules=["o_proj"])),
    )
    loaded, engine = opened(path, named={"other": other, "again": path})
    first = said(engine)
    assert first == own(loaded.model) == said(engine, "again")
    assert first != said(engine, "other") == own(opened(other)[0].model)
    assert engine.adapters.names == ["again", "other"]


def test_one_that_only_peft_runs_is_served_alone(tiny, tmp_path):
    path = folder(
        tiny, tmp_path / "own", IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    loaded, engine = opened(path)
    assert said(engine) == own(loaded.model)
    with pytest.raises(ModelError, match="is a ia3, of which one at a time is run, over which no other"):
        opened(path, root=tmp_path)


def test_the_engine_of_a_model_in_training_leaves_it_as_it_is(tiny):
    loaded, engine = opened(tiny)
    loaded.model.train()
    before = {name: id(module) for name, module in loaded.model.named_modules()}
    said(engine)
    assert all(module.training for module in loaded.model.modules())
    twins = dict(engine.runner.forward.causal.named_modules())
    assert twins.keys() == before.keys() and not {id(module) for module in twins.values()} & set(before.values())
    with torch.no_grad():
        loaded.model.model.norm.weight.mul_(-1)  # the same parameters
    assert said(engine) == own(loaded.model.eval())

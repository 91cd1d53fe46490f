"""Virtual tokens under our head: as if the same vectors were fed, labels in their places, text token after token."""

import pytest
import torch

from llmkit import Sft
from llmkit.adapters.node import PrefixTuning, PromptTuning, PTuning
from llmkit.core.errors import ModelError, RecipeError
from llmkit.core.types import Batch, Packed, Segment
from llmkit.inference.generate import generate
from llmkit.inference.sampling import Sampling
from llmkit.models.families import tiny
from llmkit.models.heads import Scored
from llmkit.models.virtual import supported
from tests.adapters.properties import folder, near, opened
from tests.conftest import make_model

LENGTHS, WIDTH = (9, 5, 12), 12
DRAWN = torch.Generator().manual_seed(1)
TOKENS, LABELS = (torch.randint(3, 400, (3, WIDTH), generator=DRAWN) for _ in range(2))
WEIGHTS = torch.zeros(3, WIDTH)
for _row, _length in enumerate(LENGTHS):
    WEIGHTS[_row, 1 : _length - 1] = 1.0
BATCH = Batch(TOKENS, torch.arange(WIDTH).repeat(3, 1), LABELS, WEIGHTS, None, (0, 1, 2), LENGTHS)


def adapted(node, family):
    model = opened(folder(family)).model
    torch.manual_seed(0)
    return node.attach(model).eval()


def one_by_one(logits_of):
    """Log-probabilities of the labels, each row alone and without padding."""
    parts = []
    for row, length in enumerate(LENGTHS):
        logps = torch.log_softmax(logits_of(TOKENS[row : row + 1, :length])[0, -length:].float(), -1)
        parts.append(logps.gather(1, LABELS[row, :length, None])[1 : length - 1, 0])
    return torch.cat(parts)


def gradients(values, encoder):
    found = torch.autograd.grad(values.sum(), [p for p in encoder.parameters() if p.requires_grad])
    return torch.cat([grad.flatten() for grad in found])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "phi3"])
@pytest.mark.parametrize("node", [PromptTuning(virtual_tokens=3), PTuning(virtual_tokens=18)], ids=["prompt", "p"])
def test_virtual_tokens_are_as_the_same_vectors_fed_before_the_row(node, family):
    model = adapted(node, family)
    base, encoder = model.get_base_model(), model.prompt_encoder["default"]

    def fed(tokens):
        rows = torch.cat([model.get_prompt(1), base.get_input_embeddings()(tokens)], 1)
        return base(inputs_embeds=rows).logits

    ours, theirs = Scored(model)(BATCH), one_by_one(fed)
    near(ours, theirs)
    near(gradients(ours, encoder), gradients(theirs, encoder), 1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "phi3", "mixtral"])
@pytest.mark.parametrize(
    "node",
    [
        PrefixTuning(virtual_tokens=18, init="random"),
        pytest.param(PrefixTuning(virtual_tokens=3, projection=True, init="random"), marks=pytest.mark.slow),
    ],
    ids=["18", "projection"],
)
def test_a_prefix_is_as_pefts_own_forward_has_it(node, family):
    model = adapted(node, family)
    encoder = model.prompt_encoder["default"]
    ours, theirs = Scored(model)(BATCH), one_by_one(lambda tokens: model(input_ids=tokens).logits)
    near(ours, theirs)
    near(gradients(ours, encoder), gradients(theirs, encoder), 1e-5)


@pytest.mark.parametrize(
    "node",
    [PromptTuning(virtual_tokens=3), PrefixTuning(virtual_tokens=4, init="random"), PTuning(virtual_tokens=3)],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_text_is_made_as_token_after_token_whatever_else_is_asked(node, family):
    loaded, model = opened(folder(family)), adapted(node, family)
    prompts = [TOKENS[row, :length].tolist() for row, length in enumerate(LENGTHS)]
    made = generate(model, loaded.tokenizer, prompts, Sampling(max_tokens=5), batch=4)
    for prompt, completion in zip(prompts, made, strict=True):
        ids = list(prompt)
        for token in completion.token_ids:
            with torch.no_grad():
                assert int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)
    assert any(completion.token_ids for completion in made)


def test_packed_rows_are_refused_and_not_run_wrongly():
    model = adapted(PromptTuning(virtual_tokens=3), "llama")
    packed = Batch(TOKENS, BATCH.positions, LABELS, WEIGHTS, Packed((Segment(0, 0, 12),)), (0,))
    with pytest.raises(ValueError, match="not packed"):
        Scored(model)(packed)
    before = opened(folder("llama")).support
    assert before.packed and not supported(before, model).packed
    assert supported(before, model).reason == "prompt_tuning puts its virtual tokens once before a row"


@pytest.mark.parametrize("node", [PromptTuning(virtual_tokens=3), PTuning(virtual_tokens=3)], ids=["prompt", "p"])
def test_recompute_gives_the_same_gradients(node):
    found = []
    for again in (False, True):
        model = adapted(node, "llama")
        if again:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        found.append(gradients(Scored(model)(BATCH), model.prompt_encoder["default"]))
    assert torch.equal(*found)


def test_a_family_whose_layers_do_not_take_a_prefix_is_refused():
    with pytest.raises(ModelError, match=r"adapter\.kind: DeepseekV3ForCausalLM does not run with prefix_tuning: "):
        PrefixTuning(virtual_tokens=3).attach(tiny("DeepSeek-V3"))
    PromptTuning(virtual_tokens=3).attach(tiny("DeepSeek-V3"))  # the control


def test_a_family_that_finds_tokens_by_their_embeddings_is_refused_although_it_takes_the_start():
    with pytest.raises(ModelError, match=r"adapter\.kind: Gemma4ForCausalLM does not run with prompt_tuning: "):
        PromptTuning(virtual_tokens=3).attach(tiny("Gemma-4"))


def test_trying_an_adapter_leaves_its_start_as_it_is():
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = make_model()
        prompt = PromptTuning(virtual_tokens=3).attach(model).prompt_encoder["default"].embedding.weight
        words = model.get_input_embeddings().weight
        assert all((words == row).all(1).any() for row in prompt)


def test_a_layer_that_does_not_listen_is_told(monkeypatch):
    model = make_model()
    layer = model.model.layers[1].self_attn
    own = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *args, past_key_values=None, **more: own(*args, **more))
    with pytest.raises(ModelError, match="prefix_tuning"):
        PrefixTuning(virtual_tokens=3).attach(model)


def recipe(tmp_path, adapter, **more):
    source = [{"kind": "jsonl", "path": "rows.jsonl"}]
    data = {"train": source} | more.pop("data", {})
    return Sft(**({"model": "m", "adapter": adapter, "data": data, "out": str(tmp_path / "run")} | more))


@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_r7_virtual_tokens_and_packing_contradict(kind, tmp_path):
    with pytest.raises(RecipeError, match=r"data\.packing.*adapter\.kind") as told:
        recipe(tmp_path, kind)
    assert "packing: none" in str(told.value)
    recipe(tmp_path, kind, data={"packing": "none"})


def test_r7_a_prefix_and_recompute_contradict(tmp_path):
    off = {"packing": "none"}
    with pytest.raises(RecipeError, match=r"memory\.recompute.*adapter\.kind"):
        recipe(tmp_path, "prefix_tuning", data=off, memory={"recompute": "full"})
    recipe(tmp_path, "prompt_tuning", data=off, memory={"recompute": "full"})

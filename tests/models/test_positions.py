"""Sequences longer than a model has positions: an error where they are learned, a notice where they are rotations."""

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from llmkit import Evaluate, Sft, run
from llmkit.core.console import Console
from llmkit.core.errors import RecipeError
from llmkit.stages import build_inference, build_training
from tests.conftest import make_model, make_tokenizer

SIZES = {"vocab_size": 448, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=16, n_layer=1, n_head=2, **SIZES))


def opt():
    more = {
        "hidden_size": 16,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    }
    return OPTForCausalLM(OPTConfig(max_position_embeddings=32, **more, **SIZES))


def llama():
    return make_model(max_position_embeddings=32)


class Told(Console):
    def __init__(self):
        super().__init__(quiet=True)
        self.said = []

    def notice(self, text):
        self.said.append(text)


@pytest.fixture
def folder(tmp_path):
    def saved(make):
        make().save_pretrained(tmp_path / make.__name__)
        make_tokenizer().save_pretrained(tmp_path / make.__name__)
        return str(tmp_path / make.__name__)

    return saved


def nodes(model, rows, out, length):
    source = [{"kind": "jsonl", "path": str(rows)}]
    data = {"train": source, "max_length": length, "overflow": "truncate"}
    yield Sft(model=model, data=data, steps=1, batch={"rows": 2}, out=str(out / f"sft-{length}"))
    task = {"kind": "perplexity", "data": source, "max_length": length}
    yield Evaluate(model=model, tasks=[task], out=str(out / f"evaluate-{length}"))


@pytest.mark.parametrize(("make", "name"), [(gpt2, "n_positions"), (opt, "max_position_embeddings")])
def test_more_than_there_are_learned_positions_is_an_error_before_the_model_loads(
    make, name, folder, rows, tmp_path, monkeypatch
):
    model = folder(make)
    for node in nodes(model, rows, tmp_path, 32):  # the control: as many as there are
        run(node, console=Told())
    for stage in (build_training, build_inference):
        monkeypatch.setattr(stage, "build" if stage is build_training else "open_model", None)
    for node, key in zip(nodes(model, rows, tmp_path, 33), ("data.max_length", "tasks.0.max_length"), strict=True):
        with pytest.raises(
            RecipeError, match=rf"^{key}: 33 is more than the 32 positions of .* \({name}\); fix: set {key}=32$"
        ):
            run(node, console=Told())


def test_rotations_go_on_past_what_the_model_was_made_for_with_a_notice(folder, rows, tmp_path):
    model = folder(llama)
    for length in (32, 33):
        for node in nodes(model, rows, tmp_path, length):
            told = Told()
            run(node, console=told)
            assert sum("is more than the 32 positions" in text for text in told.said) == (length == 33)

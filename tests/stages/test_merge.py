"""A merge over weights that bitsandbytes holds on their sides."""

import pytest
import torch
import transformers as hf

from llmkit import run
from llmkit.adapters.node import Lora
from llmkit.build.support_lora import filled
from llmkit.core.console import Console
from llmkit.models.export import export
from llmkit.models.node import Nf4
from llmkit.stages.merge import Merge
from tests.adapters.properties import logits, near, opened
from tests.conftest import make_tokenizer


@pytest.mark.filterwarnings("ignore")
def test_gpt_2_over_nf4_merges_into_what_it_computed_with(tmp_path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=448, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2)
    hf.GPT2LMHeadModel(hf.GPT2Config(**sizes)).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    held = opened(tmp_path / "base", quant=Nf4())
    model = Lora(rank=2).attach(held.model)
    filled(model)
    wanted = logits(model)
    export(model, held.tokenizer, tmp_path / "adapter", held.resolved, Nf4())
    merged = run(Merge(model=str(tmp_path / "adapter"), out=str(tmp_path / "merged")), console=Console(quiet=True))
    assert merged.manifest["way"] == "into the dequantised base" and merged.manifest["logit_difference"] < 1e-5
    whole = hf.AutoModelForCausalLM.from_pretrained(merged.folder / "model")
    near(logits(whole), wanted, 1e-5)

"""Scores of answers: prompts shared by two branches, each answer alone, padded rows, and TRL's trainer say the same."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from llmkit.core.types import Packed, Tree
from llmkit.data.batches import micro_batches
from llmkit.data.judged import at_ends, judged
from llmkit.data.node import Data, FirstFit, Jsonl, NoPacking
from llmkit.losses.reward_node import BradleyTerry
from llmkit.models.attend import install
from llmkit.models.classified import Classified
from llmkit.models.node import Head
from llmkit.models.rewarded import continues, judges_steps, scores_answers
from tests.conftest import CHATML, make_tokenizer

HEAD = Head("sequence", ("reward",))
WORDS = ["the", "quick", "fox", "jumps", "over", "lazy", "model", "text"]


def rows(n=8, plain=False, seed=0):
    """Pairs of ragged lengths, every other with a margin."""
    dice = np.random.default_rng(seed)
    said = lambda most: " ".join(dice.choice(WORDS, dice.integers(1, most)))  # noqa: E731
    for i in range(n):
        asked, chosen, rejected = said(12), f"{said(9)} dog", f"{said(9)} fox"
        if not plain:
            asked = [{"role": "user", "content": asked}]
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        yield {"prompt": asked, "chosen": chosen, "rejected": rejected, "margin": round(0.1 * (i % 3), 1)}


def read(tmp_path, tokenizer, given, **more):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    data = Data(train=(Jsonl(path=str(path)),), **{"max_length": 128, **more})
    return judged(data.train, data, tokenizer)


class Norm(nn.Module):
    """RMSNorm in the type that it is given: transformers' own computes in fp32."""

    def __init__(self, like):
        super().__init__()
        self.weight, self.eps = like.weight, like.variance_epsilon

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def model_of(kind=torch.float64, family="Llama", **more):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 448, "max_position_embeddings": 512, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**(sizes | more), num_labels=1)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).to(kind)
    nn.init.normal_(model.score.weight)
    if kind == torch.float64:
        for name, module in list(model.named_modules()):
            if type(module).__name__ == "LlamaRMSNorm":
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, Norm(module))
    install(model, "auto", False)
    return model


def total(scored, groups, packing, trees, size=48, contexts=True, loss=BradleyTerry(center=0.01)):
    """The mean loss over all rows in one step of several micro-batches, and its gradients."""
    batches = micro_batches(
        groups,
        range(len(groups)),
        packing,
        size,
        2,
        contexts,
        "cpu",
        trees=trees,
    )
    scored.zero_grad()
    sums = [loss(scored(batch), batch) for batch in batches]
    mean = sum(one.total for one in sums) / sum(one.count for one in sums)
    mean.backward()
    return mean.detach(), {name: p.grad.clone() for name, p in scored.named_parameters() if p.grad is not None}, batches


def off(ours, theirs):
    return max(float((ours[k] - theirs[k]).abs().max() / theirs[k].abs().max().clamp_min(1e-300)) for k in theirs)


@pytest.mark.parametrize("plain", [False, True], ids=["messages", "text"])
def test_shared_prompts_have_the_gradients_of_answers_alone(plain, tmp_path, tokenizer):
    groups = read(tmp_path, tokenizer, rows(plain=plain))
    scored = Classified(model_of(), HEAD, direct=True)
    value, grads, batches = total(scored, groups, FirstFit(), trees=True)
    assert all(isinstance(b.attend, Tree) for b in batches) and len(batches) > 1
    for packing, trees in ((FirstFit(), False), (NoPacking(), False)):
        other, theirs, alone = total(scored, groups, packing, trees)
        assert all(isinstance(b.attend, Packed) for b in alone)
        assert abs(float(value - other)) <= 1e-12 * abs(float(other))
        assert grads.keys() == theirs.keys() and off(grads, theirs) < 1e-10
    tokens = sum(b.tokens.numel() for b in batches)
    sizes = [(groups.completions(i)[0][0] - int(groups.starts[i]), groups.per["length"]) for i in range(len(groups))]
    answers = int(groups.per["length"].sum())
    assert tokens == sum(prompt for prompt, _ in sizes) + answers + len(groups)  # one more a branch, one less a prompt


FAMILIES = {
    "Mistral": {"sliding_window": 8},
    "Gemma2": {"sliding_window": 8, "head_dim": 8, "attn_logit_softcapping": 5.0},
    "Qwen3": {"head_dim": 8},
    "Phi3": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_windows_and_caps_share_prompts_too(family, recompute, tmp_path, tokenizer):
    """Their norms compute in fp32, whatever the type of the rest: equal to what that leaves."""
    groups = read(tmp_path, tokenizer, rows())
    model = model_of(torch.float32, family, **FAMILIES[family])
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    scored = Classified(model, HEAD, direct=True).train()
    value, grads, _ = total(scored, groups, FirstFit(), trees=True)
    other, theirs, _ = total(scored, groups, FirstFit(), trees=False)
    torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)
    assert off(grads, theirs) < 2e-5


def test_padded_rows_of_transformers_own_forward_have_the_same_scores(tmp_path, tokenizer):
    groups = read(tmp_path, tokenizer, rows())
    model = model_of(torch.float32)
    value, grads, _ = total(Classified(model, HEAD, direct=True), groups, FirstFit(), trees=True)
    model.set_attn_implementation("sdpa")
    other, theirs, batches = total(Classified(model, HEAD, direct=False), groups, NoPacking(), False, contexts=False)
    assert all(b.attend is None for b in batches)
    torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)
    assert off(grads, theirs) < 1e-4


def test_an_answer_is_whole_and_read_at_the_last_token_that_is_no_padding(tmp_path):
    """Where the template writes more behind an answer, transformers reads there; padding is passed over."""
    tokenizer = make_tokenizer()
    given = list(rows(2))
    groups = read(tmp_path, tokenizer, given)
    (batch,) = micro_batches(groups, [0], FirstFit(), 128, 1, True, "cpu")
    for at, side in enumerate(("chosen", "rejected")):
        whole = tokenizer.apply_chat_template(given[0]["prompt"] + given[0][side], return_dict=False)
        segment = batch.attend.segments[at]
        assert batch.tokens[0, segment.start : segment.end].tolist() == whole
        assert batch.weights[0, segment.start : segment.end].nonzero().tolist() == [[len(whole) - 1]]
    assert batch.branches.of.tolist() == [0, 1] and batch.branches.per["label"].tolist() == [1.0, 0.0]
    lengths = [end - start - 1 for start, end in groups.completions(0)]
    assert groups.per["length"][:2].tolist() == lengths
    filled = "{% if not add_generation_prompt %}<|endoftext|><|endoftext|>{% endif %}"
    tokenizer.chat_template = CHATML + filled
    padded = read(tmp_path, tokenizer, given)
    tokenizer.chat_template = CHATML
    assert np.array_equal(padded.ids, groups.ids)


def test_what_is_nothing_but_padding_keeps_a_token(tmp_path, tokenizer):
    groups = read(tmp_path, tokenizer, rows(1))
    begin, end = groups.completions(0)[0]
    ids = np.array(groups.ids)
    ids[begin:end] = 0
    made = at_ends(replace(groups, ids=ids), 0)
    assert next(b - a for a, b in made.completions(0)) == 2 and made.per["length"][0] == 1


def test_a_single_kind_of_head_scores_answers():
    assert scores_answers(HEAD) and not scores_answers(Head("sequence", ("a", "b"))) and not scores_answers(None)
    assert judges_steps(Head("token", ("wrong", "right"))) and not judges_steps(HEAD)
    assert continues(HEAD, Head("sequence", ("LABEL_0",))) and not continues(HEAD, Head("token", ("reward",)))
    assert not continues(Head("sequence", ("a", "b")), Head("sequence", ("b", "a")))


@pytest.mark.parametrize("plain", [False, True], ids=["messages", "text"])
def test_the_loss_and_gradients_are_those_of_trls_trainer(plain, tmp_path, tokenizer):
    """From the same rows: its rendering, its tokens, its padding and its loss, in one batch."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    given = list(rows(6, plain=plain))
    scored = Classified(model_of(torch.float32), HEAD, direct=True)
    value, grads, _ = total(scored, read(tmp_path, tokenizer, given), FirstFit(), trees=True)
    model = scored.causal[0]
    model.set_attn_implementation("sdpa")
    settings = {"output_dir": str(tmp_path / "trl"), "per_device_train_batch_size": 6, "use_cpu": True, "bf16": False}
    settings |= {"center_rewards_coefficient": 0.01, "gradient_checkpointing": False, "report_to": "none"}
    trainer = trl.RewardTrainer(
        model,
        args=trl.RewardConfig(**settings, disable_dropout=True),
        train_dataset=datasets.Dataset.from_list(given),
        processing_class=tokenizer,
    )
    model.zero_grad()
    (inputs,) = trainer.get_train_dataloader()
    theirs = trainer.compute_loss(trainer.model, dict(inputs))
    theirs.backward()
    torch.testing.assert_close(value, theirs.detach(), rtol=1e-5, atol=1e-6)
    their_grads = {f"model.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == their_grads.keys() and off(grads, their_grads) < 1e-4

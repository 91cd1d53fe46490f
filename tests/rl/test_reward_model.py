"""A reward model's score is what transformers gives to the whole conversation."""

import pytest
import torch
from rated import sample

from llmkit.core.errors import DataError, ModelError
from llmkit.rl.bench import Bench
from llmkit.rl.rewards_node import Model
from llmkit.rl.scoring import score


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 448, "max_position_embeddings": 96, "pad_token_id": 0}
    model = LlamaForSequenceClassification(LlamaConfig(num_labels=1, **sizes))
    path = tmp_path_factory.mktemp("scorer")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


ASKED = ({"role": "user", "content": "hello world"},)


def theirs(folder, tokenizer, texts):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        rows = [[id for part in parts for id in tokenizer(part)["input_ids"]] for parts in texts]
        return [float(model(torch.tensor([ids])).logits[0, 0]) for ids in rows]


def test_scores_are_those_of_transformers(folder, tokenizer):
    answers = ["the lazy dog", "a", "the quick brown fox jumps over the lazy dog"]
    samples = [sample(text, prompt=ASKED) for text in answers] + [sample("one two three", prompt="question ")]
    head = "<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\n"
    texts = [[f"{head}{text}<|im_end|>\n"] for text in answers] + [["question ", "one two three", "<|im_end|>"]]
    with Bench() as bench:
        found = score([Model(path=str(folder))], samples, bench).total
        assert found == pytest.approx(theirs(folder, tokenizer, texts), abs=1e-5)
        assert score([Model(path=str(folder))], samples[::-1], bench).total == pytest.approx(found[::-1], abs=1e-5)
        assert len(set(found)) == 4


def test_a_conversation_with_tools_is_read_whole_however_it_was_asked(folder):
    turns = ({"role": "assistant", "content": "let me see"}, {"role": "assistant", "content": "the lazy dog"})
    samples = [sample("the lazy dog", prompt=asked, turns=turns) for asked in (ASKED, "hello world")]
    with Bench() as bench:
        one, other, last = score(
            [Model(path=str(folder))], [*samples, sample("the lazy dog", prompt=ASKED)], bench
        ).total
    assert one == other != last


def test_what_scores_no_answers_is_refused(tiny, folder):
    with Bench() as bench, pytest.raises(ModelError, match=r"reward.path: .* is a language model; fix: give what kind"):
        score([Model(path=str(tiny))], [], bench)
    with Bench() as bench, pytest.raises(DataError, match="answer 1 .*has 158 tokens with its prompt, .* reads 96"):
        score([Model(path=str(folder))], [sample("a"), sample("zq " * 50)], bench)

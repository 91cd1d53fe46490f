"""Tiny models, made from configurations: nothing is fetched."""

import json
import os
import signal
import subprocess
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("LLMKIT_CACHE_SIZE", "0")  # tokens are kept where a test asks for it
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:  # so a shell starts what it puts in the background, or under nohup
        signal.signal(number, usual)

import pytest


def _one_pool():
    """torch makes its threads anew at the first operation of a forked child; where several threads of the child come to
    that at once, some meet none ("Invalid thread pool!"). Here it is made before there are any."""
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(torch.get_num_threads())


os.register_at_fork(after_in_child=_one_pool)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [
    "the quick brown fox jumps over the lazy dog",
    "a model is trained on rows of text and asked what it learned",
    "user assistant system hello world answer question one two three",
]


def make_tokenizer(template=CHATML, words=WORDS, size=400):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(words * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def make_model(seed=0, **more):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 448, "max_position_embeddings": 512, "tie_word_embeddings": True}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**(sizes | ends | more)))


@pytest.fixture
def forgotten(monkeypatch):
    """Nothing is remembered of what is compiled here, and all of it is again after: a later test may ask for the first
    time with a cache of its own, and be told that there is nothing."""
    from llmkit_kernels import build, table

    def forget():
        for known in (build.library, build.lacks):
            known.cache_clear()

    forget()
    yield
    monkeypatch.undo()
    forget()
    table.rows()


@pytest.fixture
def uncompiled(monkeypatch, forgotten):
    """Nothing is compiled here."""
    monkeypatch.setenv("LLMKIT_KERNELS", "off")


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny Llama's folder: do not write into it."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path):
    """A jsonl file of 24 rows of messages, of many lengths."""
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for i in range(24):
            question = " ".join(["hello world"] * (1 + i % 5)) + f" {i}"
            answer = " ".join(["the lazy dog"] * (1 + i % 3))
            said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": said}) + "\n")
    return path


@pytest.fixture
def disk(tmp_path):
    """Mounts a disk of some KiB, or makes it larger; gives its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def sized(kib):
        how = f"remount,size={kib}k" if mounted else f"size={kib}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(folder)], check=False)
        if done.returncode:
            pytest.skip("this process may not mount a disk")
        mounted.append(kib)
        return folder

    yield sized
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)

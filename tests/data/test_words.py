"""Words: the same ids and weights as the plain way, for each pattern that is known and on any text."""

import random

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llmkit.data.encode import Encoder, Rendered
from llmkit.data.render import Renderer
from llmkit.data.words import SPLITS, words
from tests.conftest import CHATML, WORDS

QWEN, LLAMA = SPLITS
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


KINDS = {
    "gpt2": (BYTES, None),
    "gpt2 trims": (BYTES, processors.ByteLevel(trim_offsets=True)),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]), None),
    "smollm trims": (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
        processors.ByteLevel(trim_offsets=True),
    ),
    "qwen": (
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "isolated"), CUT]),
        processors.ByteLevel(False),
    ),
    "llama": (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA), "isolated"), CUT]), None),
}
PIECES = [
    *"'sSdm \n\r\t!?.,<>|-_()[]{}#0123456789aZ",
    "  ",
    "    ",
    "\n\n",
    "'re",
    "'LL",
    "hello",
    " world",
    "lazy dog",
]
PIECES += [
    "<|im_end|>",
    "<|im_start|>",
    "\n  ",
    "1234",
    "user\n",
    "é",
    "ſ",
    "\x1c",
    "\x0b",
    "漢字",
    "\u00a0",
    "’",
    "£",
    "—",
]


def tokenizer_of(kind):
    cut, after = KINDS[kind]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = cut, decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([*WORDS * 4, *["    x = 1234\n        y  ==  'it's'\n\n"] * 9], trainer)
    if after is not None:
        bpe.post_processor = after
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", bos_token="<|im_start|>")
    made.chat_template = CHATML
    return made


@pytest.fixture(scope="module", params=KINDS)
def both(request):
    """An encoder that takes words, and the same one the plain way."""
    made = tokenizer_of(request.param)
    quick, plain = (Encoder(made, Renderer(made).specials) for _ in range(2))
    plain.words = None
    return quick, plain


def texts(rng, letters):
    for _ in range(600):
        text = "".join(rng.choice(letters) for _ in range(rng.randint(0, 30)))
        cuts = sorted(rng.sample(range(len(text) + 1), min(len(text) + 1, rng.choice([0, 2, 4]))))
        spans = tuple(zip(cuts[::2], cuts[1::2], strict=False))
        yield Rendered(text, spans, close=rng.random() < 0.3, weights=tuple(rng.choice([1.0, 0.5]) for _ in spans))


@pytest.mark.parametrize("letters", [PIECES, [p for p in PIECES if (p.isascii() and p.isprintable()) or p in "\n\r\t"]])
def test_words_give_what_the_tokenizer_gives(letters, both):
    quick, plain = both
    asked = list(texts(random.Random(0), letters))
    assert quick.words is not None and plain.words is None
    taken = [quick.words.encode(r.text, r.spans, r.weights) for r in asked]
    assert sum(found is not None for found in taken) > 50
    assert quick.encode(asked) == plain.encode(asked)
    assert quick.encode(asked) == plain.encode(asked)  # from what is kept of the first time


def test_whole_conversations_are_taken_by_words(both):
    quick, plain = both
    renderer = Renderer(quick.tokenizer)
    said = [
        {"role": "user", "content": "if x:\n    y = 12345  # it's"},
        {"role": "assistant", "content": "it's  so.\n"},
    ]
    text = renderer.template.text(said)
    spans = renderer.template.spans(said, (), [1], text)
    found = quick.words.encode(text, spans, (1.0,))
    assert found is not None and [found] == plain.encode([Rendered(text, spans)])


def test_added_tokens_stay_when_the_words_are_forgotten(both, monkeypatch):
    quick, plain = both
    monkeypatch.setattr("llmkit.data.words.MOST", 3)
    for text in ("<|im_start|>user one two three four five<|im_end|>\n", "six seven<|im_end|><|im_start|> eight nine"):
        assert [quick.words.encode(text, (), ())] == plain.encode([Rendered(text, ())])
        assert len(quick.words) <= 3 + 3


def test_other_tokenizers_go_the_plain_way():
    for change in ("prefix", "normalizer", "lstrip", "split", "model"):
        made = tokenizer_of("gpt2")
        backend = made.backend_tokenizer
        if change == "prefix":
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        elif change == "normalizer":
            from tokenizers import normalizers

            backend.normalizer = normalizers.NFC()
        elif change == "lstrip":
            from tokenizers import AddedToken

            made.add_tokens([AddedToken("<x>", lstrip=True)])
        elif change == "split":
            backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\w+"), "isolated"), CUT])
        else:
            backend.model = models.WordLevel({"a": 0}, unk_token="a")
        assert words(made) is None, change

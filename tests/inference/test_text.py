"""Text as it comes is the text of the whole, whatever the tokens."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmkit.inference.detokenise import ByteLevel, Pieces, Window, detokeniser
from llmkit.inference.detokenise import speller as one_by_one
from llmkit.inference.sampling import Sampling
from llmkit.inference.text import Stream, Texts
from tests.conftest import make_tokenizer

PIECES = ["▁", "▁the", "▁fox", "es", "日", "本", ".", "▁▁", "😀", "\n", "<0x", "e▁a", "��"]


def spelled(decoder: Any, added: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """As SentencePiece's models are: pieces with marks, and a token for each byte."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    model = models.BPE({word: at for at, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def levels() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool call>", "Ġmixed 日本", " spaced "])
    return tokenizer


MARK, FALL, FUSE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
KINDS = {
    "bytes": (levels, ByteLevel),
    "llama": (lambda: spelled(decoders.Sequence([MARK, FALL, FUSE, decoders.Strip(" ", 1, 0)]), (" x", "<t>")), Pieces),
    "gemma": (lambda: spelled(decoders.Sequence([MARK, FALL, FUSE])), Pieces),
    "metaspace": (lambda: spelled(decoders.Metaspace()), Pieces),
    "metaspace, bare": (lambda: spelled(decoders.Metaspace(prepend_scheme="never")), Pieces),
    "unknown": (lambda: spelled(decoders.WordPiece(prefix="▁")), Window),
}


def shown(made: Any, ids: list[int]) -> list[str]:
    words = made()
    return [*map(words.add, ids), words.rest()]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unknown"])
def test_what_comes_bit_by_bit_is_the_decoding_of_the_whole(kind: str, special: bool) -> None:
    make, cls = KINDS[kind]
    tokenizer, drawn = make(), random.Random(kind)
    made = detokeniser(tokenizer, special)
    assert isinstance(made(), cls)
    for size in [1, 2, 3] * 40 + [5, 30, 300] * 20 + [50_000]:  # random ids: most bytes are no UTF-8
        ids = [drawn.randrange(len(tokenizer) + 3) for _ in range(size)]
        assert "".join(shown(made, ids)) == tokenizer.decode(ids, skip_special_tokens=not special)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unknown"])
def test_the_bytes_of_tokens_one_by_one_are_those_of_the_text(kind: str) -> None:
    tokenizer = KINDS[kind][0]()
    raw, ids = one_by_one(tokenizer), tokenizer.encode("the fox es日本. 😀 é the", add_special_tokens=False)
    assert b"".join(map(raw, ids)).decode().lstrip() == tokenizer.decode(ids).lstrip() and len(ids) > 8
    halves = [id for id in ids if raw(id).decode("utf-8", "ignore").encode() != raw(id)]
    assert bool(halves) != kind.startswith("metaspace"), "which alone has no tokens of bytes"
    assert raw(tokenizer.eos_token_id).decode() == tokenizer.eos_token


@pytest.mark.parametrize("kind", KINDS)
def test_real_text_comes_in_whole_letters(kind: str) -> None:
    make, _ = KINDS[kind]
    tokenizer = make()
    made = detokeniser(tokenizer)
    for text in ("the fox 日本 👩‍👩‍👧 naïve 😀", "  two  spaces", "\n\nthe.", "е\u0301 ﷽ 𝔘𝔫"):
        if kind == "bytes":
            ids = tokenizer.encode(text, add_special_tokens=False)
        else:
            ids = [3 + byte for byte in text.encode()]
        parts = shown(made, ids)
        assert "".join(parts) == tokenizer.decode(ids) and "\ufffd" not in "".join(parts[:-1])


def test_a_long_text_takes_linear_time() -> None:
    tokenizer, drawn = levels(), random.Random(1)
    made = detokeniser(tokenizer)

    def seconds(size: int) -> float:
        ids = [drawn.randrange(len(tokenizer)) for _ in range(size)]
        began = time.process_time()
        shown(made, ids)
        return time.process_time() - began

    seconds(100)
    assert seconds(50_000) < 5  # tenths of a second; decoding again and again would take minutes
    broken = spelled(decoders.WordPiece(prefix="▁"))
    words = detokeniser(broken)()
    for _ in range(3000):  # no letter is ever whole
        words.add(broken.convert_tokens_to_ids("��"))
    assert isinstance(words, Window) and len(words.ids) <= 64


def streamed(tokenizer: Any, ids: list[int], **how: Any) -> tuple[str, str | None, list[str]]:
    stream = Texts(tokenizer).stream(Sampling(**how))
    parts = [stream.add(token) for token in ids]
    parts.append(stream.end())
    return "".join(parts), stream.stopped, parts


def first_end(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Slowly: the first letter at which some stop is complete, and of those the longest."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


def test_stops_are_found_across_tokens_and_never_shown() -> None:
    tokenizer, drawn = make_tokenizer(), random.Random(2)
    letters = [tokenizer.encode(one)[0] for one in "abc é"]
    for _ in range(1500):
        ids = [token for _ in range(14) for token in [drawn.choice(letters)]]
        whole = tokenizer.decode(ids)
        stops = list({"".join(drawn.choices("abc ", k=drawn.randint(1, 5))) for _ in range(drawn.randint(1, 3))})
        stream, told = Texts(tokenizer).stream(Sampling(stop=tuple(stops))), ""
        for token in ids:
            told += stream.add(token)
            text = told + stream.held
            begun = max(size for stop in stops for size in range(len(stop)) if text.endswith(stop[:size]))
            assert stream.stopped is not None or len(stream.held) == begun  # no more and no less is held back
        assert (told + stream.end(), stream.stopped) == first_end(whole, stops)


def test_a_stop_may_be_all_there_is_or_a_special_token_or_too_early() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer.encode("hello world")
    assert streamed(tokenizer, ids, stop=("hello world",))[:2] == ("", "hello world")
    assert streamed(tokenizer, ids, stop=("hello world!",))[:2] == ("hello world", None)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert streamed(tokenizer, [*ids, end, *ids], stop=("<|endoftext|>",))[:2] == ("hello world", "<|endoftext|>")
    twice = [*ids, *ids]
    text, stopped, _ = streamed(tokenizer, twice, stop=("hello",), min_tokens=len(ids) + 1)
    assert (text, stopped) == ("hello world", "hello")
    assert Texts(tokenizer).whole(twice, Sampling(stop=("world",))) == "hello "


def test_a_stop_that_repeats_itself_takes_linear_time() -> None:
    stop = "a" * 4000
    words = detokeniser(make_tokenizer())()
    stream = Stream(words, (stop + "b", "ab" * 2000))
    token = make_tokenizer().encode("a")[0]
    began = time.process_time()
    text = "".join(stream.add(token) for _ in range(20_000))
    assert time.process_time() - began < 5 and set(text) == {"a"} and len(text) == 16_000

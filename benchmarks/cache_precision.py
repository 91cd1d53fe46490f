"""What does a narrow cache of keys and values cost in perplexity?

    python benchmarks/cache_precision.py --data FOLDER [--model NAME] [--windows 8] [--length 512] [--chunk 64]

FOLDER holds wikitext-2/valid.txt. Windows of its beginning are read through the cache in chunks, so that every token
but those of the first chunk sees keys and values as they are kept; the same windows for each precision.
"""

import argparse
import math
from pathlib import Path

import torch

from llmkit.build.cache import store_of
from llmkit.build.opening import load
from llmkit.core.types import Paged, Span
from llmkit.inference.cache import Cache
from llmkit.models.decoder import Decoder
from llmkit.models.load import How
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve

PRECISIONS = ("fp32", "bf16", "fp16", "int8")


def losses(decoder, windows, chunk, precision):
    """Of every token of the windows but the first of each, in nats; and the bytes that a token takes in the cache."""
    count, length = windows.shape
    blocks = -(-length // 16)
    store = store_of(decoder, Cache(precision=precision, size=1 << 30))
    made = []
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        size = end - start
        spans = tuple(
            Span(0, i * size, (i + 1) * size, start, tuple(range(i * blocks, (i + 1) * blocks))) for i in range(count)
        )
        positions = torch.arange(start, end).repeat(count)
        hidden = decoder.hidden(windows[:, start:end].flatten(), positions, Paged(store, spans), [""] * count)
        for one, ids in zip(hidden.split(size), windows, strict=True):
            labels = ids[start + 1 : end + 1]
            logits = decoder.logits(one[: len(labels)])
            made.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    return torch.cat(made), sum(store.bytes.values()) / (store.blocks * store.size)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=64)
    given = parser.parse_args()
    ref = ModelRef(name=given.model)
    loaded = load(resolve(ref), ref, How("cpu", "fp32"))
    text = (given.data / "wikitext-2" / "valid.txt").read_text()[: 8 * given.windows * given.length]
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"][: given.windows * given.length]
    windows = torch.tensor(ids).view(given.windows, given.length)
    decoder, base = Decoder(loaded.model.eval()), None
    for precision in PRECISIONS:
        with torch.no_grad():
            nats, size = losses(decoder, windows, given.chunk, precision)
        base = nats if base is None else base
        off, spread = (nats - base).mean().item(), (nats - base).std().item() / math.sqrt(len(nats))
        cost = f"{off:+.6f} +- {1.96 * spread:.6f} nats a token against fp32"
        print(f"{precision}: perplexity {math.exp(nats.mean().item()):.4f}, {cost}, {size / 1024:.1f} KiB", flush=True)


if __name__ == "__main__":
    main()

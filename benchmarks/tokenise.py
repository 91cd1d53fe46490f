"""Rows to tokens: `prepare` beside `datasets.map` with the same tokenizer, on two cores, in interleaved rounds.

    python benchmarks/tokenise.py --data FOLDER [--rows 100000] [--rounds 5]

FOLDER holds `gsm8k/train.jsonl` (`question`, `answer`); its rows are told apart by a number until there are enough.
What the peers do, with `num_proc=2, batched=True`: `mask` is `apply_chat_template` with the assistant's mask, under the
same template with `{% generation %}` marks; `prompt` is what TRL does for a prompt and a completion, two renderings and
their tokens; `ids` makes no mask at all. Ours: `prepare` without lint (the peers do none), with it, and again from the
cache.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}"
)


def rows(data: Path, count: int, to: Path) -> None:
    """Writes so many rows of messages."""
    held = [json.loads(line) for line in (data / "gsm8k" / "train.jsonl").read_text().splitlines()]
    with to.open("w") as file:
        for i in range(count):
            row = held[i % len(held)]
            asked = {"role": "user", "content": f"{row['question']} ({i})"}
            file.write(json.dumps({"messages": [asked, {"role": "assistant", "content": row["answer"]}]}) + "\n")


def tokenizer() -> Any:
    """The quickstart's."""
    from llmkit.models.node import ModelRef
    from llmkit.models.resolve import resolve
    from llmkit.models.tokenizer import read_tokenizer

    ref = ModelRef(name="smollm2-135m-instruct-q4")
    return read_tokenizer(resolve(ref), ref)


def ours(path: Path, made: Any, level: str) -> int:
    """Our way; gives the tokens."""
    from llmkit.data.cleaning import Linting
    from llmkit.data.node import Data, Jsonl
    from llmkit.data.prepare import prepare

    data = Data(train=(Jsonl(path=str(path)),), lint=Linting(level=level))
    return prepare(data.train, data, made).counts["tokens"]


def theirs(path: Path, made: Any, kind: str, cache: str) -> int:
    """The peer's way; gives the tokens."""
    import datasets

    def mask(batch: Any) -> Any:
        out = made.apply_chat_template(
            batch["messages"], chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": out["input_ids"], "assistant_masks": out["assistant_masks"]}

    def prompt(batch: Any) -> Any:
        asked = [messages[:1] for messages in batch["messages"]]
        before = made.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = made.apply_chat_template(batch["messages"], return_dict=True)["input_ids"]
        masks = [[0] * len(a) + [1] * (len(b) - len(a)) for a, b in zip(before, whole, strict=True)]
        return {"input_ids": whole, "completion_mask": masks}

    def ids(batch: Any) -> Any:
        return {"input_ids": made.apply_chat_template(batch["messages"], return_dict=True)["input_ids"]}

    steps = {"mask": mask, "prompt": prompt, "ids": ids}
    found = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
    done = found.map(steps[kind], batched=True, num_proc=2, remove_columns=["messages"], load_from_cache_file=False)
    return sum(len(row) for row in done.with_format("arrow")["input_ids"])


def main() -> None:
    """Rounds of all, in turns; the median of each, and the ratios."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--data", type=Path, required=True)
    asked.add_argument("--rows", type=int, default=100_000)
    asked.add_argument("--rounds", type=int, default=5)
    said = asked.parse_args()
    made, seconds = tokenizer(), dict[str, list[float]]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        rows(said.data, said.rows, path)
        for number in range(said.rounds):
            os.environ["LLMKIT_CACHE"] = f"{folder}/{number}"
            runs = {
                "ours": lambda: ours(path, made, "off"),
                "ours, linted": lambda: ours(path, made, "warn"),
                "ours, cached": lambda: ours(path, made, "warn"),
                **{f"map, {k}": lambda k=k: theirs(path, made, k, f"{folder}/d") for k in ("mask", "prompt", "ids")},
            }
            for name, run in runs.items():
                began = time.monotonic()
                tokens = run()
                seconds.setdefault(name, []).append(time.monotonic() - began)
                sys.stdout.write(f"round {number + 1}: {name}: {seconds[name][-1]:.1f} s, {tokens} tokens\n")
                sys.stdout.flush()
    middle = {name: statistics.median(held) for name, held in seconds.items()}
    for name, held in middle.items():
        sys.stdout.write(f"{name}: {held:.1f} s, {said.rows / held:.0f} rows/s, {held / middle['ours']:.2f} x ours\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(f"peak of this process: {peak:.0f} MiB\n")


if __name__ == "__main__":
    main()

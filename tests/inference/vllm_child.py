"""In an environment that has vLLM: `vllm_child.py FOLDER` reads asks as JSON lines, and prints completions."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

OUT = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

if __name__ == "__main__":
    from transformers import AutoTokenizer

    from llmkit.inference.grammar import Choice
    from llmkit.inference.node import Vllm
    from llmkit.inference.request import Ask, Prompt
    from llmkit.inference.sampling import Sampling
    from llmkit.inference.writer import Files

    def asked(line: str) -> Ask:
        told = json.loads(line)
        more = told["sampling"]
        if "grammar" in more:
            more["grammar"] = Choice(choices=tuple(more["grammar"]))
        lists = {key: tuple(value) for key, value in more.items() if isinstance(value, list)}
        bias = {"logit_bias": {int(key): value for key, value in more.get("logit_bias", {}).items()}}
        return Ask(Prompt(tuple(told["prompt"])), Sampling(**(more | lists | bias)))

    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    held: Any = SimpleNamespace(files=lambda: Files(Path(sys.argv[1]), "fp32"), tokenizer=tokenizer)
    writer = Vllm(sequences=8, length=256, size=1 << 26).open(held)
    for made in writer.each(map(asked, sys.stdin)):
        print(json.dumps(dataclasses.asdict(made)), file=OUT, flush=True)
    writer.close()

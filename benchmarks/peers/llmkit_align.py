"""`llmkit run RECIPE`, with its memory: prints one JSON line with its steps, losses and memory."""

import contextlib
import json
import resource
import sys
from pathlib import Path

import peft  # noqa: F401  what both import before a model is there
import torch  # noqa: F401
from rounds import resident, say
from transformers import LlamaForCausalLM  # noqa: F401

from llmkit.cli.main import main

recipe, out = sys.argv[1:]
imported = resident()
sys.argv = ["llmkit", "run", recipe]
with contextlib.suppress(SystemExit):
    main()
lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
lines = [line for line in lines if line["event"] == "train"]
say(
    {
        "seconds": [line["seconds"] for line in lines],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "imported": imported,
        "losses": [line["loss"] for line in lines],
        "tokens": [line.get("length", 0) for line in lines],
    }
)

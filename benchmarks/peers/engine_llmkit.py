"""llmkit's engine on given prompts: prints one JSON line with its speed, its start and what a warm prefix saves."""

import json
import statistics
import sys
import time

import torch

from llmkit.build.llm import LLM
from llmkit.inference.sampling import Sampling
from llmkit.models.served import ServedLinear

spec = json.loads(sys.argv[1])
torch.set_num_threads(spec["threads"])
llm = LLM(spec["model"])
llm.generate([[1, 2, 3]], Sampling(max_tokens=1))
started = time.time() - spec["spawned"]
if spec.get("torch"):
    for module in llm.writer.turns.engine.runner.forward.model.modules():
        if isinstance(module, ServedLinear):
            module.__class__ = torch.nn.Linear


def first(prompt):
    """Seconds to the first token."""
    begun = time.monotonic()
    llm.generate([prompt], Sampling(max_tokens=1, ignore_eos=True))
    return time.monotonic() - begun


cold, warm = [], []
for prompt in spec["long"]:
    cold.append(first(prompt))
    warm.append(first(prompt[:512] + prompt[:16]))
begun = time.monotonic()
made = llm.generate(spec["prompts"], Sampling(max_tokens=spec["tokens"], ignore_eos=True))
taken = time.monotonic() - begun
print(
    json.dumps(
        {
            "tokens_per_second": sum(len(one.token_ids) for one in made) / taken,
            "start_to_first_token": started,
            "warm_over_cold": statistics.median(warm) / statistics.median(cold),
            "cold_512_seconds": statistics.median(cold),
            "ids": [list(one.token_ids) for one in made],
        }
    )
)

"""llmkit's engine: its start, then a round at a time its speed and what a warm prefix saves."""

import json
import statistics
import sys
import time

from rounds import serve

if __name__ == "__main__":
    import torch

    from llmkit.build.llm import LLM
    from llmkit.inference.sampling import Sampling
    from llmkit.models.served_linears import ServedLinear

    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    llm = LLM(spec["model"])
    llm.generate([[1, 2, 3]], Sampling(max_tokens=1))
    started = time.time() - spec["spawned"]
    if spec.get("torch"):
        for module in llm.engine.runner.forward.model.modules():
            if isinstance(module, ServedLinear):
                module.__class__ = torch.nn.Linear
    how = Sampling(max_tokens=spec["tokens"], ignore_eos=True)

    def first(prompt):
        """Seconds to the first token."""
        begun = time.monotonic()
        llm.generate([prompt], Sampling(max_tokens=1, ignore_eos=True))
        return time.monotonic() - begun

    def together(prompts):
        """All of them at once."""
        begun = time.monotonic()
        made = llm.generate(prompts, how)
        ids = [list(one.token_ids) for one in made]
        return {"tokens_per_second": sum(map(len, ids)) / (time.monotonic() - begun), "ids": ids}

    def prefixes(prompts):
        """Each new, and then with its first 512 tokens in the cache."""
        pairs = [(first(prompt), first(prompt[:512] + prompt[:16])) for prompt in prompts]
        cold, warm = (statistics.median(times) for times in zip(*pairs, strict=True))
        return {"warm_over_cold": warm / cold, "cold_512_seconds": cold}

    def once(asked):
        return together(asked["prompts"]) if "prompts" in asked else prefixes(asked["long"])

    serve({"start_to_first_token": started}, once)

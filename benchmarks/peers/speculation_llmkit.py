"""llmkit's engine with one drafter, or with none: what it makes of a few prompts, how long and in how many steps."""

import json
import sys
import time

from rounds import serve

if __name__ == "__main__":
    import torch

    from llmkit.build.llm import LLM
    from llmkit.inference.sampling import Sampling

    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    llm = LLM(spec["model"], generator={"kind": "engine", "speculation": spec.get("speculation")})
    how = Sampling(max_tokens=spec["tokens"], temperature=spec["temperature"], seed=spec["seed"])

    def once(asked):
        """All prompts at once, new to the cache."""
        llm.engine.forget()
        before = llm.engine.stats()
        begun = time.monotonic()
        made = llm.generate(asked["prompts"], how)
        seconds = time.monotonic() - begun
        after = llm.engine.stats()
        counts = {
            name: getattr(after, name) - getattr(before, name) for name in ("made", "drafted", "accepted", "steps")
        }
        return {"seconds": seconds, "ids": [list(one.token_ids) for one in made], **counts}

    once({"prompts": [[1, 2, 3]]})
    serve({}, once)

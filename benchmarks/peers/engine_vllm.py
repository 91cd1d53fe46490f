"""vLLM's offline engine: its speed, a round at a time."""

import json
import sys
import time

from rounds import serve

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    spec = json.loads(sys.argv[1])
    # one prompt of another round is not in the cache of prefixes: what is asked differs in each
    llm = LLM(model=spec["folder"], dtype="float32", max_model_len=2048, max_num_seqs=16)
    few = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    llm.generate([{"prompt_token_ids": [1, 2, 3 + at]} for at in range(16)], few, use_tqdm=False)
    how = SamplingParams(temperature=0, max_tokens=spec["tokens"], ignore_eos=True)

    def once(asked):
        prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
        begun = time.monotonic()
        made = llm.generate(prompts, how, use_tqdm=False)
        ids = [list(one.outputs[0].token_ids) for one in made]
        return {"tokens_per_second": sum(map(len, ids)) / (time.monotonic() - begun), "ids": ids}

    serve({}, once)

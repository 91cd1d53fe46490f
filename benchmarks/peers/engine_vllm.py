"""vLLM's offline engine on given prompts: prints one JSON line with its speed."""

import json
import sys
import time

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    llm = LLM(model=spec["folder"], dtype="float32", max_model_len=2048, max_num_seqs=16)
    prompts = [{"prompt_token_ids": prompt} for prompt in spec["prompts"]]
    llm.generate(prompts[:1], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    begun = time.monotonic()
    made = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=spec["tokens"], ignore_eos=True))
    ids = [list(one.outputs[0].token_ids) for one in made]
    print(json.dumps({"tokens_per_second": sum(map(len, ids)) / (time.monotonic() - begun), "ids": ids}))

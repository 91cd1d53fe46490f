"""transformers' generate, one prompt after the other: its speed, a round at a time."""

import json
import sys
import time

from rounds import serve

if __name__ == "__main__":
    import torch
    from transformers import AutoModelForCausalLM

    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    model = AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=torch.float32)
    how = {"do_sample": False, "max_new_tokens": spec["tokens"], "eos_token_id": None, "pad_token_id": 0}
    model.generate(torch.tensor([[1, 2, 3]]), **(how | {"max_new_tokens": 2}))

    def once(asked):
        begun = time.monotonic()
        made = [model.generate(torch.tensor([one]), **how)[0, len(one) :].tolist() for one in asked["prompts"]]
        return {"tokens_per_second": sum(map(len, made)) / (time.monotonic() - begun), "ids": made}

    serve({}, once)

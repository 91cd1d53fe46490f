"""transformers' generate, one prompt after the other: alone, with an assistant model, or with prompt lookup."""

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
    calls = [0]
    model.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    how = {"do_sample": False, "max_new_tokens": spec["tokens"], "pad_token_id": 0}
    if spec.get("lookup"):
        how["prompt_lookup_num_tokens"] = spec["lookup"]
    if spec.get("assistant"):
        how["assistant_model"] = AutoModelForCausalLM.from_pretrained(spec["assistant"], dtype=torch.float32)

    def once(asked):
        """One by one; what the assistant runs is not counted."""
        calls[0], made, begun = 0, [], time.monotonic()
        for one in asked["prompts"]:
            given = torch.tensor([one])
            ids = model.generate(given, attention_mask=torch.ones_like(given), **how)[0, len(one) :].tolist()
            made.append(ids)
        told = {"seconds": time.monotonic() - begun, "ids": made, "made": sum(map(len, made)), "steps": calls[0]}
        return told | {"drafted": 0, "accepted": told["made"] - calls[0]}

    once({"prompts": [[1, 2, 3]]})
    serve({}, once)

"""TRL's DPOTrainer or GRPOTrainer on rows in a given order: prints one JSON line with its steps, losses and memory."""

import json
import os
import re
import resource
import sys
import time
from itertools import pairwise

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rounds import resident, say
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

imported = resident()
spec = json.loads(sys.argv[1])
torch.set_num_threads(spec["threads"])
tokenizer = AutoTokenizer.from_pretrained(spec["model"])
model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
torch.manual_seed(0)
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"))
with open(spec["rows"]) as file:
    data = Dataset.from_list([json.loads(line) for line in file])
COMMON = {
    "output_dir": spec["out"],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": spec["recompute"],
    "max_steps": spec["steps"],
    "learning_rate": spec["lr"],
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "beta": spec["beta"],
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
lengths: list[float] = []


def matched(completions, completion_ids, **_):
    """1 where the pattern is found, else 0."""
    lengths.append(sum(map(len, completion_ids)) / len(completion_ids))
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [float(re.search(spec["pattern"], text) is not None) for text in texts]


def trainer():
    """The one that is asked for."""
    if spec["kind"] == "dpo":
        config = DPOConfig(
            **COMMON,
            per_device_train_batch_size=spec["pairs"],
            train_sampling_strategy="sequential",
            precompute_ref_log_probs=spec["precomputed"],
        )
        return DPOTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    config = GRPOConfig(
        **COMMON,
        per_device_train_batch_size=spec["group"],
        num_generations=spec["group"],
        max_completion_length=spec["tokens"],
        shuffle_dataset=False,
    )
    return GRPOTrainer(model=model, reward_funcs=matched, args=config, train_dataset=data, processing_class=tokenizer)


class Clock(TrainerCallback):
    """When steps begin and end: what is between two steps (rollouts are) belongs to the second."""

    def __init__(self):
        self.ends = []

    def on_train_begin(self, *_, **__):
        self.ends.append(time.monotonic())

    def on_step_end(self, *_, **__):
        self.ends.append(time.monotonic())


made, clock = trainer(), Clock()
made.add_callback(clock)
made.train()
say(
    {
        "seconds": [b - a for a, b in pairwise(clock.ends)],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "imported": imported,
        "losses": [line["loss"] for line in made.state.log_history if "loss" in line],
        "tokens": lengths,
    }
)

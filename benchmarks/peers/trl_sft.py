"""TRL's SFTTrainer on rows in a given order: prints one JSON line with its speed, its losses and its peak memory."""

import json
import os
import resource
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

spec = json.loads(sys.argv[1])
torch.set_num_threads(spec["threads"])
tokenizer = AutoTokenizer.from_pretrained(spec["model"])
model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
if spec["lora"]:
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"))
with open(spec["rows"]) as file:
    rows = [json.loads(line) for line in file]
data = Dataset.from_list([{"prompt": row["question"], "completion": row["answer"]} for row in rows])
config = SFTConfig(
    output_dir=spec["out"],
    use_cpu=True,
    bf16=spec["bf16"],
    per_device_train_batch_size=2 if spec["packing"] else 4,
    max_length=512,
    packing=spec["packing"],
    activation_checkpointing=spec["recompute"],
    max_steps=spec["steps"],
    train_sampling_strategy="sequential",
    learning_rate=spec["lr"],
    lr_scheduler_type="constant",
    weight_decay=0.0,
    max_grad_norm=1.0,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
steps: list[list[float]] = []


class Clock(TrainerCallback):
    def on_step_begin(self, *_, **__):
        steps.append([time.monotonic(), 0.0, 0.0])

    def on_step_end(self, *_, **__):
        steps[-1][1] = time.monotonic()


plain = trainer.compute_loss


def counted(model, inputs, *args, **kwargs):
    mask = inputs.get("attention_mask")
    steps[-1][2] += float(mask.sum()) if mask is not None else inputs["input_ids"].numel()
    return plain(model, inputs, *args, **kwargs)


trainer.compute_loss = counted
trainer.add_callback(Clock())
trainer.train()
timed = steps[1:]
print(
    json.dumps(
        {
            "tokens_per_second": sum(s[2] for s in timed) / sum(s[1] - s[0] for s in timed),
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        }
    )
)

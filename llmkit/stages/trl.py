"""`kind: trl`: a trainer of TRL over llmkit's model, adapter, rows, rewards and engine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from llmkit.adapters.node import Adapter, Lora
from llmkit.core.config import Conflict, config, setting
from llmkit.data.source_nodes import Source
from llmkit.models.node import ModelRef, NoQuant, Quant
from llmkit.rl.rewards_node import Reward
from llmkit.train.node import Precision

if TYPE_CHECKING:
    from llmkit.core.artifact import Artifact
    from llmkit.core.run import Run

Plain = bool | int | float | str
Argument = Plain | None | tuple[Plain, ...] | Mapping[str, Plain]
OURS = {
    "output_dir": "out",
    "seed": "seed",
    "data_seed": "seed",
    "bf16": "precision",
    "fp16": "precision",
    "use_cpu": "precision",
    "model_init_kwargs": "model",
    "reward_weights": "reward",
}
"""Arguments whose place is a key of the stage."""
NEVER = (
    "trust_remote_code",
    "teacher_model_init_kwargs",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "hub_token",
    "hub_strategy",
    "log_completions",
    "trackio_space_id",
    "project",
    "resume_from_checkpoint",
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "do_predict",
)
"""Arguments of what is not done here: reporting elsewhere, resuming by hand, other processes."""

ELSEWHERE = {
    "AsyncGRPOTrainer": "draws from a vLLM server of its own",
    "AsyncDistillationTrainer": "draws from a vLLM server of its own",
    "ServerDistillationTrainer": "asks a teacher on a server of its own",
}
"""Trainers that need more than one process."""


@config
class Other:
    """A model beside the one that is trained."""

    parameter: str
    """What the trainer calls it: ref_model, teacher_model ..."""
    model: ModelRef
    """Which."""


@config
class TrainerRows:
    """Rows as the trainer reads them: `columns` give theirs its names."""

    train: tuple[Source, ...]
    valid: tuple[Source, ...] = ()

    def problems(self) -> Iterator[Conflict]:
        """Nothing to train on."""
        if not self.train:
            yield Conflict("train", "holds no source", "give one or more")


@config
class Trl:
    """Any trainer of TRL by its name, on a model that llmkit loads and adapts.

    Rows are handed over as they are; `model/`, `metrics.jsonl` and the manifest are those of any stage; a run that was
    stopped goes on from its last checkpoint. One process; nothing is reported to anybody."""

    kind: Literal["trl"] = "trl"
    trainer: str
    """A class of `trl` (DPOTrainer), or of a part of it (experimental.orpo.ORPOTrainer)."""
    arguments: Mapping[str, Argument] = setting(default_factory=dict)
    """Fields of its Config, by TRL's names; one that it does not have is an error."""
    model: ModelRef
    quant: Quant = NoQuant()
    """How the frozen base is held."""
    adapter: Adapter = Lora()
    """What is trained; `none` trains every weight."""
    others: tuple[Other, ...] = ()
    """Models that the trainer takes beside it."""
    data: TrainerRows
    reward: tuple[Reward, ...] = ()
    """What answers are worth, for trainers that ask."""
    engine: bool = True
    """Trainers that write answers do it through llmkit's engine, where it can run the model."""
    precision: Precision = "auto"
    """`auto` is fp32 on CPU and bf16_mixed on GPUs."""
    seed: int = setting(default=0, least=0)
    out: str
    """The run's folder."""

    def problems(self) -> Iterator[Conflict]:
        """Names of no trainer, and arguments that are said elsewhere or never."""
        if not re.fullmatch(r"([a-z0-9_]+\.)*[A-Za-z0-9]+Trainer", self.trainer):
            yield Conflict("trainer", f"{self.trainer} is no name of a trainer", "give one such as DPOTrainer")
        if (why := ELSEWHERE.get(self.trainer.rpartition(".")[2])) is not None:
            yield Conflict("trainer", f"{self.trainer} {why}", "use GRPOTrainer, DistillationTrainer or another")
        if self.types_name == "fp8":
            yield Conflict("precision", "products of fp8 are of llmkit's own loop", "use bf16_mixed")
        if (odd := self.adapter.unfit(self.quant.kind)) is not None:
            yield Conflict("quant.kind", odd[1], odd[2], f"adapter.{odd[0]}")
        for name in self.arguments:
            if name in OURS:
                yield Conflict(f"arguments.{name}", f"is the stage's own {OURS[name]}", f"use {OURS[name]}")
            elif name in NEVER or name.startswith("vllm_") or name == "use_vllm":
                yield Conflict(f"arguments.{name}", "is not done by this stage", f"drop {name}")

    @property
    def types_name(self) -> str:
        """The precision by its name."""
        return self.precision if isinstance(self.precision, str) else self.precision.named

    def check(self, device: str) -> str:
        """One line about the trainer and its rows.

        Raises:
            RecipeError: TRL has no such trainer, or it takes no such arguments.
            DataError: a row cannot be read, or lacks what rewards read.
            ModelError: TRL is not installed, or a model beside the one that is trained is not there.
        """
        from llmkit.stages.trl_parts import checked

        return checked(self, device)

    def run(self, run: Run) -> Artifact:
        """Trains, and leaves `model/`, the manifest and the report."""
        from llmkit.stages.trl_run import train

        return train(self, run)

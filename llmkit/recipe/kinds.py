"""The kinds of stages: those that there are, and those that come later."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from llmkit.core.config import Later
from llmkit.core.hints import hints, kind_of, options
from llmkit.stages.best_of import BestOf
from llmkit.stages.classify import Classify
from llmkit.stages.constitutional import Constitutional
from llmkit.stages.distill import Distill
from llmkit.stages.draft import Draft
from llmkit.stages.evaluate import Evaluate
from llmkit.stages.merge import Merge
from llmkit.stages.policy import Policy
from llmkit.stages.ppo import Ppo
from llmkit.stages.preference import Preference
from llmkit.stages.pretrain import Pretrain
from llmkit.stages.reward import Reward
from llmkit.stages.serve import Serve
from llmkit.stages.sft import Sft
from llmkit.stages.trl import Trl

STAGES = [
    "audit",
    "calibrate",
    "quantize",
    "prune",
    "convert",
    "export",
    "release",
    "monitor",
    "retrain",
    "experiment",
    "federated",
]
OF_PAIRS = ("dpo", "ipo", "simpo", "orpo", "cpo", "apo", "kto")
OF_POLICIES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce")
NAMED = (*OF_PAIRS, *OF_POLICIES)
"""Losses whose names are short for a stage, where it has them."""

Trained = Sft | Classify | Reward | Pretrain | Preference | Policy | Ppo | Distill
Stage = Annotated[Trained | Evaluate | BestOf | Constitutional | Draft | Merge | Serve | Trl, Later(tuple(STAGES))]
KINDS: dict[str, Any] = {kind_of(cls): cls for cls in get_args(get_args(Stage)[0])}
SHORT: dict[str, Any] = {
    kind_of(loss): cls for cls in (Preference, Policy) for loss in options(hints(cls)["loss"]) if kind_of(loss) in NAMED
}
"""By the kind of a loss the stage that its name is short for."""

"""Fine-tune, evaluate and ship large language models from recipes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llmkit.build.llm import LLM as LLM
    from llmkit.core.artifact import Artifact as Artifact
    from llmkit.inference.sampling import Sampling as Sampling
    from llmkit.recipe.execute import run as run
    from llmkit.recipe.load import load_recipe as load_recipe
    from llmkit.stages.best_of import BestOf as BestOf
    from llmkit.stages.classify import Classify as Classify
    from llmkit.stages.constitutional import Constitutional as Constitutional
    from llmkit.stages.distill import Distill as Distill
    from llmkit.stages.draft import Draft as Draft
    from llmkit.stages.evaluate import Evaluate as Evaluate
    from llmkit.stages.merge import Merge as Merge
    from llmkit.stages.preference import Preference as Preference
    from llmkit.stages.pretrain import Pretrain as Pretrain
    from llmkit.stages.reward import Reward as Reward
    from llmkit.stages.sft import Sft as Sft

__all__ = [
    "LLM",
    "Artifact",
    "BestOf",
    "Classify",
    "Constitutional",
    "Distill",
    "Draft",
    "Evaluate",
    "Merge",
    "Preference",
    "Pretrain",
    "Reward",
    "Sampling",
    "Sft",
    "__version__",
    "load_recipe",
    "run",
]

_WHERE = {
    "LLM": "llmkit.build.llm",
    "Artifact": "llmkit.core.artifact",
    "BestOf": "llmkit.stages.best_of",
    "Classify": "llmkit.stages.classify",
    "Constitutional": "llmkit.stages.constitutional",
    "Distill": "llmkit.stages.distill",
    "Draft": "llmkit.stages.draft",
    "Evaluate": "llmkit.stages.evaluate",
    "Merge": "llmkit.stages.merge",
    "Preference": "llmkit.stages.preference",
    "Pretrain": "llmkit.stages.pretrain",
    "Reward": "llmkit.stages.reward",
    "Sampling": "llmkit.inference.sampling",
    "Sft": "llmkit.stages.sft",
    "load_recipe": "llmkit.recipe.load",
    "run": "llmkit.recipe.execute",
}


def __dir__() -> list[str]:
    """The public names, found or not yet."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Public names are found when asked for: `import llmkit` stays fast."""
    if name not in _WHERE:
        raise AttributeError(f"module 'llmkit' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)

"""What the libraries are told before they are imported."""

from __future__ import annotations

import logging
import os
import warnings

LIBRARIES = (
    "transformers",
    "peft",
    "torch",
    "bitsandbytes",
    "huggingface_hub",
    "accelerate",
    "py.warnings",
)
"""The loggers of those whose chatter is for a run's log and not for the screen."""


def prepare(remote: bool = False) -> None:
    """No telemetry, no network unless something remote was named, no chatter on the screen (core/runlog.py has it)."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):  # their imports set their loggers' levels anew
        os.environ.setdefault(name, "error")
    if not remote:
        os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore", module="|".join(LIBRARIES))
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)

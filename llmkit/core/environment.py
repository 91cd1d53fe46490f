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
    "datasets",
    "fsspec",
    "trl",
    "deepspeed",
    "DeepSpeed",
    "py.warnings",
)
"""The loggers of those whose chatter is for a run's log and not for the screen."""
OFFLINE = "HF_HUB_OFFLINE"
BEFORE = "LLMKIT_HUB_OFFLINE_BEFORE"
"""What the user had set `OFFLINE` to, while it is set by us."""


def prepare(remote: bool = False) -> None:
    """No telemetry, no network unless something remote was named, no chatter on the screen (core/runlog.py has it)."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # a request to somebody else for every data set
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):  # their imports set their loggers' levels anew
        os.environ.setdefault(name, "error")
    _set_offline(not remote)
    warnings.filterwarnings("ignore", module="|".join(LIBRARIES))
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)


def _set_offline(wanted: bool) -> None:
    """Takes the Hub away from its library, or gives it back as the user has it: one process may do both in turn."""
    if wanted and os.environ.get(OFFLINE) != "1":
        os.environ[BEFORE] = os.environ.get(OFFLINE, "")
        os.environ[OFFLINE] = "1"
    elif not wanted and BEFORE in os.environ:
        users = os.environ.pop(BEFORE)
        os.environ.pop(OFFLINE, None)
        if users:
            os.environ[OFFLINE] = users

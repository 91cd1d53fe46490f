"""What the libraries are told before they are imported."""

from __future__ import annotations

import logging
import os
import warnings


def prepare(remote: bool = False) -> None:
    """No telemetry, no network unless something remote was named, no chatter on the user's screen."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    if not remote:
        os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    for name in ("bitsandbytes", "transformers", "peft", "torch", "py.warnings"):
        logging.getLogger(name).setLevel(logging.ERROR)

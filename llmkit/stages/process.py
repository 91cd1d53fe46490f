"""What is set for a whole process before a stage of training begins in it."""

from __future__ import annotations

import os

import torch

from llmkit.core.memory import keep_freed_memory
from llmkit.core.run import Run


def begin(run: Run, deterministic: bool) -> None:
    """Memory that is freed is kept, threads are the run's, and kernels give equal bits where that is asked for."""
    keep_freed_memory()
    torch.set_num_threads(run.threads)
    if deterministic:  # cuBLAS asks for a workspace of one size then, before its first product
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=False)

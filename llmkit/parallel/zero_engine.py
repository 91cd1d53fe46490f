"""DeepSpeed itself: imported for a device, quiet, and without what it would compile for nothing."""

from __future__ import annotations

import logging
import os
from typing import Any

from llmkit.core.errors import ModelError


def imported(device: str) -> Any:
    """The package, set to a kind of device; what it says goes to the run's log.

    Raises:
        ModelError: it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device)
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        import deepspeed
    except ImportError as cause:
        what = f"zero needs the package deepspeed ({cause})"
        raise ModelError(what, fix="pip install llmkit[deepspeed]", key="parallel.strategy") from cause
    logger = logging.getLogger("DeepSpeed")
    logger.handlers = [handler for handler in logger.handlers if type(handler) is not logging.StreamHandler]
    logger.propagate = True
    if device == "cpu":
        deepspeed.accelerator.set_accelerator(_host())
    return deepspeed


def _host() -> Any:
    """DeepSpeed's own view of a CPU, without its operation for shared memory: a minute of compiling at the first
    use, for inference alone."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Host(CPU_Accelerator):  # type: ignore[misc]
        def create_op_builder(self, op_name: str) -> Any:
            return None if op_name == "ShareMemCommBuilder" else super().create_op_builder(op_name)

        def device_count(self) -> int:
            return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    return Host()

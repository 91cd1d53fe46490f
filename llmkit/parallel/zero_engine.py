"""DeepSpeed itself: imported for a device, quiet, and without what it would compile for nothing."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from typing import Any

from llmkit.core.errors import ModelError, Problem, RecipeError, ResourceError


def check(device: str, disk: bool) -> None:
    """Sees to it, before any heavy work, that DeepSpeed is there, and what it needs for a `disk`.

    Raises:
        ModelError: it is not installed.
        ResourceError: it cannot reach a disk in the background.
    """
    if find_spec("deepspeed") is None:
        fix = "pip install llmkit[deepspeed]"
        raise ModelError("zero needs the package deepspeed", fix=fix, key="parallel.strategy")
    if not disk:
        return
    builder = imported(device).accelerator.get_accelerator().create_op_builder("AsyncIOBuilder")
    if builder is None or not builder.is_compatible(verbose=False):
        raise ResourceError(
            "nvme needs DeepSpeed's async_io, which is compiled against libaio, and that is not here",
            fix="install libaio-dev and a C++ compiler, or set cpu",
            key="parallel.strategy.offload",
        )


def check_config(path: str, settings: dict[str, Any], device: str) -> None:
    """Sees to it that DeepSpeed takes the values of a configuration that a user gave.

    Raises:
        RecipeError: it does not; a problem for each value.
    """
    imported(device)
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**settings.get("zero_optimization", {}))
    except ValidationError as cause:
        found = [
            Problem(
                f"zero_optimization.{'.'.join(map(str, one['loc']))}: {one['input']} is wrong: {one['msg']}",
                "see DeepSpeed's documentation of the key",
                file=path,
            )
            for one in cause.errors()
        ]
        raise RecipeError(problems=found) from cause


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

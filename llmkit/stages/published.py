"""A policy's weights as files that a vLLM server reads, version by version."""

from __future__ import annotations

import copy
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmkit.build.training import Built
from llmkit.core.errors import LlmkitError
from llmkit.inference.endpoint import Manners
from llmkit.inference.node import Vllm
from llmkit.inference.text import Texts
from llmkit.inference.vllm_served import VllmServed
from llmkit.inference.vllm_weights import VllmWeights
from llmkit.models.load import quiet
from llmkit.parallel.chunks import Route
from llmkit.parallel.steps import Steps
from llmkit.rl.sync import Published
from llmkit.stages.job import Job

FOLDER = "weights"
"""Of the run: where the server reads them."""


class Publisher:
    """Gathers what is trained on the main rank, in the host's memory, writes it and tells the server."""

    def __init__(self, job: Job, built: Built, steps: Steps, server: VllmWeights) -> None:
        self.run, self.built, self.steps, self.server = job.run, built, steps, server
        main = job.run.main
        self.route = Route(job.run.peers, steps.params, steps.lying, main)
        self.into = {name: _room(steps, name) for name in steps.params} if main else {}
        self.adapted = hasattr(built.model, "peft_config")
        self.mark, self.last = job.run.peers.share(secrets.token_hex(4)), ""

    def __call__(self, version: int) -> str:
        """The server has this version.

        Raises:
            ModelError: it does not take it.
        """
        self.route.follow(self.steps.lying, self.into, self.run.device)
        name = f"{self.mark}-{version}"
        with self.run.peers.alone("data"):
            if self.run.main:
                self._tell(name)
        self.run.peers.barrier("data")
        return name if self.adapted else ""

    def _tell(self, name: str) -> None:
        folder = self.run.folder / FOLDER / name
        written(self.built, self.into, folder)
        if self.adapted:
            self.server.load(name, folder.resolve())
        else:
            self.server.reload(folder.resolve())
        before, self.last = self.last, name
        if before and self.adapted:
            self.server.drop(before)
        if before:
            shutil.rmtree(folder.with_name(before))

    def close(self) -> None:
        """What lies there is nobody's any more. A server that does not let go of it is no fault of the run's."""
        if not self.run.main:
            return
        try:
            if self.last and self.adapted:
                self.server.drop(self.last)
        except LlmkitError as fault:
            self.run.console.notice(f"the server keeps the adapter {self.last}: {fault}")
        finally:
            shutil.rmtree(self.run.folder / FOLDER, ignore_errors=True)


@contextmanager
def published(job: Job, built: Built, steps: Steps, node: Vllm, temperature: float) -> Iterator[Published]:
    """A server that draws, as the generator `vllm` asks one."""
    manners = Manners(node.url, node.key, node.sequences, node.tries, node.timeout, "rollout.vllm")
    with ExitStack() as stack:
        server = VllmWeights(manners)
        stack.callback(server.close)
        publisher = Publisher(job, built, steps, server)
        stack.callback(publisher.close)
        writer = VllmServed(manners, node.model, Texts(built.loaded.tokenizer))
        stack.callback(writer.close)
        yield Published(writer, job.run.peers, publisher, temperature)


def written(built: Built, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Trained tensors as files: an adapter in peft's format, or a whole model's."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model: Any = built.model
    with quiet(), torch.no_grad():
        if not hasattr(model, "peft_config"):
            model.save_pretrained(folder, state_dict=dict(tensors))
            return
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(model, state_dict=dict(tensors), save_embedding_layers=False)
        save_file(state, folder / "adapter_model.safetensors")
        settings = copy.copy(model.peft_config["default"])
        settings.base_model_name_or_path, settings.inference_mode = str(built.loaded.resolved.folder), True
        settings.save_pretrained(folder)


def _room(steps: Steps, name: str) -> Tensor:
    p = steps.params[name]
    shape = getattr(p, "ds_shape", steps.lying(name)[0].shape)
    return torch.empty(tuple(shape), dtype=p.dtype)

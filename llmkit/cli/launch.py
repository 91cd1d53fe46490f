"""`llmkit launch`: a recipe on many devices, by a launcher."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from shutil import which

import yaml

from llmkit.core.errors import LlmkitError, RecipeError
from llmkit.core.ranks import Ranks
from llmkit.launch.commands import hosts, slurm
from llmkit.launch.job import Job
from llmkit.launch.kubernetes import manifests
from llmkit.recipe import shipped

ENGINES = ("torchrun", "deepspeed", "slurm", "kubernetes")


def launch(job: Job, engine: str, show: bool) -> None:
    """Starts a job, or shows the command or manifest that would; a recipe that does not fit its ranks starts nothing.

    Raises:
        RecipeError: the engine is unknown or not installed, or the recipe, the hosts and the ranks do not go together.
    """
    if engine not in ENGINES:
        raise RecipeError(f"--engine {engine} is unknown", fix=f"use one of {', '.join(ENGINES)}")
    _check(job)
    if engine == "kubernetes":
        text = yaml.safe_dump_all(manifests(job), sort_keys=False)
        _say(text) if show else _apply(text)
        return
    scripts = shipped.folder("launch")
    command = slurm(job, scripts) if engine == "slurm" else hosts(job, engine, scripts)
    if show:
        _say(_shown(command, engine))
    else:
        _become(command)


def _check(job: Job) -> None:
    """The recipe is sound, and its degrees go with the ranks and with a model that is here."""
    from llmkit.models.outline import config_of
    from llmkit.recipe.execute import check_ranks
    from llmkit.recipe.load import load_recipe
    from llmkit.stages.degrees import check_degrees
    from llmkit.stages.training import Training

    loaded = load_recipe(job.recipe, job.overrides)
    check_ranks(loaded, Ranks(0, job.world, 0, job.gpus))
    for node in (node for _, node in loaded.stages if isinstance(node, Training)):
        if (config := config_of(node.model)) is not None:
            check_degrees(config, node.parallel)


def _shown(command: list[str], engine: str) -> str:
    """The command; of the hosts' scripts what they run on each host, in their own words."""
    if engine == "slurm":
        return shlex.join(command) + "\n"
    said = subprocess.run([*command[:2], "--print", *command[2:]], env=_environment(), capture_output=True, text=True)
    if said.returncode:
        raise LlmkitError(said.stderr.strip().removeprefix("llmkit: error: "))
    return said.stdout


def _environment() -> dict[str, str]:
    """Ours: the ranks run under the Python that runs us."""
    return {"PYTHON": sys.executable, **os.environ}


def _become(command: list[str]) -> None:
    """The launcher takes this process's place: it gets its signals, and its exit status is ours."""
    if which(command[0]) is None:
        raise RecipeError(f"{command[0]} is not installed here", fix="run it where it is, or use --print")
    sys.stdout.flush()
    os.execvpe(command[0], command, _environment())


def _apply(text: str) -> None:
    if which("kubectl") is None:
        raise RecipeError("kubectl is not installed here", fix="see the manifest by --print")
    done = subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True)
    if done.returncode:
        raise LlmkitError("kubectl did not take the manifest", fix="see what it says, and the manifest by --print")


def _say(text: str) -> None:
    sys.stdout.write(text)

"""Running a recipe, stage by stage, each in its folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmkit.checkpoint.identity import code, packages
from llmkit.core.artifact import Artifact
from llmkit.core.console import Console
from llmkit.core.convert import under
from llmkit.core.environment import prepare
from llmkit.core.errors import LlmkitError, RecipeError, Stopped
from llmkit.core.files import full_disk_named, refused
from llmkit.core.folder import Claim, claim, differences, inherit, read_status, shared, steps, write_recipe
from llmkit.core.memory import device, out_of_memory_named
from llmkit.core.own import begun
from llmkit.core.peers import Alone, Peers
from llmkit.core.ranks import Ranks, ranks
from llmkit.core.run import Grants, Run
from llmkit.core.runlog import run_log
from llmkit.core.scalars import Origin
from llmkit.core.stop import Stop
from llmkit.core.usercode import allowed
from llmkit.core.walk import each
from llmkit.core.wording import cut, yaml_word
from llmkit.recipe.inputs import fetched, inputs, models, own_code, remote
from llmkit.recipe.load import Recipe, digest
from llmkit.recipe.show import environment, environment_hidden, hide_environment, resolved, stage_values
from llmkit.recipe.told import named, problem
from llmkit.stages.known import ESCAPES
from llmkit.stages.overview import NAME, remember, write_overview
from llmkit.stages.training import Training

KNOB = "ask for shorter or fewer rows, or take a smaller model"


def run(recipe: Any, *, resume: str = "auto", grants: Grants | None = None, console: Console | None = None) -> Artifact:
    """Runs a `Recipe`, or one stage built in Python; gives the last stage's artifact.

    Raises:
        LlmkitError: what went wrong, with its exit status.
    """
    whole = recipe if isinstance(recipe, Recipe) else Recipe((("", recipe),), {"": Origin()})
    mine = ranks()
    console, grants = console or Console(mute=not mine.main), grants or Grants()
    _check_resume(whole, resume)
    _stay_offline(whole)
    joining = check_ranks(whole, mine)
    _check_device(whole)
    _check_code(whole, grants)
    artifact: Artifact | None = None
    with ExitStack() as stack:
        stop, peers = stack.enter_context(Stop()), Alone()  # type: Stop, Peers
        if joining is not None:
            shared = _shared(whole, resume, grants)
            with stop.at_once("before training"):
                peers = stack.enter_context(joining.parallel.join(mine, device(), shared, joining.aside))
        for name, node in whole.stages:
            given = Around(_resume_of(name, node, resume), grants, console, stop, peers)
            artifact = _stage(whole, name, node, given)
    if artifact is None:
        raise RecipeError("has no stages", fix="add one")
    return artifact


@dataclass(frozen=True)
class Around:
    """What a stage runs in."""

    resume: str
    grants: Grants
    console: Console
    stop: Stop
    peers: Peers


def check_ranks(recipe: Recipe, mine: Ranks) -> Training | None:
    """What says how the ranks are joined, where there are several: the first stage that trains.

    Raises:
        RecipeError: no stage has a use for them, or their number does not fit.
    """
    found = [(name, node) for name, node in recipe.stages if isinstance(node, Training)]
    if not found and mine.world > 1:
        raise RecipeError(f"{mine.world} ranks, and nothing here is trained", fix="run one process")
    for name, node in found:
        with named(recipe, name):
            node.check_ranks(mine)
    return found[0][1] if mine.world > 1 else None


def _shared(recipe: Recipe, resume: str, grants: Grants) -> dict[str, Any]:
    """What all ranks must have alike."""
    stages = {name: {**stage_values(recipe, name), "env": environment(recipe, name)} for name, _ in recipe.stages}
    told = {"resume": resume, **asdict(grants), "accept": list(grants.accept)}
    return {"recipe": stages.get("", stages), "--": told, "packages": packages(), "code": code()}


def _check_device(recipe: Recipe) -> None:
    """What the stages that are not done need of the device is asked before the first one begins."""
    for _, node in recipe.stages:
        if isinstance(node, Training) and read_status(Path(node.out)).get("state") != "done":
            node.needs(device())


def _check_code(recipe: Recipe, grants: Grants) -> None:
    """What the stages that are not done run of the user's own is asked about, and what of it runs in this process is
    tried, before the first one begins."""
    for name, node in recipe.stages:
        if read_status(Path(node.out)).get("state") != "done":
            with named(recipe, name):
                for key, ref in own_code(node):
                    allowed(ref, grants.python, key)
                for key, one in each(node, ESCAPES):
                    begun(one, grants.python, under(key, "ref"))


def _resume_of(name: str, node: Any, resume: str) -> str:
    """What `--resume` says to a stage: a checkpoint of a pipeline is for the stage that it is of."""
    of_another = name and resume not in ("auto", "never") and not _checkpoint_of(node, resume)
    return "auto" if of_another else resume


def _check_resume(recipe: Recipe, resume: str) -> None:
    pipeline, plain = bool(recipe.stages[0][0]), resume in ("auto", "never")
    if pipeline and not plain and not any(_checkpoint_of(node, resume) for _, node in recipe.stages):
        raise RecipeError(f"--resume {resume} is of no stage", fix=f"give {recipe.out}/NAME/checkpoints/step-N")


def _checkpoint_of(node: Any, resume: str) -> bool:
    return Path(resume).resolve().parent == (Path(node.out) / "checkpoints").resolve()


def _stay_offline(recipe: Recipe) -> None:
    """No library asks the network for anything unless something is named that only the Hub has, or that goes there."""
    made, online = list[str](), False
    for _, node in recipe.stages:
        named = any(fetched(ref.name, made) for ref in models(node))
        online = online or named or remote(node, made) or bool(getattr(node, "push", None))
        made.append(node.out)
    prepare(remote=online)


def _stage(recipe: Recipe, name: str, node: Any, around: Around) -> Artifact:
    """One stage, by all ranks: the main one holds the folder and writes what the run leaves."""
    peers, held, finished = around.peers, None, None
    with peers.alone("start"):
        if peers.ranks.main:
            finished = _finished(recipe, name, node, around.resume, around.console)
            resume = around.resume if around.resume == "never" else "auto"
            held = claim(Path(node.out), resume, around.console) if finished is None else None
    if peers.share(finished is not None):
        return finished or Artifact(Path(node.out))
    return _follow(recipe, name, node, around) if held is None else _lead(recipe, name, node, around, held)


def _lead(recipe: Recipe, name: str, node: Any, around: Around, held: Claim) -> Artifact:
    """A stage on the rank that writes what it leaves."""
    folder = Path(node.out)
    try:
        write_recipe(folder, recipe.text or resolved(recipe, name), resolved(recipe, name))
        if name:
            remember(recipe.out, recipe.stages)
        held.status("running", held.before.get("step", 0), pid=os.getpid())
        around.peers.closing(partial(_failed, recipe, held))
        made = _run(recipe, name, node, around)
        read = inputs(node)  # before the work: what comes later is not what it was made from
        artifact = _work(recipe, name, node, made)
        around.peers.closing(None)
        said: dict[str, Any] = {"digest": digest(node), "inputs": read, "environment": made.environment}
        held.status("done", artifact.manifest.get("step", 0), **said)
    except BaseException as cause:
        _failed(recipe, held, cause)
        with suppress(LlmkitError):  # the first fault is the one to tell
            _overview(recipe)
        raise
    finally:
        held.release()
    _overview(recipe)
    around.peers.barrier("exit")
    return artifact


def _run(recipe: Recipe, name: str, node: Any, around: Around) -> Run:
    return Run(
        Path(node.out),
        node.seed,
        device(),
        _threads(),
        digest(node),
        around.console,
        around.stop,
        around.peers if around.peers.apart is None else around.peers.apart.own,
        resume=around.resume,
        grants=around.grants,
        values=stage_values(recipe, name),
        environment=environment(recipe, name),
    )


def _follow(recipe: Recipe, name: str, node: Any, around: Around) -> Artifact:
    """A stage on a rank that writes nothing of what the run leaves."""
    if isinstance(node, Training):
        run = _run(recipe, name, node, around)
        shared(run.folder, run.ranks.name)
        try:
            run.scratch.mkdir(parents=True, exist_ok=True)
        except OSError as cause:
            raise refused(cause, "making", run.scratch) from cause
        around.peers.closing(partial(inherit, run.folder))
        _work(recipe, name, node, run)
    around.peers.barrier("exit")  # until then the main rank may die, and leave its status to who is left
    around.peers.closing(None)
    return Artifact(Path(node.out))


def _work(recipe: Recipe, name: str, node: Any, made: Run) -> Artifact:
    """The stage's own part, with what the libraries say kept, secrets hidden and faults named."""
    with (
        run_log(made.scratch, partial(hide_environment, recipe)),
        made.peers.at_work(made.scratch),
        environment_hidden(recipe),
        named(recipe, name),
        full_disk_named(made.folder),
        out_of_memory_named(made.device, KNOB),
    ):
        artifact: Artifact = node.run(made)
    return artifact


def _overview(recipe: Recipe) -> None:
    if (recipe.out / NAME).is_file():
        write_overview(recipe.out)


def _finished(recipe: Recipe, name: str, node: Any, resume: str, console: Console) -> Artifact | None:
    """The artifact of a stage that is done already.

    Raises:
        RecipeError: it was made from another recipe, model or data; each key that differs is named.
    """
    folder = Path(node.out)
    before = read_status(folder)
    if before.get("state") != "done" or resume == "never":
        return None
    artifact = Artifact(folder)
    if wrong := _changes(recipe, name, before, artifact.manifest.get("recipe", {})):
        fix = f"name another out, or remove {folder}"
        raise RecipeError(problems=[problem(recipe, name, key, what, fix) for key, what in wrong.items()])
    step = before.get("step")
    console.notice(f"{folder} is done already" + (f", at step {step} of {step}" if step else ""))
    return artifact


def _changes(recipe: Recipe, name: str, before: Mapping[str, Any], made_with: Mapping[str, Any]) -> dict[str, str]:
    """What a stage that is done was made from and that is not so any more, by key."""
    node = dict(recipe.stages)[name]
    folder = node.out
    if before.get("digest") != digest(node):
        values = differences(made_with, stage_values(recipe, name))
        environs = differences(before.get("environment", {}), environment(recipe, name))
        found = {
            key: f"is {_short(new)}, and {folder} was made with {_short(old)}" for key, old, new in [*environs, *values]
        }
        found.pop("out", None)
        return found or {"out": f"{folder} was made with other values"}
    now, then = inputs(node), before.get("inputs", {})
    return {key: f"has changed since {folder} was made from it" for key in now.keys() & then if now[key] != then[key]}


def _short(value: Any) -> str:
    return cut(yaml_word(value), 80)


def _failed(recipe: Recipe, held: Claim, cause: BaseException) -> bool:
    """Leaves the status, and says so; of an error that came before anything was done, nothing."""
    whole = held.folder == recipe.out or recipe.out in held.made  # what earlier stages did stays, and its page
    early = isinstance(cause, LlmkitError) and not isinstance(cause, Stopped)
    if whole and early and held.forget([recipe.out / NAME]):
        return False
    stopped = isinstance(cause, Stopped | KeyboardInterrupt)
    code = 75 if stopped else cause.code if isinstance(cause, LlmkitError) else 1
    why = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
    saved = steps(held.folder / "checkpoints")[:1]
    held.status("stopped" if stopped else "failed", saved[0] if saved else 0, code, why)
    return True


def _threads() -> int:
    import torch

    return torch.get_num_threads()

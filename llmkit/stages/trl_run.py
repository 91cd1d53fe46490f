"""A trainer of TRL at work: made, resumed, listened to, and what it leaves."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from llmkit.build.opening import load
from llmkit.build.precision import Types, types
from llmkit.build.training import Built, build, how
from llmkit.checkpoint.identity import compare, packages, processor
from llmkit.core.artifact import Artifact, publish
from llmkit.core.errors import ModelError, Stopped
from llmkit.core.files import write_json
from llmkit.core.metrics import Lines
from llmkit.core.run import Run
from llmkit.models.export import export
from llmkit.models.load import quiet
from llmkit.models.node import Head, ModelRef
from llmkit.models.resolve import resolve
from llmkit.models.rewarded import OUTCOME
from llmkit.rl.bench import Bench
from llmkit.stages.report import write_report
from llmkit.stages.trl import Trl
from llmkit.stages.trl_parts import Trainer, beside, check_reference, fit_together, rows, settings, trainer
from llmkit.stages.trl_rollout import Rollouts, reward_functions

SIDES: Mapping[Literal["train", "valid"], str] = {"train": "train_dataset", "valid": "eval_dataset"}
"""What a trainer calls its rows."""
LAST = "trainer_state.json"
"""The file of a checkpoint that is written last."""


def train(node: Trl, run: Run) -> Artifact:
    """Trains, and leaves `model/`, the manifest and the report.

    Raises:
        Stopped: someone asked; the step that was last is saved.
    """
    torch.set_num_threads(run.threads)
    kind = trainer(node.trainer)
    fit_together(node, kind)
    others = beside(node)
    kinds = types(node.types_name, run.device)
    metrics = Lines(run.folder / "metrics.jsonl")
    with ExitStack() as opened, quiet(), without_bars():
        bench = opened.enter_context(Bench(run.grants, run.device))
        made, built = _made(node, run, kind, kinds, bench)
        found = checkpoint(run)
        _same(node, run, built, others, found)
        metrics.cut(_size(metrics, found))
        listener = Listener(run, metrics)
        made.add_callback(listener)
        for callback in (PrinterCallback, ProgressCallback):
            made.remove_callback(callback)
        if found is not None:
            run.console.notice(f"resuming from {found.name}")
        made.train(resume_from_checkpoint=None if found is None else str(found))
        step = int(made.state.global_step)
        if listener.why:
            raise Stopped(f"{listener.why} in step {step}", fix="run the same command again to go on")
        return _leave(node, run, made, built, kinds, step)


def _made(node: Trl, run: Run, kind: Trainer, kinds: Types, bench: Bench) -> tuple[Any, Built]:
    """The trainer with all that it takes, and the model in it."""
    from datasets import Dataset

    args = settings(node, kind, run.device, run.folder / "checkpoints")
    check_reference(node, kind, args)
    sets = {name: rows(node, side) for side, name in SIDES.items() if getattr(node.data, side)}
    resolved = resolve(node.model)
    held = how(run.device, kinds, node.quant, node.adapter, run.grants.code, run.grants.nonfinite)
    own = replace(held, head=Head("sequence", OUTCOME, node.seed)) if kind.scores else held
    built = build(resolved, node.model, own, node.adapter, 0, node.seed, run.console.notice)
    others = {other.parameter: other.model for other in node.others}
    if kind.takes("ref_model") and not node.adapter.frozen_base:  # read as the policy is, and not by its path alone
        others.setdefault("ref_model", node.model)
    given = {name: _frozen(ref, held) for name, ref in others.items()}
    if node.reward:
        given["reward_funcs"] = reward_functions(node.reward, bench)
    if kind.takes("rollout_func") and node.engine:
        if built.loaded.support.paged:
            given["rollout_func"] = Rollouts(built, node.seed)
        else:
            run.console.notice("answers are written by TRL: the engine cannot run this model")
    given |= {name: Dataset.from_list(found) for name, found in sets.items()}
    built.model.train()
    try:
        return kind.kind(model=built.model, args=args, processing_class=built.loaded.tokenizer, **given), built
    except (TypeError, ValueError, KeyError, NotImplementedError) as cause:
        what = f"{node.trainer} does not take it: {type(cause).__name__}: {str(cause).strip().splitlines()[0][:300]}"
        raise ModelError(what, fix="see run.log, and mend data or arguments", key="trainer") from cause


def _frozen(ref: ModelRef, held: Any) -> Any:
    """A model that stays as it is."""
    model = load(resolve(ref), ref, held).model
    return model.requires_grad_(False).eval()


def checkpoint(run: Run) -> Path | None:
    """The checkpoint to go on from: the last whole one, or the one that was asked for.

    Raises:
        ModelError: that one is not whole.
    """
    folder = run.folder / "checkpoints"
    if run.resume not in ("auto", "never"):
        if not (Path(run.resume) / LAST).is_file():
            raise ModelError(f"{run.resume} is no whole checkpoint of TRL", fix="give another, or --resume auto")
        return Path(run.resume)
    found = [one for one in folder.glob("checkpoint-*") if (one / LAST).is_file()] if run.resume == "auto" else []
    return max(found, key=lambda one: int(one.name.rpartition("-")[2]), default=None)


def _same(node: Trl, run: Run, built: Built, others: Mapping[str, Any], found: Path | None) -> None:
    """Sees to it that a run which goes on is the one that began; one that begins leaves what it is known by, `others`
    among it.

    Raises:
        RecipeError: something differs.
    """
    mine = {
        "recipe": {key: value for key, value in run.values.items() if key != "out"},
        "packages": packages(),
        "model": built.loaded.resolved.facts(),
        "files": {path: said for one in (*node.data.train, *node.data.valid) for path, said in one.files().items()},
        **others,
    }
    path = run.folder / "checkpoints" / "identity.json"
    if found is None or not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, mine)
        return
    for changed in compare(json.loads(path.read_text("utf-8")), mine, run.grants.accept):
        run.console.notice(f"going on with a change: {changed}")


def _size(metrics: Lines, found: Path | None) -> int:
    """Bytes of the lines that a checkpoint comes after."""
    if found is None or not metrics.path.exists():
        return 0
    last, size = int(json.loads((found / LAST).read_text("utf-8"))["global_step"]), 0
    for line in metrics.path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n") or json.loads(line)["step"] > last:
            break
        size += len(line)
    return size


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bars of datasets."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    bars = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            enable_progress_bar()


class Listener(TrainerCallback):  # type: ignore[misc]
    """Writes what a trainer logs to `metrics.jsonl`, and ends it where the run is asked to stop."""

    def __init__(self, run: Run, metrics: Lines) -> None:
        self.run, self.metrics = run, metrics
        self.why = ""
        """Why it stopped."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The progress begins."""
        self.run.console.start("training", int(state.max_steps), int(state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """A line for each; the summary at the end, which holds times alone, is none."""
        said = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        if "train_runtime" in said:
            return
        evaluated = any(name.startswith("eval_") for name in said)
        line = {"event": "evaluate" if evaluated else "train", "step": int(state.global_step)}
        self.metrics.add(line | {_named(name): value for name, value in said.items()})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Saves and ends where someone asked."""
        self.run.console.step("training", int(state.global_step), int(state.max_steps), "")
        if not self.why and (why := self.run.stop.asked()) and state.global_step < state.max_steps:
            self.why = why
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The progress ends."""
        self.run.console.end()


def _named(name: str) -> str:
    """A figure by our name for it."""
    known = {"learning_rate": "lr"}
    return f"valid.{name.removeprefix('eval_')}" if name.startswith("eval_") else known.get(name, name)


def _leave(node: Trl, run: Run, made: Any, built: Built, kinds: Types, step: int) -> Artifact:
    """The model as any stage leaves it, with manifest and report."""
    model, loaded = made.accelerator.unwrap_model(made.model), built.loaded
    for name in list(getattr(model, "peft_config", {})):
        if name != "default":  # the trainer's own copy of the start, as a reference
            model.delete_adapter(name)
    node.adapter.finish(model)
    export(model, loaded.tokenizer, run.folder / "model", loaded.resolved, node.quant, node.model.rope)
    write_report(run.folder)
    return publish(
        run.folder,
        {
            "kind": node.kind,
            "trainer": node.trainer,
            "base": loaded.resolved.facts(),
            "recipe_digest": run.recipe_digest,
            "recipe": run.values,
            "packages": packages(),
            "processor": processor(),
            "seed": node.seed,
            "threads": run.threads,
            "device": run.device,
            "precision": kinds.name,
            "step": step,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
        },
    )

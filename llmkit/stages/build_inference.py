"""Puts the stages together that read a model and train nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from llmkit.adapters.limits import UNMERGEABLE
from llmkit.build.exactness import exactness
from llmkit.build.held import Here
from llmkit.build.opening import load
from llmkit.build.precision import Types, types
from llmkit.build.training import check, headed
from llmkit.core import records
from llmkit.core.artifact import Artifact, publish
from llmkit.core.errors import ModelError
from llmkit.core.records import GateSpec, Prediction
from llmkit.core.run import Grants, Run
from llmkit.core.types import Report
from llmkit.evals.run import Subject
from llmkit.evals.tasks import Generation, longest
from llmkit.inference.writer import Writer
from llmkit.models.adapted import method
from llmkit.models.export import export
from llmkit.models.load import How, Loaded
from llmkit.models.node import ModelRef, NoQuant, Quant
from llmkit.models.positions import check_length
from llmkit.models.resolve import Resolved, resolve
from llmkit.models.rewarded import judges_steps, scores_answers
from llmkit.stages.evaluate import Evaluate
from llmkit.stages.merge import Merge
from llmkit.stages.report import write_report, write_reports


def open_model(
    ref: ModelRef, device: str, precision: str, grants: Grants, quant: Quant | None = None
) -> tuple[Loaded, Types]:
    """A model for reading; without `quant` an adapter's base is held as it was in training.

    Raises:
        ModelError: it cannot be loaded.
    """
    kinds = types(precision, device)
    resolved = resolve(ref)
    how = How(device, kinds.params, kinds.half, quant or resolved.quant, grants.code, grants.nonfinite)
    return load(resolved, ref, how), kinds


def evaluate(node: Evaluate, run: Run) -> Artifact:
    """Runs every task, and leaves the table, the reports and the manifest."""
    torch.set_num_threads(run.threads)
    with run.stop.at_once("in evaluation"):
        loaded, kinds, table, reports = _asked(node, run)
    records.write(run.folder / "predictions.jsonl", table)
    write_reports(run, reports)
    write_report(run.folder)
    facts = {
        "kind": node.kind,
        "model": loaded.resolved.facts(),
        "recipe_digest": run.recipe_digest,
        "recipe": run.values,
        "attention": loaded.attention,
        "precision": kinds.name,
        "quant": asdict(node.quant or loaded.resolved.quant),
        "reports": [vars(report) for report in reports],
    }
    if any(isinstance(task, Generation) for task in node.tasks):
        facts["exact"] = exactness(loaded.model, node.generator, kinds.mixed)
    return publish(run.folder, facts)


def _asked(node: Evaluate, run: Run) -> tuple[Loaded, Types, list[Prediction], list[Report]]:
    """The model, how it is held, and what the tasks found."""
    resolved = resolve(node.model)
    for index, task in enumerate(node.tasks):
        key, length = longest(task) or ("", 0)
        if key and (notice := check_length(resolved, length, f"tasks.{index}.{key}", node.model.rope)):
            run.console.notice(notice)
    loaded, kinds = open_model(node.model, run.device, node.precision, run.grants, node.quant)
    _able(node, loaded)
    with ExitStack() as opened:
        subject = _subject(node, run, loaded, kinds, _writer(node, loaded, opened))
        table, reports = _found(node, run, subject)
    return loaded, kinds, table, reports


def _writer(node: Evaluate, loaded: Loaded, opened: ExitStack) -> Callable[[], AbstractContextManager[Writer]]:
    """What makes text for all tasks, where one of them asks for any."""
    held = Here(loaded)
    if not any(isinstance(task, Generation) for task in node.tasks):
        return lambda: closing(node.generator.open(held))
    writer = opened.enter_context(closing(node.generator.open(held)))
    return lambda: nullcontext(writer)


def _subject(
    node: Evaluate, run: Run, loaded: Loaded, kinds: Types, writer: Callable[[], AbstractContextManager[Writer]]
) -> Subject:
    scored = headed(loaded, loaded.model)
    check(scored)
    return Subject(
        scored,
        loaded.model,
        loaded.tokenizer,
        loaded.support.packed,
        run.device,
        writer,
        run.console,
        run.stop.check,
        version=loaded.resolved.sha256[:16],
        run_id=run.recipe_digest[:16],
        autocast=lambda: torch.autocast(run.device, dtype=torch.bfloat16, enabled=kinds.mixed),
        seed=node.seed,
        tree=loaded.support.tree,
    )


def _found(node: Evaluate, run: Run, subject: Subject) -> tuple[list[Prediction], list[Report]]:
    table: list[Prediction] = []
    reports: list[Report] = []
    for task in node.tasks:
        run.console.notice(f"evaluating {task.name}")
        rows, found = task.run(subject)
        table += rows
        reports += found
    return table, reports


NAMED = {"classes": "classifier", "scores": "model that scores answers", "steps": "model that judges steps"}
"""Who gives what tasks ask for, where that is no text."""


def _able(node: Evaluate, loaded: Loaded) -> None:
    """Raises: ModelError when a task asks of the model what it cannot do."""
    able = {
        "text": loaded.head is None,
        "classes": loaded.head is not None,
        "scores": scores_answers(loaded.head),
        "steps": judges_steps(loaded.head),
    }
    for index, task in enumerate(node.tasks):
        if not able[task.asks]:
            is_one = f"is no {NAMED[task.asks]}" if task.asks in NAMED else "is a classifier, and writes no text"
            fix = "give a classifier classification tasks, a reward model pairs or steps, a language model the others"
            raise ModelError(f"{node.model.name} {is_one}", fix=fix, key=f"tasks.{index}.kind")


PROBE = "The quick brown fox jumps over the lazy dog. def add(a, b):\n    return a + b\n1 + 1 = 2; 日本語, Ελλάδα."


def merge(node: Merge, run: Run) -> Artifact:
    """Folds the adapter into its base; publishes only what the gate lets through."""
    torch.set_num_threads(run.threads)
    with run.stop.at_once("in the merge"):
        resolved, merged, measured = _merged(node, run)
    labels = merged.head.labels if merged.head is not None else ()
    export(merged.model, merged.tokenizer, run.folder / "model", resolved.base or resolved, labels=labels)
    facts = {
        "kind": node.kind,
        "adapter": resolved.facts(),
        "recipe_digest": run.recipe_digest,
        "recipe": run.values,
        **measured,
    }
    return publish(run.folder, facts)


def adapter_of(node: Merge) -> Resolved:
    """What is to be folded.

    Raises:
        ModelError: it is no adapter, or none that can be folded.
    """
    resolved = resolve(node.model)
    if resolved.base is None:
        what = f"{node.model.name} is no adapter"
        raise ModelError(what, fix="give an adapter or a run that trained one", key="model")
    if reason := UNMERGEABLE.get(method(resolved.folder)):
        raise ModelError(f"{node.model.name} cannot be merged: {reason}", fix="use it beside its base", key="model")
    return resolved


def _merged(node: Merge, run: Run) -> tuple[Resolved, Loaded, dict[str, Any]]:
    """The adapter, the better one of the ways to fold it, and what tells of that.

    Raises:
        ModelError: it is no adapter, or the gate lets none through.
    """
    resolved = adapter_of(node)
    quant = resolved.quant
    adapted = load(resolved, node.model, How(run.device, "fp32", quant=quant, allow_code=run.grants.code))
    wanted = _logits(adapted)
    best = min(_candidates(node, run, resolved, quant, adapted), key=lambda made: _difference(_logits(made[1]), wanted))
    off = _difference(_logits(best[1]), wanted)
    bound = node.bound or _bound(node, quant, resolved, run, wanted)
    gate = GateSpec("logit_difference", "down", margin=bound, test="point")
    decision = gate.decide([Report("logit_difference", "all", off, 1, off, off)])
    if not decision.passed:
        raise ModelError(
            f"the merged model's logits are off by {off:.2g} of the largest, more than {bound:.2g}",
            fix="merge in fp32, or raise bound",
            key="bound",
        )
    run.console.notice(f"merged ({best[0]}): logits off by {off:.2g} of the largest, bound {bound:.2g}")
    return resolved, best[1], {"way": best[0], "logit_difference": off, "bound": bound}


def _candidates(node: Merge, run: Run, resolved: Resolved, quant: Quant, adapted: Loaded) -> list[tuple[str, Loaded]]:
    """The ways to merge: into the plain base, and into the base as the adapter saw it, dequantised."""
    made = []
    plain = How(run.device, "fp32", allow_code=run.grants.code)
    whole = load(resolved, node.model, plain)
    made.append(("into the base as it is", _typed(_folded(whole), node.precision)))
    if not isinstance(quant, NoQuant):
        twin = load(resolved, node.model, plain)
        _take_dequantised(twin.model, adapted.model)
        made.append(("into the dequantised base", _typed(_folded(twin), node.precision)))
    return made


def _folded(loaded: Loaded) -> Loaded:
    return replace(loaded, model=loaded.model.merge_and_unload())


def _typed(loaded: Loaded, precision: str) -> Loaded:
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    loaded.model.to(kinds[precision])
    loaded.model.config.dtype = kinds[precision]
    return loaded


def _take_dequantised(plain: Any, quantised: Any) -> None:
    """Gives each linear that is quantised, under an adapter or not, the weights that it computes with; GPT-2's are
    quantised on their sides."""
    from peft.utils.integrations import dequantize_module_weight, get_bnb_param_type

    places = dict(plain.named_modules())
    with torch.no_grad():
        for name, module in quantised.named_modules():
            if isinstance(module, torch.nn.Linear) and get_bnb_param_type(module.weight):
                weight = dequantize_module_weight(module)
                places[name].weight.copy_(weight.T if isinstance(places[name], Conv1D) else weight)


def _logits(loaded: Loaded) -> torch.Tensor:
    ids = torch.tensor([loaded.tokenizer(PROBE)["input_ids"]], device=next(loaded.model.parameters()).device)
    with torch.no_grad():
        out: torch.Tensor = loaded.model(input_ids=ids, use_cache=False).logits.float()
    return out


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, as a share of the largest logit."""
    return float((a - b).abs().max() / b.abs().max())


def _bound(node: Merge, quant: Quant, resolved: Resolved, run: Run, wanted: torch.Tensor) -> float:
    """What the types allow; over a quantised base, what its quantisation itself moved the logits by."""
    rounding = 1e-5 if node.precision == "fp32" else 2e-2
    if isinstance(quant, NoQuant) or resolved.base is None:
        return rounding
    rope = node.model.rope or resolved.rope
    bases = [
        load(resolved.base, ModelRef(name=resolved.base.name, rope=rope), How(run.device, "fp32", quant=held))
        for held in (quant, NoQuant())
    ]
    return max(rounding, _difference(_logits(bases[0]), _logits(bases[1])))

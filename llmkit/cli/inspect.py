"""What `llmkit check` tells of a sound recipe: the data as it will be trained on, and the memory it needs."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmkit.adapters.limits import virtual_tokens
from llmkit.build.ranked import check as check_ranks
from llmkit.core.environment import prepare as quiet_libraries
from llmkit.core.errors import DataError, LlmkitError, ModelError, Problem, RecipeError
from llmkit.core.memory import available, device
from llmkit.core.ranks import ranks
from llmkit.core.usercode import check_granted, looked_at
from llmkit.core.walk import each
from llmkit.data.asked import asked_of
from llmkit.data.findings import Finding
from llmkit.data.held_out import FirstRows, Readable
from llmkit.data.node import Data
from llmkit.data.prepare import Prepared, prepare
from llmkit.evals.tasks import (
    Classification,
    Generation,
    MultipleChoice,
    PairTask,
    Passkey,
    Perplexity,
    PositionPerplexity,
    StepTask,
    data_of,
    longest,
)
from llmkit.models.node import ModelRef
from llmkit.models.positions import check_length
from llmkit.models.resolve import resolve
from llmkit.models.tokenizer import read_tokenizer
from llmkit.parallel.apart import training
from llmkit.plan.choice import RECOMPUTE
from llmkit.recipe.inputs import fetched, files, missing, models, own_code, remote
from llmkit.rl.columns import check_columns
from llmkit.rl.constitution import read
from llmkit.rl.rewards_node import files_of, models_of
from llmkit.stages.best_of import BestOf
from llmkit.stages.build_best import some
from llmkit.stages.build_inference import adapter_of
from llmkit.stages.constitution_run import questions
from llmkit.stages.constitutional import Constitutional
from llmkit.stages.evaluate import Evaluate
from llmkit.stages.known import known
from llmkit.stages.lint_table import lines, linted, served, shares
from llmkit.stages.merge import Merge
from llmkit.stages.serve import Serve
from llmkit.stages.sizes import sizes, whole_model
from llmkit.stages.training import Training
from llmkit.stages.trl import Trl


def present(stages: Sequence[tuple[str, Any]], earlier: Collection[str] = ()) -> None:
    """Raises: ModelError, RecipeError or DataError, by the first, as a run would: all that stages read and that is not
    there, nor comes of the ones before, in whose folders, or in `earlier`, it would be."""
    made, fix, lacks, errors = [*earlier], "mend the path, or make it first", list[Problem](), list[type[LlmkitError]]()
    for name, node in stages:
        beside = {*_files_beside(node), *(key for key, _ in own_code(node))}
        for key, path, model in missing(node, made):
            place = f"stages.{name}.{key}" if name else key
            lacks.append(Problem(f"{path} is not there", fix, key=place))
            errors.append(ModelError if model else RecipeError if key in beside else DataError)
        made.append(node.out)
    if lacks:
        raise errors[0](problems=lacks)


def _files_beside(node: Any) -> Mapping[str, str]:
    """Files beside rows and models that a stage reads, by their keys."""
    if isinstance(node, BestOf):
        return files_of(node.reward)
    return node.files_beside() if isinstance(node, Training) else {}


def inspect(name: str, node: Any, show: int, earlier: Collection[str] = (), python: bool = False) -> None:
    """Prints the tables of one stage; `earlier` are the folders of the stages before it, and `python` says whether
    files of the user's own may run.

    Raises:
        LlmkitError: its data or its model cannot be used.
    """
    present([("", node)], earlier)
    for key, ref in own_code(node):
        check_granted(ref, looked_at(ref, key), python, key)
    named = [ref.name for ref in models(node)]
    quiet_libraries(remote=any(fetched(one, earlier) for one in named) or remote(node, earlier))
    title = f"{name}: " if name else ""
    coming = [one for one in named if one in earlier and not Path(one, "model").is_dir()]
    coming += [one for one in files(node) if not Path(one).exists() and any(map(Path(one).is_relative_to, earlier))]
    if coming:
        _say(f"{title}{node.kind} is sound; its data and memory can be told when {coming[0]} is made")
    elif isinstance(node, Constitutional):
        _constitutional(title, node)
    elif isinstance(node, Training):
        _training(title, node, show)
    elif isinstance(node, Evaluate):
        _evaluate(title, node)
    elif isinstance(node, BestOf):
        _best_of(title, node)
    elif isinstance(node, Trl):
        _say(f"{title}{node.check(device())}")
        resolve(node.model)
    else:
        resolved = adapter_of(node) if isinstance(node, Merge) else resolve(node.model)
        if isinstance(node, Serve) and node.engine.tensor > 1:
            check_ranks(resolved, resolved.quant, node.engine.tensor, device())
        _say(f"{title}{node.kind} is sound")


def _training(title: str, node: Training, show: int) -> None:
    where = device()
    node.needs(where)
    resolved = whole_model(node.model) if node.trained else resolve(node.model)
    longest_row = node.data.max_length + virtual_tokens(node.adapter)
    if notice := check_length(resolved, longest_row, "data.max_length", node.model.rope):
        _say(f"{title}{notice}")
    tokenizer = read_tokenizer(resolved, node.model)
    known(node.others(), node.files_beside())
    sets: list[Prepared] = []
    keys: tuple[Literal["train", "valid"], ...] = ("train", "valid")
    for key in keys:
        sources = _looked_at(node, key)
        if sources or key == "train":  # a list of nothing is told as a run tells it
            least = node.batch.least if key == "train" else 1
            made = node.examples(sources, tokenizer, f"data.{key}", lambda error: None, least)
            node.reaches(resolved, made)
            if key == "train":
                node.objective(made)  # it may not fit them
            some = (
                f" (the first {node.data.buffer} rows of each stream)" if node.data.streaming and key == "train" else ""
            )
            _say(f"{title}data.{key}{some}: {_table(made)}")
            sets.append(made)
            if show and key == "train":
                _tokens(made, tokenizer, show)
    if sets:
        _lint(title, node, sets, served(resolved, node.model, tokenizer))
    if not node.trained:
        return
    mine = ranks()
    node.check_ranks(mine)
    _, choice = sizes(node, resolved, where, training(mine, node.aside))
    parts = ", ".join(f"{part} {size / 2**20:.0f}" for part, size in choice.account.parts.items() if size)
    total, free = choice.account.peak / 2**20, available(where) / 2**20
    recompute = f" with {RECOMPUTE[choice.recompute]} recompute" if choice.recompute else ""
    _say(f"{title}memory: about {total:.0f} of {free:.0f} MiB at {choice.rows} rows a forward{recompute} ({parts})")


def _lint(title: str, node: Training, sets: Sequence[Prepared], more: Sequence[Finding]) -> None:
    if text := shares(sets[0]):
        _say(f"{title}data.train: {text}")
    for line in lines(linted(node.data, sets[0], sets[1] if len(sets) > 1 else None, more)):
        _say(f"{title}{line}")


def _looked_at(node: Training, key: Literal["train", "valid"]) -> Sequence[Readable]:
    """The sources that are read; of streams, as many rows as are shuffled together."""
    sources = node.data.sources(key)
    if key == "valid" or not node.data.streaming:
        return sources
    return [FirstRows(source, node.data.buffer) for source in node.data.train]


def _constitutional(title: str, node: Constitutional) -> None:
    constitution = read(node.constitution)
    _say(f"{title}constitution {constitution.name}: {len(constitution.principles)} principles")
    for key in ("prompts", "harmless"):
        if sources := getattr(node, key):
            _say(f"{title}{key}: {len(questions(sources, key, node.rows))} rows")
    known(dict(each(node, (ModelRef,))), {})
    node.ready()


def _evaluate(title: str, node: Evaluate) -> None:
    resolved = resolve(node.model)
    tokenizer = read_tokenizer(resolved, node.model)
    for index, task in enumerate(node.tasks):
        key, length = longest(task) or ("", 0)
        if key and (notice := check_length(resolved, length, f"tasks.{index}.{key}", node.model.rope)):
            _say(notice)
        if isinstance(task, Passkey):
            _say(f"{title}tasks.{task.name}: {len(task.lengths) * task.depths * task.samples} texts of its own")
        elif isinstance(task, Perplexity):
            made = prepare(task.data, data_of(task), tokenizer, f"tasks.{task.name}")
            _say(f"{title}tasks.{task.name}: {_table(made)}")
        else:
            _say(f"{title}tasks.{task.name}: {_count(task)} rows")


def _best_of(title: str, node: BestOf) -> None:
    tokenizer = read_tokenizer(resolve(node.model), node.model)
    data = Data(train=node.data, system=node.system, max_length=node.max_length)
    known(models_of(node.reward), files_of(node.reward))
    made = some(asked_of(node.data, data, tokenizer, "data"), node.rows)
    check_columns(node.reward, made.columns, made.places)
    _say(f"{title}data: {len(made)} prompts, {len(made) * node.samples} answers")


def _count(task: Generation | MultipleChoice | PositionPerplexity | Classification | PairTask | StepTask) -> int:
    """The rows of a task, each of them read."""
    rows = 0
    for row in (row for source in task.data for row in source.rows()):
        if isinstance(row, DataError):
            raise row
        rows += 1
    if not rows:
        raise DataError("holds no rows", fix="give a file with rows", key=f"tasks.{task.name}.data")
    return rows


def _table(made: Prepared) -> str:
    lengths = np.diff(made.starts)
    low, middle, high = (int(n) for n in np.quantile(lengths, (0.05, 0.5, 0.95)))
    share = made.counts["supervised tokens"] / made.counts["tokens"]
    facts = [f"{made.counts['rows']} rows", f"{len(made)} examples", f"{made.counts['tokens']} tokens"]
    facts += [f"{share:.0%} trained", f"lengths {low} / {middle} / {high} (5, 50, 95 %)"]
    known = {"rows", "examples", "tokens", "supervised tokens"}
    return ", ".join(facts + [f"{reason} {n}" for reason, n in made.counts.items() if n and reason not in known])


def _tokens(made: Prepared, tokenizer: Any, count: int) -> None:
    """Each token of the first examples: trained ones green, masked ones dim, a bar between tokens."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
    for index in range(min(count, len(made))):
        ids, weights = made.example(index)
        text = Text(f"— example {index}, {len(ids)} tokens, {int((weights > 0).sum())} trained\n", style="bold")
        for token, weight in zip(ids, weights, strict=True):
            piece = tokenizer.decode([int(token)]).replace("\n", "⏎\n")
            plain = f"[{piece}]" if weight > 0 and not console.is_terminal else piece
            text.append(plain, style="black on green" if weight > 0 else "dim")
            text.append("|", style="bright_black")
        console.print(text)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")

"""What a trainer of TRL is made of: its classes, its arguments, its rows."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmkit.build.precision import types
from llmkit.core.convert import convert, wrapped
from llmkit.core.errors import DataError, ModelError, RecipeError
from llmkit.core.hints import hints, options
from llmkit.core.scalars import BAD
from llmkit.core.wording import Report
from llmkit.data.rows import Raw, bounded, mapped
from llmkit.rl.columns import check_columns
from llmkit.rl.rewards_node import files_of, models_of
from llmkit.stages.known import known
from llmkit.stages.trl import Trl

ASKED = ("prompt", "completion", "completion_ids")
"""Columns that a trainer gives to rewards under names of their own, or not at all."""
SCALARS = {bool, int, float, str, type(None)}


@dataclass(frozen=True)
class Trainer:
    """A trainer and its configuration."""

    kind: Any
    settings: Any

    def takes(self, parameter: str) -> bool:
        """Whether it can be given that."""
        signatures = (inspect.signature(one).parameters for one in inspect.getmro(self.kind))
        return parameter in next(one for one in signatures if "kwargs" not in one)  # some hand on what they are given

    @property
    def scores(self) -> bool:
        """Whether it trains one number for an answer, and not the next token."""
        return any(one.__name__ == "RewardTrainer" for one in inspect.getmro(self.kind))


def trainer(name: str) -> Trainer:
    """The classes of a name.

    Raises:
        ModelError: TRL is not installed.
        RecipeError: it has no such trainer.
    """
    place, _, last = f"trl.{name}".rpartition(".")
    try:
        whole = importlib.import_module("trl")
    except ImportError as missing:
        raise ModelError(f"kind trl needs trl ({missing})", fix="pip install trl", key="trainer") from missing
    try:
        module = importlib.import_module(place)
    except ImportError as missing:
        raise RecipeError(
            f"there is no {place} ({missing})", fix="give one such as DPOTrainer", key="trainer"
        ) from missing
    settings = f"{last.removesuffix('Trainer')}Config"
    made = [getattr(module, last, None), getattr(module, settings, None) or getattr(whole, settings, None)]
    if not all(inspect.isclass(one) for one in made):
        known = ", ".join(one for one in dir(module) if one.endswith("Trainer"))
        raise RecipeError(f"{place} has no {last}", fix=f"use one of {known}", key="trainer")
    return Trainer(*made)


def settings(node: Trl, kind: Trainer, device: str, folder: Path) -> Any:
    """The trainer's configuration.

    Raises:
        RecipeError: it has no such fields, or does not take what they hold.
    """
    fields = {field.name for field in dataclasses.fields(kind.settings) if field.init}
    report = Report()
    given = {name: _typed(node, kind, name, fields, report) for name in node.arguments}
    if report.problems:
        raise RecipeError(problems=report.problems)
    kinds = types(node.types_name, device)
    own: dict[str, Any] = {"output_dir": str(folder), "seed": node.seed, "report_to": [], "use_cpu": device == "cpu"}
    own |= {"bf16": kinds.mixed and kinds.short == "bf16", "fp16": kinds.mixed and kinds.short == "fp16"}
    own |= {"disable_tqdm": True, "logging_nan_inf_filter": False}
    if "reward_weights" in fields and node.reward:
        own["reward_weights"] = [reward.weight for reward in node.reward]
    try:
        with by_itself():
            return kind.settings(**own, **given)
    except (TypeError, ValueError, ImportError) as cause:
        what = f"{kind.settings.__name__} does not take them: {str(cause).strip().splitlines()[0][:300]}"
        raise RecipeError(what, fix="change arguments", key="arguments") from cause


@contextmanager
def by_itself() -> Iterator[None]:
    """Inside, no launcher seems to have started this process: DeepSpeed's LOCAL_RANK, which an earlier stage may have
    set where there is none (parallel/zero_engine.py), would have accelerate look for other ranks."""
    held = os.environ.pop("LOCAL_RANK", None) if "WORLD_SIZE" not in os.environ else None
    try:
        yield
    finally:
        if held is not None:
            os.environ["LOCAL_RANK"] = held


def _typed(node: Trl, kind: Trainer, name: str, fields: set[str], report: Report) -> Any:
    """One argument, by the type of its field where that is plain."""
    given: Any = node.arguments[name]
    value, key = wrapped(given), f"arguments.{name}"
    if name not in fields:
        near = difflib.get_close_matches(name, fields, 1, 0.5)
        what = f"unknown key, did you mean {near[0]}?" if near else f"{kind.settings.__name__} has no such field"
        report.add(what, f"write {near[0]}" if near else "drop it", key, value.origin)
        return BAD
    hint = hints(kind.settings)[name]
    if not isinstance(given, tuple | Mapping):
        return convert(hint, value, key, report) if set(options(hint)) <= SCALARS else given
    return list(given) if isinstance(given, tuple) else dict(given)


def rows(node: Trl, side: Literal["train", "valid"]) -> list[dict[str, Any]]:
    """All rows of `data.train` or `data.valid`, each with all columns that any of them has.

    Raises:
        DataError: one cannot be read or lacks what rewards read, or there is none.
        RecipeError: there is no function of a reward's name.
    """
    read = list(_read(node, side))
    if not read:
        raise DataError("holds no rows", fix="give a file with rows", key=f"data.{side}")
    found = [row for _, row in read]
    beside = [{name: value for name, value in row.items() if name not in ASKED} for row in found]
    check_columns(node.reward, beside, [(raw.file, raw.line) for raw, _ in read])
    columns = dict.fromkeys(name for row in found for name in row)
    return [{name: row.get(name) for name in columns} for row in found]


def _read(node: Trl, side: Literal["train", "valid"]) -> Iterator[tuple[Raw, Mapping[str, Any]]]:
    for source in getattr(node.data, side):
        for raw in source.rows():
            if isinstance(raw, DataError):
                raise raw
            checked = bounded(raw)
            if isinstance(checked, DataError):
                raise checked
            yield raw, _alike(mapped(checked, source.columns))


def _alike(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row, with answers as messages where its prompt is: TRL takes no mixture."""
    if not isinstance(row.get("prompt"), list):
        return row
    texts = {name: row[name] for name in ("chosen", "rejected", "completion") if isinstance(row.get(name), str)}
    return {**row, **{name: [{"role": "assistant", "content": text}] for name, text in texts.items()}}


def fit_together(node: Trl, kind: Trainer) -> None:
    """Raises: RecipeError when the trainer takes no rewards or models that are given, or lacks some."""
    for at, other in enumerate(node.others):
        if not kind.takes(other.parameter):
            what = f"{node.trainer} takes no {other.parameter}"
            raise RecipeError(what, fix="drop it", key=f"others.{at}.parameter")
    if node.reward and not kind.takes("reward_funcs"):
        raise RecipeError(f"{node.trainer} asks for no rewards", fix="drop reward", key="reward")
    if not node.reward and kind.takes("reward_funcs"):
        raise RecipeError(f"{node.trainer} asks what answers are worth", fix="give reward", key="reward")


def beside(node: Trl) -> dict[str, Any]:
    """What is read beside model and rows, as it is known by.

    Raises:
        ModelError: a model that the trainer takes, or that rewards ask, is not there.
        RecipeError: a file of a reward cannot be read.
    """
    models = {f"others.{at}.model": other.model for at, other in enumerate(node.others)}
    return known(models | models_of(node.reward), files_of(node.reward))


def check_reference(node: Trl, kind: Trainer, args: Any) -> None:
    """Sees to it that no trainer reads a reference by itself.

    Raises:
        RecipeError: one of those that write answers would: it takes none, and no adapter leaves the model as it was.
    """
    if getattr(args, "teacher_model_kind", "live") != "live" and not node.adapter.frozen_base:
        what = f"{node.trainer} reads its teacher by the model's path alone, whatever other keys of `model` say"
        raise RecipeError(what, fix="set it to live, or use adapter: {kind: lora}", key="arguments.teacher_model_kind")
    writes = kind.takes("reward_funcs") and not kind.takes("ref_model")
    if writes and bool(getattr(args, "beta", False)) and not node.adapter.frozen_base:
        what = f"{node.trainer} reads its reference by the model's path alone, whatever other keys of `model` say"
        raise RecipeError(what, fix="set it to 0, or use adapter: {kind: lora}", key="arguments.beta")


def checked(node: Trl, device: str) -> str:
    """One line about a stage that can be run.

    Raises:
        LlmkitError: it cannot.
    """
    kind = trainer(node.trainer)
    check_reference(node, kind, settings(node, kind, device, Path(node.out) / "checkpoints"))
    fit_together(node, kind)
    beside(node)
    counts = {side: len(rows(node, side)) for side in ("train", "valid") if getattr(node.data, side)}
    return ", ".join([node.trainer, *(f"data.{side}: {count} rows" for side, count in counts.items())])

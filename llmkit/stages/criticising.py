"""Critics at work: put beside a policy before the loop, and left beside it when it is done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmkit.adapters.method import Around
from llmkit.adapters.node import Adapter, Lora
from llmkit.build.opening import load
from llmkit.build.precision import types
from llmkit.build.training import Built, how
from llmkit.core.errors import ModelError, RecipeError, told_below
from llmkit.core.files import published
from llmkit.core.run import Run
from llmkit.models.classified import head_name
from llmkit.models.export import write
from llmkit.models.heads import Scored, causal_of
from llmkit.models.load import Loaded
from llmkit.models.node import ModelRef
from llmkit.models.quiet import quiet
from llmkit.models.resolve import resolve
from llmkit.models.rewarded import scores_answers
from llmkit.models.stored import Stored
from llmkit.models.valued import Critic, Criticised, ValueHead, twin
from llmkit.models.words import other_words
from llmkit.models.wrappers import towers
from llmkit.stages.critic import Separate
from llmkit.stages.ppo import Ppo

HEAD = "value_head.safetensors"
"""In a critic's folder: the head, as the tensor `weight` (1, hidden)."""
NAMED = "critic."
"""What the names of a critic's parameters begin with."""


def around(stage: Ppo, built: Built, run: Run) -> Built:
    """The policy with its critic in one module; what is trained is of both.

    Raises:
        ModelError: the critic cannot be loaded, or does not go with the policy.
    """
    if not isinstance(built.scored, Scored):
        raise TypeError("a policy is a language model")
    critic = stage.critic.beside(stage, built, run)
    scored = Criticised(built.scored, critic)
    own = {f"{NAMED}{name}": p for name, p in critic.named_parameters() if p.requires_grad}
    run.console.notice(f"critic {stage.critic.kind}: {sum(p.numel() for p in own.values()):,} trained")
    beside = (critic.head,) if critic.own is None else (critic.own.model, critic.head)
    return replace(built, scored=scored, trained={**built.trained, **own}, beside=beside)


def over_policy(built: Built) -> Critic:
    """A head over the policy's own states."""
    return Critic(_head(built.model))


def over_base(stage: Ppo, adapter: Lora, built: Built, run: Run) -> Critic:
    """A head over the frozen base with an adapter of its own: the weights of the base are held once."""
    base = twin(built.model)
    base.requires_grad_(False)
    return Critic(_head(base), _adapted(stage, adapter, replace(built.loaded, model=base), run))


def separate(stage: Ppo, node: Separate, built: Built, run: Run) -> Critic:
    """A model of its own.

    Raises:
        ModelError: it cannot be loaded, has other tokens, or runs no such rows as the policy.
    """
    ref = node.path or stage.model
    kinds = types(stage.types_name, run.device)
    held = how(run.device, kinds, stage.quant, node.adapter, run.grants.code, run.grants.nonfinite)
    with told_below("model" if node.path is None else "critic.path", "model"):
        loaded = load(resolve(ref), ref, held)
    _check(loaded, built.loaded, ref)
    first = _first_head(loaded)
    if node.adapter.frozen_base:
        loaded.model.requires_grad_(False)
    if hasattr(loaded.model, "merge_and_unload"):
        model = _further(node, loaded, ref, run)
    else:
        model = _adapted(stage, node.adapter, loaded, run)
    if stage.memory.recompute == "full":
        loaded.model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=1)
    for name in _unread(causal_of(model)):  # the head that files have is read through ours
        causal_of(model).get_submodule(name).requires_grad_(False)
    return Critic(_head(model, first), model)


def _check(loaded: Loaded, policy: Loaded, ref: ModelRef) -> None:
    """Raises: ModelError when a critic cannot read what its policy reads."""
    if why := other_words(policy.tokenizer, loaded.tokenizer):
        what = f"{ref.name} has another tokenizer: {why}"
        raise ModelError(what, fix="name a critic with the policy's tokenizer", key="critic.path")
    if loaded.head is not None and not scores_answers(loaded.head):
        what = f"{ref.name} is a {loaded.head.task} classifier of {len(loaded.head.labels)} classes"
        raise ModelError(what, fix="name a reward model or a language model", key="critic.path")
    if policy.support.packed and not loaded.support.packed:
        raise ModelError(loaded.support.reason, fix="set data.packing=none", key="critic.path")
    if policy.support.tree and not loaded.support.tree:
        what = f"{ref.name} takes no prompt once for several answers"
        raise ModelError(what, fix="set share_prompts=false", key="critic.path")


def _first_head(loaded: Loaded) -> Tensor | None:
    """What the files say of a head: a critic's of ours, or a reward model's."""
    path = loaded.resolved.folder / HEAD
    if path.is_file():
        kept: Tensor = load_file(path)["weight"]
        return kept.float()
    if loaded.head is None:
        return None
    weight: Tensor = loaded.model.get_submodule(head_name(loaded.model)).weight
    return weight.detach().float().clone()


def _unread(model: Any) -> list[str]:
    """The heads of a model whose hidden states alone are read; embeddings that are tied to one are read."""
    names = ["lm_head", "score", "classifier"]
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    return [name for name in names if hasattr(model, name) and not (name == "lm_head" and tied)]


def _further(node: Separate, loaded: Loaded, ref: ModelRef, run: Run) -> nn.Module:
    """A model whose adapter goes on learning: over its base that is what is left of it.

    Raises:
        RecipeError: another adapter is asked for.
    """
    model: Any = loaded.model
    if node.adapter != Lora():
        what = f"{ref.name} is an adapter, which goes on as it is"
        raise RecipeError(what, fix="drop critic.adapter, or merge it into its base first", key="critic.adapter")
    model.set_adapter(model.active_adapter)
    run.console.notice(f"critic: the adapter of {ref.name} goes on")
    quiet(model)
    trained: nn.Module = model.train()
    return trained


def _adapted(stage: Ppo, adapter: Adapter, loaded: Loaded, run: Run) -> nn.Module:
    """A model with what is trained of it, in whose forward nothing is random."""
    torch.manual_seed(stage.seed)  # adapters begin at random
    idle = (*towers(loaded.model), *_unread(loaded.model))
    stored = Stored((loaded.resolved.base or loaded.resolved).folder)
    around = Around(idle, loaded.tokenizer, (), stored, run.console.notice)
    model = adapter.attach(loaded.model, around)
    quiet(model)
    return model.train()


def _head(model: Any, first: Tensor | None = None) -> ValueHead:
    """A head over a model's states; a new one says 0 of each."""
    causal = causal_of(model)
    width, device = causal.config.get_text_config().hidden_size, causal.get_input_embeddings().weight.device
    return ValueHead(torch.zeros(1, width, device=device) if first is None else first.to(device))


def save(stage: Ppo, built: Built, folder: Path) -> None:
    """Leaves the critic: its head, and what is trained of a trunk of its own as a model's is left. A critic may begin
    from it (`critic.path`), where it has a trunk."""
    if not isinstance(built.scored, Criticised):
        raise TypeError("no critic is there")
    critic, ref = built.scored.critic, getattr(stage.critic, "path", None) or stage.model
    with published(folder) as aside:
        aside.mkdir(parents=True, exist_ok=True)
        if critic.own is not None:
            write(critic.own.model, built.loaded.tokenizer, aside, resolve(ref), stage.quant, ref.rope)
        save_file({"weight": critic.head.weight.detach().cpu().contiguous()}, aside / HEAD)


def rate(stage: Ppo, name: str) -> float:
    """The factor on the rate of a trained parameter."""
    if not name.startswith(NAMED):
        return stage.adapter.rate(name)
    own = stage.critic.own
    factor = 1.0 if own is None else own.rate(name)
    return factor * (stage.critic.lr or stage.optim.lr) / stage.optim.lr

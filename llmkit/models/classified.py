"""Models with a classification head of transformers: their making, and their logits at chosen positions."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmkit.core.errors import ModelError
from llmkit.core.types import Batch
from llmkit.models.heads import Headed, whole
from llmkit.models.node import Head

HEADS = ("score", "classifier")
"""What transformers calls the last layer of its classifiers; peft saves modules of these names whole."""


def auto_class(head: Head, config: Any, name: str) -> Any:
    """transformers' class for a task.

    Raises:
        ModelError: it has none of this family.
    """
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
    from transformers.models.auto import modeling_auto as auto

    made: Any = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}[head.task]
    known: Any = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if head.task == "token":
        known = auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
    if type(config) not in known:
        what = f"transformers has no {head.task} classifier of {name}'s family ({config.model_type})"
        raise ModelError(what, fix="use a model of another family", key="model")
    return made


def name_classes(config: Any, head: Head, pad: int | None) -> None:
    """Writes the classes into a configuration; `pad` is the token that fills rows up, which pooling passes over."""
    config.id2label = dict(enumerate(head.labels))
    config.label2id = {label: index for index, label in enumerate(head.labels)}
    if head.task == "sequence":
        config.problem_type = "single_label_classification" if len(head.labels) > 1 else "regression"
    text = config.get_text_config()
    if text.pad_token_id is None or pad is not None:
        text.pad_token_id = pad


def without_head(told: Mapping[str, Any], model: Any) -> tuple[dict[str, Any], set[str]]:
    """What loading told, without a new head's weights and the old one's; and the modules that are new."""
    inner = f"{model.base_model_prefix}."
    fresh = {key for key in told["missing_keys"] if not key.startswith(inner) or ".pooler." in key}
    left = {key for key in told["unexpected_keys"] if not key.startswith(inner) or ".pooler." in key}
    kept = {**told, "missing_keys": set(told["missing_keys"]) - fresh}
    kept["unexpected_keys"] = set(told["unexpected_keys"]) - left
    return kept, {key.rpartition(".")[0] for key in fresh}


def begin(model: nn.Module, fresh: set[str], seed: int) -> None:
    """Gives new layers their first weights, the same for the same seed."""
    drawn = torch.Generator().manual_seed(seed)
    deviation = float(getattr(cast(Any, model).config.get_text_config(), "initializer_range", None) or 0.02)
    with torch.no_grad():
        for name in sorted(fresh):
            module = cast(Any, model.get_submodule(name))
            if isinstance(module, nn.Linear):
                first = torch.randn(module.weight.shape, generator=drawn) * deviation
                module.weight.copy_(first)
                if module.bias is not None:
                    module.bias.zero_()


def head_name(model: nn.Module) -> str:
    """The last layer's name.

    Raises:
        ModelError: it has one that peft would not save.
    """
    found = [name for name in HEADS if hasattr(model, name)]
    if not found:
        what = f"{type(model).__name__} calls its head by a name that is not known"
        raise ModelError(what, fix="use a model of another family", key="model")
    return found[0]


def at_least_fp32(logits: Tensor) -> Tensor:
    """The same in the type that losses are computed in."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Classified(Headed):
    """A classifier as one module: a batch -> logits (N, C), in fp32 at least, where its weights are not 0."""

    def __init__(self, model: nn.Module, head: Head, direct: bool) -> None:
        super().__init__(model)
        self.head, self.direct = head, direct
        """Whether the head is applied to the hidden states of chosen positions, which takes packed rows too; else the
        whole model runs as transformers has it."""
        self.name = head_name(self.causal[0])

    def forward(self, batch: Batch) -> Tensor:
        """Logits (N, C), row by row."""
        chosen = batch.weights != 0
        if self.direct:
            return self.logits(self.hidden(batch)[chosen])
        noise = self.noise.over(batch) if self.noise is not None and self.training else nullcontext()
        with noise:
            out = at_least_fp32(self.causal[0](input_ids=self.padded(batch), attention_mask=whole(batch).long()).logits)
        return out[chosen] if self.head.task == "token" else out[chosen.any(1)]

    def padded(self, batch: Batch) -> Tensor:
        """The tokens, with that behind each row which pooling passes over."""
        pad = self.causal[0].config.get_text_config().pad_token_id
        return batch.tokens if pad is None else batch.tokens.masked_fill(~whole(batch), pad)

    def logits(self, hidden: Tensor) -> Tensor:
        """What the head makes of hidden states (N, H)."""
        model = self.causal[0]
        head: nn.Module = getattr(model, self.name)
        if self.head.task == "token" and hasattr(model, "dropout"):
            hidden = model.dropout(hidden)
        kind = next(head.parameters()).dtype
        return at_least_fp32(head(hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(kind)))


def check_classes(classified: Classified) -> None:
    """Compares the head with the model's own logits on a few tokens.

    Raises:
        ModelError: the family does something that llmkit does not know.
    """
    if not classified.direct:
        return
    model = classified.causal[0]
    table = model.get_input_embeddings().weight
    ids = [i for i in range(len(table)) if i != model.config.get_text_config().pad_token_id][1:7]
    tokens = torch.tensor([ids], device=table.device)
    training = classified.training
    classified.eval()
    with torch.no_grad():
        own = model(input_ids=tokens, use_cache=False).logits.float()
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
        ours = classified.logits(hidden)
    classified.train(training)
    ours = ours[-1:] if classified.head.task == "sequence" else ours[None]
    close = 1e-4 if hidden.dtype == torch.float32 else 5e-2
    if own.shape != ours.shape or not torch.allclose(ours, own, rtol=close, atol=close):
        what = f"{type(model).__name__} makes its logits in a way that is not known"
        raise ModelError(what, fix="set data.packing=none", key="model")

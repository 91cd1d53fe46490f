"""What moves logits before a token is drawn: what is allowed, penalties, bias."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmkit.inference.sampling import Sampling

NEVER = float("-inf")

Processor = Callable[[Sequence[int], Sequence[int], Tensor], Tensor]
"""(prompt, made so far, logits (V,)) -> logits (V,); it may change what it is given."""


def steered(
    logits: Tensor, prompt: Sequence[int], made: Sequence[int], sampling: Sampling, ends: Sequence[int]
) -> Tensor:
    """The logits from which a token is drawn; `logits` itself is left as it is.

    `ends`: the tokens that would end the text.
    """
    if not asked(sampling, len(made)):
        return logits
    law = _penalised(logits.clone(), prompt, made, sampling)
    if sampling.logit_bias:
        at = torch.tensor(list(sampling.logit_bias), device=law.device)
        law[at] += torch.tensor(list(sampling.logit_bias.values()), dtype=law.dtype, device=law.device)
    if sampling.allowed_ids:
        kept = torch.tensor(sampling.allowed_ids, device=law.device)
        law = torch.full_like(law, NEVER).index_copy_(0, kept, law[kept])
    if len(made) < sampling.min_tokens and ends:
        law[list(ends)] = NEVER
    return law


def asked(sampling: Sampling, made: int) -> bool:
    """Whether anything moves the logits at this place."""
    plain = sampling.repetition_penalty == 1 and not sampling.presence_penalty and not sampling.frequency_penalty
    return not plain or bool(sampling.logit_bias or sampling.allowed_ids) or made < sampling.min_tokens


def _penalised(law: Tensor, prompt: Sequence[int], made: Sequence[int], sampling: Sampling) -> Tensor:
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *made}), device=law.device)
        there = law[seen]
        law[seen] = torch.where(there > 0, there / sampling.repetition_penalty, there * sampling.repetition_penalty)
    if made and (sampling.presence_penalty or sampling.frequency_penalty):
        times = Counter(made)
        at = torch.tensor(list(times), device=law.device)
        often = torch.tensor(list(times.values()), dtype=law.dtype, device=law.device)
        law[at] -= sampling.presence_penalty + sampling.frequency_penalty * often
    return law

"""Another forward for a module that is there."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def recast(module: nn.Module, kind: type[M]) -> M:
    """`module` under another class: the same parameters, buffers, hooks and settings."""
    made = kind.__new__(kind)
    made.__dict__ = module.__dict__
    return made

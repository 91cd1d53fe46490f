"""Which modules and parameters a recipe means: by endings, globs, regular expressions and layers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from llmkit.core.errors import ModelError
from llmkit.core.shape import Shape, is_embedding

ALL_LINEAR = "all-linear"
ROUTER = re.compile(r"(^|\.)(router|gate)(\.|$)")
"""Of mixture models, what chooses the experts."""
SPAN = r"(\d+)|(\d*)-(\d*)"
"""A layer, or a first and a last one, either of which may be left out."""


def by(pattern: str) -> Callable[[str], bool]:
    """Whether a dotted name is meant by a pattern: one with `*`, `?` or `[` is a glob over the whole name, any other is
    the name itself or its ending."""
    if any(letter in pattern for letter in "*?["):
        return lambda name: fnmatchcase(name, pattern)
    return lambda name: name == pattern or name.endswith(f".{pattern}")


def meant(patterns: Sequence[str], name: str) -> bool:
    """Whether any of the patterns means a name."""
    return any(by(pattern)(name) for pattern in patterns)


def targeted(targets: str | Sequence[str], name: str) -> bool:
    """Whether `adapter.targets` means a module: a text is a regular expression, a list holds endings and globs."""
    if isinstance(targets, str):
        return targets == ALL_LINEAR or re.fullmatch(targets, name) is not None
    return meant(targets, name)


def layer_of(name: str) -> int | None:
    """The number of the layer that a module or a parameter lies in."""
    number = re.search(r"\.(\d+)(\.|$)", name)
    return int(number[1]) if number else None


def in_layers(layers: Sequence[int | str], name: str, count: int) -> bool:
    """Whether a name lies in the layers asked for, of `count`; without any, all names do."""
    return not layers or layer_of(name) in {number for span in layers for number in numbers(span, count)}


def numbers(span: int | str, count: int) -> range:
    """The layers of a number (negative: from the end) or of a span such as `8-15`, `16-` or `-3`; both ends belong."""
    if isinstance(span, int):
        return range(span % count if span < 0 else span, (span % count if span < 0 else span) + 1)
    found = re.fullmatch(SPAN, span)
    if found is None:
        return range(0)
    alone, first, last = found.groups()
    if alone:
        return range(int(alone), int(alone) + 1)
    return range(int(first or 0), int(last or count - 1) + 1)


def is_span(text: str) -> bool:
    """Whether a text names a layer or a span of them."""
    return re.fullmatch(SPAN, text) is not None and any(letter.isdigit() for letter in text)


def check_layers(layers: Sequence[int | str], count: int) -> None:
    """Raises:
    ModelError: a layer or a span lies outside of the model's layers.
    """
    for span in layers:
        held = numbers(span, count)
        if not held or held.start < 0 or held.stop > count or (isinstance(span, int) and span < -count):
            raise ModelError(
                f"{span} names no layers of {count}", fix=f"give numbers from 0 to {count - 1}", key="adapter.layers"
            )


def found(pattern: str, names: Iterable[str], key: str, fix: str = "") -> list[str]:
    """The names that a pattern means.

    Raises:
        ModelError: there are none; it tells names that are near.
    """
    known = list(names)
    held = [name for name in known if by(pattern)(name)]
    if held:
        return held
    endings = {name.split(".", i)[-1] for name in known for i in range(name.count(".") + 1)} | set(known)
    near = difflib.get_close_matches(pattern, sorted(endings), 3, 0.5)
    fix = fix or f"did you mean {' or '.join(near)}?" if near else fix or f"names are such as {', '.join(known[:3])}"
    raise ModelError(f"{pattern!r} matches nothing of this model", fix=fix, key=key)


def short(chosen: Sequence[str], names: Iterable[str]) -> list[str]:
    """The fewest endings that mean the chosen ones alone: the last part of a name where all that end so are chosen."""
    held, left = set(chosen), {name.rpartition(".")[2] for name in names if name not in set(chosen)}
    return sorted({ending if (ending := name.rpartition(".")[2]) not in left else name for name in held})


def linears(shape: Shape, targets: str | Sequence[str]) -> dict[str, tuple[int, int]]:
    """(in, out) of the linears that get an adapter, by the names of the files: experts and routers are none."""
    found = {tensor.removesuffix(".weight"): sizes for tensor, sizes in shape.tensors.items()}
    return {
        name: (sizes[1], sizes[0])
        for name, sizes in found.items()
        if len(sizes) == 2
        and targeted(targets, name)
        and not (is_embedding(name) or ".experts." in name or name.endswith((".gate", ".router")))
    }


def adapted_widths(
    shape: Shape, targets: str | Sequence[str], layers: Sequence[int | str], params: Sequence[str]
) -> tuple[int, int]:
    """The sums of in and of out over what gets an adapter, by the names of the files; experts may have others there, so
    that all of them count where any is asked for."""
    if not shape.tensors:
        return shape.linears // 2, shape.linears - shape.linears // 2
    ins = outs = 0
    for tensor, sizes in shape.tensors.items():
        name = tensor.removesuffix(".weight")
        expert = ".experts." in name
        plain = len(sizes) == 2 and not expert and targeted(targets, name)
        plain = plain and (targets != ALL_LINEAR or not (is_embedding(name) or ROUTER.search(name)))
        if (plain or (expert and params)) and len(sizes) > 1 and in_layers(layers, name, shape.layers):
            each = sizes[0] if len(sizes) == 3 else 1
            ins, outs = ins + each * sizes[-1], outs + each * sizes[-2]
    return ins, outs

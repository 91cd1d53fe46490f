"""What a recipe node is: a frozen dataclass made with `@config`, whose fields carry their limits.

The tagged union is the registry: a union such as `Lora | NoAdapter` is read by the loader, the JSON schema, the
docs and the type checker alike. This module holds only the words to declare one; `core/convert.py` reads them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import wraps
from typing import Annotated, Any, TypeVar, cast, dataclass_transform

T = TypeVar("T")


@dataclass(frozen=True)
class Unit:
    """Marks a number that may be written with a unit: `duration` (seconds; `10m`) or `bytes` (`4GiB`)."""

    name: str


@dataclass(frozen=True)
class Later:
    """Marks kinds or values of a field that the contract names and that this version refuses as not available yet."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Limits:
    """Bounds of a number: `above` < value, `least` <= value, `most` >= value, `below` > value."""

    above: float | None = None
    least: float | None = None
    most: float | None = None
    below: float | None = None

    def broken_by(self, value: float) -> str:
        """The bound that `value` breaks, in words, or nothing."""
        checks = (
            (self.above, operator.gt, "above"),
            (self.least, operator.ge, "at least"),
            (self.most, operator.le, "at most"),
            (self.below, operator.lt, "below"),
        )
        return next(
            (f"{word} {bound:g}" for bound, holds, word in checks if bound is not None and not holds(value, bound)), ""
        )


@dataclass(frozen=True)
class Conflict:
    """What a node's own rule over several fields finds wrong at `key`; `other` is the key that it contradicts."""

    key: str
    what: str
    fix: str
    other: str = ""


Duration = Annotated[float, Unit("duration")]
"""Seconds, written as a number or as `30s`, `10m`, `2h`, `1d`."""
Size = Annotated[int, Unit("bytes")]
"""Bytes, written as a number or as `64KiB`, `4GiB`, `2GB`."""


def setting(
    *,
    default: Any = MISSING,
    default_factory: Callable[[], Any] | None = None,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
    later: bool = False,
) -> Any:
    """A field with limits; `later` refuses any value but the default as not available yet."""
    metadata = {"limits": Limits(above, least, most, below), "later": later}
    if default_factory is not None:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(setting, field))
def config(cls: type[T]) -> type[T]:
    """Makes `cls` a recipe node: frozen, keyword-only, its fields checked however it is built.

    A class attribute `_short: ClassVar[str]` names the field that a bare scalar stands for (`model: NAME`).
    `_keyed: ClassVar[str]` names the field whose value may stand under the node's kind (`{draft: NAME}`).
    A method `problems(self) -> Iterable[Conflict]` yields what is wrong over several fields.
    """

    def check(self: Any) -> None:
        from llmkit.core.convert import check_fields

        check_fields(self)

    made: Any = cls
    made.__post_init__ = check
    return cast(type[T], _named(dataclass(frozen=True, kw_only=True)(made)))


def needed(item: Field[Any]) -> bool:
    """Whether a field has no default."""
    return item.default is MISSING and item.default_factory is MISSING


def _named(cls: Any) -> Any:
    """The same, whose arguments are looked at by name before they are taken, as the keys of a recipe are."""
    plain = cls.__init__
    known = {item.name for item in fields(cls)}
    least = {item.name for item in fields(cls) if needed(item)}

    @wraps(plain)
    def init(self: Any, *args: Any, **given: Any) -> None:
        if not least <= given.keys() <= known:
            from llmkit.core.convert import check_names

            check_names(cls, given)
        plain(self, *args, **given)

    cls.__init__ = init
    return cls

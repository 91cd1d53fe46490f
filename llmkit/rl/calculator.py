"""A calculator over numbers: its own grammar, exact where that is possible, bounded in size and so in time.

sum = term (("+" | "-") term)* ; term = signed (("*" | "/" | "//" | "%") signed)* ; signed = ("+" | "-")* power
power = atom (("**" | "^") signed)? ; atom = number | constant | name "(" sum ("," sum)* ")" | "(" sum ")"
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from fractions import Fraction

LONGEST = 500
"""Letters of an expression."""
DEEPEST = 40
"""Brackets, signs and powers in one another."""
BITS = 4096
"""Of a numerator or a denominator."""
DIGITS = 12
"""Of a number that is not whole, as it is told."""
WORD = re.compile(
    r"\s*(?:(?P<number>(?:\d+(?:_\d+)*\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)|(?P<name>[a-z][a-z0-9_]*)"
    r"|(?P<sign>\*\*|//|[-+*/%^(),]))",
    re.ASCII,
)
Number = Fraction | float


class Wrong(Exception):
    """What is no expression, or has no value; the text is for whoever asked."""


def calculate(text: str) -> str:
    """The value of an expression, as text.

    Raises:
        Wrong: it has none, or is too large.
    """
    if len(text) > LONGEST:
        raise Wrong(f"an expression of {len(text)} letters is longer than {LONGEST}")
    reader = Reader(_words(text))
    value = reader.sum(0)
    if reader.next:
        raise Wrong(f"{reader.next!r} is not expected there")
    return told(value)


def told(value: Number) -> str:
    """A whole number in full, any other one to 12 digits."""
    if isinstance(value, Fraction) and value.denominator == 1:
        return str(value.numerator)
    try:
        return f"{float(value):.{DIGITS}g}"
    except OverflowError as cause:
        raise Wrong("the result is too large") from cause


def _words(text: str) -> list[str]:
    made, at, text = [], 0, text.rstrip()
    while at < len(text):
        found = WORD.match(text, at)
        if found is None:
            raise Wrong(f"{text[at:].lstrip()[:10]!r} cannot be read: write numbers, + - * / // % ** ( ) and functions")
        made.append(found[0].strip())
        at = found.end()
    return made


class Reader:
    """Reads words from the left; each method takes what its rule of the grammar takes."""

    def __init__(self, words: list[str]) -> None:
        self.words = words[::-1]

    @property
    def next(self) -> str:
        """The next word, or nothing."""
        return self.words[-1] if self.words else ""

    def take(self, *wanted: str) -> str:
        """The next word if it is one of these, or nothing."""
        return self.words.pop() if self.next in wanted and self.next else ""

    def sum(self, depth: int) -> Number:
        """Terms, from the left."""
        value = self.term(depth)
        while sign := self.take("+", "-"):
            value = _joined(sign, value, self.term(depth))
        return value

    def term(self, depth: int) -> Number:
        """Factors, from the left."""
        value = self.signed(depth)
        while sign := self.take("*", "/", "//", "%"):
            value = _joined(sign, value, self.signed(depth))
        return value

    def signed(self, depth: int) -> Number:
        """A power, maybe with a sign, which binds less than it."""
        if depth > DEEPEST:
            raise Wrong(f"it nests more than {DEEPEST} deep")
        if sign := self.take("+", "-"):
            value = self.signed(depth + 1)
            return -value if sign == "-" else value
        value = self.atom(depth)
        return power(value, self.signed(depth + 1)) if self.take("**", "^") else value

    def atom(self, depth: int) -> Number:
        """A number, a constant, a function of values, or a sum in brackets."""
        if self.take("("):
            value = self.sum(depth + 1)
            self.close()
            return value
        word = self.words.pop() if self.words else ""
        if word in CONSTANTS:
            return CONSTANTS[word]
        if word in FUNCTIONS:
            return self.call(word, depth)
        try:
            return _bounded(Fraction(word))
        except ValueError as cause:
            known = ", ".join(FUNCTIONS)
            what = f"{word!r} is no number and none of {known}" if word else "it ends too early"
            raise Wrong(what) from cause

    def call(self, name: str, depth: int) -> Number:
        """A function's value."""
        if not self.take("("):
            raise Wrong(f"{name} is a function: write {name}(...)")
        given = [self.sum(depth + 1)]
        while self.take(","):
            given.append(self.sum(depth + 1))
        self.close()
        try:
            return _bounded(FUNCTIONS[name](*given))
        except (ValueError, OverflowError, TypeError, ZeroDivisionError) as cause:
            raise Wrong(f"{name}({', '.join(map(told, given))}) has no value") from cause

    def close(self) -> None:
        """Takes a closing bracket."""
        if not self.take(")"):
            raise Wrong("a bracket is not closed")


def _joined(sign: str, one: Number, other: Number) -> Number:
    try:
        return _bounded(OPERATORS[sign](one, other))
    except ZeroDivisionError as cause:
        raise Wrong("nothing can be divided by 0") from cause
    except OverflowError as cause:
        raise Wrong("the result is too large") from cause


def power(base: Number, exponent: Number) -> Number:
    """Exact where the exponent is whole and the result has room.

    Raises:
        Wrong: it has no value, or is too large.
    """
    whole = int(exponent) if isinstance(exponent, Fraction) and exponent.denominator == 1 else None
    try:
        if isinstance(base, Fraction) and whole is not None:
            size = max(base.numerator.bit_length(), base.denominator.bit_length()) - (abs(base) == 1)
            if size * abs(whole) > 2 * BITS:
                raise Wrong("the result is too large")
            return _bounded(Fraction(base**whole))
        if base < 0 and whole is None:
            raise Wrong("a negative number has no such root")
        return _bounded(float(base) ** float(exponent))
    except ZeroDivisionError as cause:
        raise Wrong("nothing can be divided by 0") from cause
    except OverflowError as cause:
        raise Wrong("the result is too large") from cause


def _bounded(value: Number) -> Number:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise Wrong("the result is too large")
        return value
    if value.numerator.bit_length() > BITS or value.denominator.bit_length() > BITS:
        raise Wrong("the result is too large")
    return value


def _divided(one: Number, other: Number) -> Number:
    return Fraction(one // other)


def _root(value: Number) -> Number:
    if isinstance(value, Fraction) and value >= 0:
        top, bottom = math.isqrt(value.numerator), math.isqrt(value.denominator)
        if Fraction(top * top, bottom * bottom) == value:
            return Fraction(top, bottom)
    return math.sqrt(value)


def _rounded(value: Number, digits: Number = Fraction(0)) -> Number:
    if not isinstance(digits, Fraction) or digits.denominator != 1 or abs(digits) > 100:
        raise ValueError
    return Fraction(round(Fraction(value), int(digits)))


def _factorial(value: Number) -> Number:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= 400:
        raise ValueError
    return Fraction(math.factorial(int(value)))


OPERATORS: dict[str, Callable[[Number, Number], Number]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": _divided,
    "%": operator.mod,
}
FUNCTIONS: dict[str, Callable[..., Number]] = {
    "sqrt": _root,
    "abs": abs,
    "min": min,
    "max": max,
    "round": _rounded,
    "floor": lambda value: Fraction(math.floor(value)),
    "ceil": lambda value: Fraction(math.ceil(value)),
    "factorial": _factorial,
    "exp": math.exp,
    "log": math.log,
    "log10": math.log10,
    "log2": math.log2,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
}
CONSTANTS: dict[str, Number] = {"pi": math.pi, "e": math.e}

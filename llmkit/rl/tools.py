"""The calculator as a tool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.rl.calculator import FUNCTIONS, Wrong, calculate
from llmkit.rl.environment import Unable, argument, described

DESCRIPTION = f"Computes an expression of numbers with + - * / // % ** ( ) and {', '.join(FUNCTIONS)}."


class Calculating:
    """`calculate(expression)`."""

    function = described("calculate", DESCRIPTION, "expression", "Such as (3 + 4) * 2 ** 10.")

    def __call__(self, arguments: Mapping[str, Any]) -> str:
        """The value.

        Raises:
            Unable: it has none.
        """
        try:
            return calculate(argument(arguments, "expression"))
        except Wrong as cause:
            raise Unable(str(cause)) from cause

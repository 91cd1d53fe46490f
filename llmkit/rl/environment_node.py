"""The `environment` union: what answers a model that calls tools, with an environment for each conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from llmkit.core.config import Conflict, config, setting
from llmkit.core.own import Own, own_of
from llmkit.core.usercode import unreadable

if TYPE_CHECKING:
    from llmkit.rl.environment import Environment, Tool


@config
class Calculator:
    """Arithmetic: `calculate(expression)`, exact where that is possible, in a grammar of its own, of bounded size."""

    kind: Literal["calculator"] = "calculator"

    def files(self) -> dict[str, str]:
        """None."""
        return {}

    def open(self) -> Tool:
        """The tool."""
        from llmkit.rl.tools import Calculating

        return Calculating()


@config
class Facts:
    """Facts by their key: `lookup(key)`."""

    kind: Literal["lookup"] = "lookup"
    path: str
    """A jsonl file of them."""
    key: str = "key"
    """The column by which a fact is found."""
    value: str = "value"
    """The column that holds it."""
    description: str = "Looks a fact up."
    """What the model is told that there is to find."""

    def files(self) -> dict[str, str]:
        """The facts'."""
        return {"path": self.path}

    def open(self) -> Tool:
        """The tool.

        Raises:
            DataError: the file cannot be read.
        """
        from llmkit.rl.lookup import Lookup

        return Lookup(self.path, self.key, self.value, self.description)


Tools = Calculator | Facts


@config
class ToolUse:
    """Tools that the model may call, as often as it likes, until it answers without a call."""

    kind: Literal["tools"] = "tools"
    tools: tuple[Tools, ...]
    turns: int = setting(default=8, least=1)
    """Answers of the model in one conversation, at most."""

    def problems(self) -> Iterator[Conflict]:
        """No tools, or one twice."""
        kinds = [tool.kind for tool in self.tools]
        if not kinds or len(set(kinds)) < len(kinds):
            yield Conflict("tools", "is no list of different tools", "give calculator, lookup or both")

    def files(self) -> dict[str, str]:
        """What its tools read, by their keys."""
        return {f"tools.{at}.{key}": path for at, tool in enumerate(self.tools) for key, path in tool.files().items()}

    def open(self) -> Callable[[], Environment]:
        """What makes an environment for each conversation.

        Raises:
            DataError: what a tool reads cannot be read.
        """
        from llmkit.rl.environment import Toolbox

        tools = [tool.open() for tool in self.tools]
        return lambda: Toolbox(tools)


@config
class OwnEnvironment:
    """A class of your own with `reset(row, asked)` and `step(calls)`, as `llmkit.rl.environment.Environment` has them:
    each conversation has an object of it. It runs in the process that trains if `--allow-python` was given once for the
    file as it is."""

    kind: Literal["python"] = "python"
    ref: str
    """FILE.py:CLASS, such as ./my.py:Shop."""
    turns: int = setting(default=8, least=1)
    """Answers of the model in one conversation, at most."""

    def problems(self) -> Iterator[Conflict]:
        """A name of no class."""
        yield from unreadable(self.ref, what="class")

    def begin(self, own: Own) -> None:
        """
        Raises:
            OwnError: it makes no environment.
        """
        from llmkit.rl.own_environment import OwnSide

        OwnSide(own)

    def files(self) -> dict[str, str]:
        """None: what it runs is known by its digest."""
        return {}

    def open(self) -> Callable[[], Environment]:
        """What makes an environment for each conversation."""
        from llmkit.rl.own_environment import OwnSide

        own = own_of(self)
        return lambda: OwnSide(own)


EnvironmentNode = ToolUse | OwnEnvironment

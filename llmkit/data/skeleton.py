"""Templates that print what messages say as it is, and do nothing else with it: their text is put together.

That a template is one is read from its syntax tree: `content` stands in sums that are printed and nowhere else, and the
rest asks for roles and for keys that the messages do not have. Then the text around what is said depends on the roles
alone, and is rendered once for each sequence of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Parts = tuple[str | int, ...]
"""Text as it stands, and the numbers of messages whose content comes between."""
PLACE = re.compile("\ue000([0-9]+)\ue001")
PLAIN = {"role", "content"}
LOOP = {"first", "last", "index", "index0", "revindex", "revindex0", "length"}
"""What may be asked of a loop: nothing of the messages before and after."""


def opaque(template: str) -> bool:
    """Whether a template only prints what messages say."""
    from jinja2 import Environment, TemplateError, nodes

    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateError:  # a statement of another extension
        return False
    held = {node.target.name for node in tree.find_all(nodes.For) if isinstance(node.target, nodes.Name)}
    return all(_allowed(node, above, held) for node, above in _walk(tree, ()))


def _walk(node: Any, above: tuple[Any, ...]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Every node with those around it, the nearest first."""
    yield node, above
    for child in node.iter_child_nodes():
        yield from _walk(child, (node, *above))


def _allowed(node: Any, above: tuple[Any, ...], held: set[str]) -> bool:
    from jinja2 import nodes

    if isinstance(node, nodes.For):
        return isinstance(node.target, nodes.Name) and not node.recursive
    if isinstance(node, nodes.FilterBlock | nodes.CallBlock | nodes.Macro | nodes.AssignBlock | nodes.Include):
        return False
    if not isinstance(node, nodes.Name):
        return True
    if node.name == "loop":
        return isinstance(above[0], nodes.Getattr) and above[0].attr in LOOP
    if node.name == "messages":
        return node.ctx == "load" and _of_messages(node, above)
    if node.name in held:
        return node.ctx == "store" or _of_message(above)
    return True


def _of_messages(node: Any, above: tuple[Any, ...]) -> bool:
    """The list is walked, counted, or asked for one of its messages."""
    from jinja2 import nodes

    if isinstance(above[0], nodes.For):
        return above[0].iter is node
    if isinstance(above[0], nodes.Filter):
        return above[0].name in ("length", "count")
    one = isinstance(above[0], nodes.Getitem) and isinstance(above[0].arg, nodes.Const | nodes.Neg)
    return one and _of_message(above[1:])


def _of_message(above: tuple[Any, ...]) -> bool:
    """A message is asked for a key; its content is printed."""
    from jinja2 import nodes

    access, *rest = above
    if isinstance(access, nodes.Getitem) and isinstance(access.arg, nodes.Const):
        key = access.arg.value
    elif isinstance(access, nodes.Getattr) and not isinstance(rest[0], nodes.Call):
        key = access.attr
    else:
        return False
    if key != "content":
        return isinstance(key, str)
    printed = next(node for node in rest if not isinstance(node, nodes.Add | nodes.Concat))
    return isinstance(printed, nodes.Output)


def skeleton(messages: Sequence[Mapping[str, Any]], render: Any) -> Parts:
    """What `render` makes of these messages, cut where their contents stand."""
    marked = [{**message, "content": f"\ue000{i}\ue001"} for i, message in enumerate(messages)]
    pieces = PLACE.split(render(marked))
    return tuple(int(piece) if i % 2 else piece for i, piece in enumerate(pieces))


def filled(parts: Parts, messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of messages of these roles."""
    return "".join(part if isinstance(part, str) else messages[part]["content"] for part in parts)


def plain(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether messages have a role and a text, and nothing else."""
    return all(message.keys() == PLAIN and type(message["content"]) is str for message in messages)

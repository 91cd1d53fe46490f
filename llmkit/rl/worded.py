"""What a model is asked about a request and answers to it, in words."""

from __future__ import annotations

from collections.abc import Mapping

from llmkit.rl.sample import Messages


def worded(system: str, prompt: str | Messages, parts: Mapping[str, str]) -> Messages:
    """The request and texts about it, each in tags that none of them can close."""
    said = {"request": request(prompt), **parts}
    text = "\n\n".join(f"<{tag}>\n{_kept(one, said)}\n</{tag}>" for tag, one in said.items())
    return ({"role": "system", "content": system}, {"role": "user", "content": text})


def request(prompt: str | Messages) -> str:
    """A prompt as one text; of a single turn, what it says alone."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0].get("content") or "")
    return "\n\n".join(f"{one['role']}: {one.get('content') or ''}" for one in prompt)


def _kept(text: str, tags: Mapping[str, str]) -> str:
    for tag in tags:
        text = text.replace(f"</{tag}>", f"< /{tag}>").replace(f"<{tag}>", f"< {tag}>")
    return text

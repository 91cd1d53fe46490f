"""`rollouts.html`: answers to read, group by group, by what they were worth. It needs no other file."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from llmkit.core.files import write_atomic
from llmkit.stages.chart import number
from llmkit.stages.rollouts import PAGE, TEXT, Group, Shown, Turn
from llmkit.stages.tables import shortened

NAME = "rollouts.html"
SHADES = 4
"""Of a colour, by how far an advantage is from 0."""
TOKENS = 4000
"""Tokens of an answer that are shown with their colours."""
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:90rem;margin:1rem auto;padding:0 1rem;color:#1b1f24;background:#fff}
h1{font-size:1.4rem}h2{font-size:1rem;margin:0}.k{color:#59636e}pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;
font-size:13px}form{position:sticky;top:0;background:inherit;padding:.5rem 0;display:flex;flex-wrap:wrap;gap:.6rem;
border-bottom:1px solid #d0d7de}input{width:5rem}input[type=search]{width:14rem}input[type=checkbox]{width:auto}
section{margin:1rem 0;padding:.6rem;border:1px solid #d0d7de;border-radius:6px;content-visibility:auto;
contain-intrinsic-size:auto 20rem}.side{display:grid;grid-template-columns:repeat(auto-fill,minmax(18rem,1fr));
gap:.6rem;margin-top:.5rem}article{border-left:6px solid #d0d7de;padding:0 .5rem}header{font-size:13px}
b.role{font-size:11px;color:#59636e}[hidden]{display:none!important}
.p1{--c:#d1f0d9}.p2{--c:#9bdcad}.p3{--c:#5cc07a}.p4{--c:#2b9a4c}.n1{--c:#ffe1df}.n2{--c:#ffb8b3}.n3{--c:#f5807a}
.n4{--c:#d64541}article[class]{border-color:var(--c)}i{font-style:normal;background:var(--c,none)}
@media(prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}section,form{border-color:#30363d}.k,b.role{
color:#9198a1}i[class]{color:#111}}
"""
CONTROLS = """<form>
<label>sort <select name=sort><option value="step">in order</option><option value="-best">best reward first</option>
<option value="worst">worst reward first</option><option value="-spread">most apart first</option>
<option value="-size">largest advantage first</option></select></label>
<label>step or row <input name=step0 type=number> to <input name=step1 type=number></label>
<label>reward <input name=reward0 type=number step=any> to <input name=reward1 type=number step=any></label>
<label>advantage <input name=advantage0 type=number step=any> to <input name=advantage1 type=number step=any></label>
<label>text <input name=text type=search></label>
<label><input name=cut type=checkbox> cut short alone</label>
<span class=k id=found></span></form>"""


def write_page(folder: Path, name: str, groups: Iterable[Group], answers: int, total: int) -> str:
    """Writes the page of `answers` answers to `total` prompts, as far as `groups` go; gives a line that leads to it."""
    shown, size, count = list[str](), 0, 0
    for group in groups:
        made = _group(len(shown), group)
        if shown and size + len(made) > 2 * PAGE:  # a few are much larger than the others
            break
        shown.append(made)
        size, count = size + len(made), count + len(group.answers)
    told = f"{count:,} answers in {len(shown):,} groups"
    if count < answers:
        told = f"{told}, of {answers:,} in {total:,}: evenly over the run, of large groups the best and the worst"
    title = f"<title>{html.escape(name)}: answers</title><meta name=viewport content='width=device-width'>"
    head = f"<!doctype html><html lang=en><meta charset=utf-8>{title}<style>{STYLE}</style>"
    body = f"<h1>{html.escape(name)}: answers</h1><p class=k>{told}.</p>{CONTROLS}<main>{''.join(shown)}</main>"
    script = Path(__file__).with_name("rollouts.js").read_text("utf-8")
    write_atomic(folder / NAME, f"{head}{body}<script>{script}</script></html>\n".encode())
    return f'<h2>Answers</h2><p><a href="{NAME}">Read answers by reward</a>: {told}.</p>'


def _group(at: int, group: Group) -> str:
    rewards = [one.reward for one in group.answers if math.isfinite(one.reward)] or [0.0]
    sizes = [abs(value) for one in group.answers for value in _advantages(one) if math.isfinite(value)]
    widest, mean = max(sizes, default=0.0), sum(rewards) / len(rewards)
    left = f" of those shown, {group.left_out:,} between them left out" if group.left_out else ""
    head = html.escape(f"{group.name} · reward {number(mean)} in the mean{left}")
    facts = {"step": group.at, "best": max(rewards), "worst": min(rewards), "spread": max(rewards) - min(rewards)}
    facts["size"] = max((abs(one.advantage or 0.0) for one in group.answers), default=0.0)
    data = " ".join(f'data-{name}="{value:.6g}"' for name, value in facts.items())
    made = "".join(_answer(one, widest) for one in group.answers)
    return f"<section id=g{at} {data}><h2>{head}</h2>{_said(group.question)}<div class=side>{made}</div></section>"


def _answer(one: Shown, widest: float) -> str:
    told = [f"reward {number(one.reward)}"]
    if len(one.rewards) > 1:
        told[0] += f" ({', '.join(f'{name} {number(value)}' for name, value in one.rewards.items())})"
    if one.advantage is not None:
        told.append(f"advantage {one.advantage:+.3g}")
    told.append(f"{one.tokens:,} tokens" + ("" if one.ended else ", cut short"))
    data = f'data-reward="{one.reward:.6g}" data-cut="{int(not one.ended)}"'
    data += "" if one.advantage is None else f' data-advantage="{one.advantage:.6g}"'
    text = _coloured(one.pieces, widest) if one.pieces else _said(one.turns, alone=len(one.turns) == 1)
    shade = "" if one.advantage is None else _shade(one.advantage, widest)
    return f"<article{shade} {data}><header class=k>{html.escape(' · '.join(told))}</header>{text}</article>"


def _said(turns: Sequence[Turn], alone: bool = False) -> str:
    """Who says what; of an answer in one turn what it says alone."""
    parts = [
        ("" if alone else f"<b class=role>{html.escape(one.role)}</b>", shortened(one.text, TEXT)) for one in turns
    ]
    return "".join(f"{role}<pre>{html.escape(text)}</pre>" for role, text in parts)


def _coloured(pieces: Sequence[tuple[str, float]], widest: float) -> str:
    """Tokens, each on the colour of its advantage."""
    made = (
        f'<i{_shade(value, widest)} title="{value:+.3g}">{html.escape(text)}</i>' for text, value in pieces[:TOKENS]
    )
    left = f"<p class=k>… and {len(pieces) - TOKENS:,} more tokens</p>" if len(pieces) > TOKENS else ""
    return f"<pre>{''.join(made)}</pre>{left}"


def _advantages(one: Shown) -> list[float]:
    return [value for _, value in one.pieces] or [one.advantage or 0.0]


def _shade(value: float, widest: float) -> str:
    """The class of an advantage's colour."""
    if not value or not widest or not math.isfinite(value):
        return ""
    depth = min(SHADES, math.ceil(SHADES * abs(value) / widest)) if math.isfinite(widest) else SHADES
    return f" class={'p' if value > 0 else 'n'}{depth}"

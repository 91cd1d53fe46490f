"""Answers in every format, good and crafted, for the tests of what reads them."""

from __future__ import annotations

from llmkit.inference.said.formats import FORCED, THOUGHTS, TOOLS, Format

TOOL = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "at": {}}}
OFFERED = {"get_weather": TOOL, "now": {"type": "object"}}
FORMATS = {name: Format(calls, THOUGHTS["think"]) for name, calls in TOOLS.items()} | {"forced": Format(FORCED)}

OBJECT = '{"name": "get_weather", "arguments": {"city": "Zürich \\ud83d\\ude00 \\"x\\"", "days": 3}}'
NOW = '{"name": "now", "arguments": {}}'
ARGUMENTS = '{"city": "Zürich \\ud83d\\ude00 \\"x\\"", "days": 3}'
BLOCK = "<function=get_weather>\n<parameter=city>\nZürich <b> & co\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
CALL = "<｜tool▁call▁begin｜>"
KIMI = "<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>" + ARGUMENTS + "<|tool_call_end|>"

GOOD = {
    "hermes": f"Let me look.\n<tool_call>\n{OBJECT}\n</tool_call>\n<tool_call>\n{NOW}\n</tool_call>",
    "qwen3_coder": f"Let me look.\n<tool_call>\n{BLOCK}</function>\n</tool_call>\n<tool_call>{NOW}</tool_call>",
    "glm": "Let me look.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Zürich <b> & co</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
    "minimax": 'Let me look.\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Zürich <b> & co'
    '</parameter>\n<parameter name="days">3</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n'
    "</minimax:tool_call>",
    "mistral": f"Let me look.[TOOL_CALLS] [{OBJECT}, {NOW}]",
    "deepseek": f"Let me look.<｜tool▁calls▁begin｜>{CALL}function<｜tool▁sep｜>get_weather\n```json\n{ARGUMENTS}\n```"
    f"<｜tool▁call▁end｜>\n{CALL}now<｜tool▁sep｜>{{}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "kimi": f"Let me look.<|tool_calls_section_begin|>{KIMI}<|tool_call_begin|>functions.now:1"
    "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
    "llama3": f"<|python_tag|>{OBJECT.replace('arguments', 'parameters')}; {NOW}",
    "pythonic": "[get_weather(city='Zürich \\U0001f600 \"x\"', days=3), now()]",
    "harmony": "<|channel|>analysis<|message|>I need the weather.<|end|><|start|>assistant<|channel|>commentary"
    f"<|message|>Let me look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json"
    f"<|message|>{ARGUMENTS}<|call|><|start|>assistant to=functions.now<|channel|>commentary json<|message|>{{}}",
    "forced": f"[{OBJECT}, {NOW}]",
}
"""Two calls, the first with arguments, in nearly all with a text before them."""

DEEP = '{"a":' * 100
CRAFTED = [
    "",
    " \n ",
    "plain text, <b>not</b> a call, [1] {2}",
    "<think>hm <think> again </think>\n\nSo: 1 < 2",
    "<think>never closed, with <tool_call>" + OBJECT + "</tool_call>",
    "</think> alone </tool_call>",
    "<tool_call>",
    "<tool_call><tool_call>" + OBJECT + "</tool_call></tool_call>",
    "<tool_call>" + OBJECT[:-1],
    "<tool_call>" + OBJECT + "</tool_",
    "<tool_call>" + OBJECT + " and so on",
    "<tool_call>" + DEEP,
    '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "now", "name": "now", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "now", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "now", "arguments": {"a": NaN}}</tool_call>',
    '<tool_call>{"name": "now", "arguments": {"a": 01}}</tool_call>',
    '<tool_call>{"arguments": {"a": "\\ud800"}, "name": "now"}</tool_call>',
    '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>',
    '<tool_call>{"name": "now", "arguments": "{\\"a\\": "}</tool_call>',
    '<tool_call>{"name": "now", "arguments": {"a": "\ud800 \x00"}}</tool_call>',
    '<tool_call>{"name": "now", "arguments": {"a": ' + "9" * 5000 + "}}</tool_call>",
    "<tool_call><function=now><parameter=a>1</parameter><parameter=a>2</parameter></function></tool_call>",
    "<function=now><parameter=a>" + "<" * 50 + "</parameter></function>",
    "<tool_call>now<arg_key>a</arg_key><arg_value></arg_value></tool_call>",
    "[TOOL_CALLS]now{}[TOOL_CALLS]get_weather[CALL_ID]a1[ARGS]" + ARGUMENTS,
    "[TOOL_CALLS] [" + NOW + ', {"name": "rm"}] rest',
    CALL + "function<｜tool▁sep｜>now\n```json\n{}\n``<｜tool▁call▁end｜>",
    CALL + "now<｜tool▁sep｜>{}",
    '{"name": "Bob", "age": 3}',
    NOW + "; " + NOW + " ;; " + NOW + " that was it",
    '[now(a=(1, -.5, {"k": None}), b="\\x41\\q",), now()] ',
    "[now(), __import__('os')]",
    "[now(a=" + "[" * 200,
    "[now(a='\\U00110000')]",
    "<|channel|>final<|message|>done<|return|>",
    "<|channel|>analysis<|message|>a<|channel|>final<|message|>b",
    "<|start|>assistant<|channel|>commentary to=functions.rm<|message|>{}<|call|>",
    "<|channel|>" + "x" * 600,
    "<|start|><|start|><|message|>x\ud83d",
    "<tool_call>\n{" + '"name": "now", ' * 30,
]

"""Texts that are put together from skeletons are those that the template itself makes."""

import random

import pytest

from llmkit.data.rows import Unusable
from llmkit.data.skeleton import opaque, skeleton
from llmkit.data.template import Template
from llmkit.models.tokenizer import _template
from tests.conftest import CHATML, make_tokenizer

DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe"
    " kind<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n'}}{% if message.tool_calls is defined %}CALLS{% endif %}{% if loop.last %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}{{ messages | length }}"
)
ROLES = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.role == 'assistant' %}"
    "{{ m['content'] ~ eos_token }}{% else %}{{ raise_exception('no ' + m.role) }}{% endif %}{% endfor %}"
)
KNOWN = {"chatml": CHATML, "default system": DEFAULT_SYSTEM, "roles": ROLES}
NOT = {
    "trims": "{% for m in messages %}{{ m.content | trim }}{% endfor %}",
    "asks": "{% for m in messages %}{% if m.content %}{{ m.content }}{% endif %}{% endfor %}",
    "asks in line": "{% for m in messages %}{{ m.content if m.role == 'user' else m['content'] }}{% endfor %}",
    "sets": "{% for m in messages %}{% set c = m.content %}{{ c.split('</think>')[-1] }}{% endfor %}",
    "whole message": "{% for m in messages %}{{ m | tojson }}{% endfor %}",
    "whole list": "{{ messages | tojson }}",
    "items": "{% for m in messages %}{% for k, v in m.items() %}{{ v }}{% endfor %}{% endfor %}",
    "method": "{% for m in messages %}{{ m.get('content').strip() }}{% endfor %}",
    "other name": "{% set rest = messages[1:] %}{% for m in rest %}{{ m.content }}{% endfor %}",
    "neighbours": "{% for m in messages %}{{ loop.previtem.content if loop.previtem }}{% endfor %}",
    "filter block": "{% for m in messages %}{% filter upper %}{{ m.content }}{% endfilter %}{% endfor %}",
    "macro": "{% macro say(m) %}{{ m.content }}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "any key": "{% for m in messages %}{{ m[key] }}{% endfor %}",
    "length": "{% for m in messages %}{{ m.content | length }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "broken": "{% for m in messages %}",
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_put_together_is_what_the_template_makes(name):
    rng, tokenizer = random.Random(0), make_tokenizer(KNOWN[name])
    template = Template(tokenizer, None)
    assert template.opaque
    made = 0
    for _ in range(300):
        words = ["", " ", "\n", "hello", "{{ x }}", "<|im_start|>", "\ue000", "0\ue001", "ünd", "user"]
        roles = [rng.choice(["user", "assistant", "system"]) for _ in range(rng.randint(1, 5))]
        said = [{"role": role, "content": "".join(rng.choices(words, k=rng.randint(0, 5)))} for role in roles]
        prompt = rng.random() < 0.5
        try:
            wanted = template._rendered(said, (), prompt)
        except Unusable:
            with pytest.raises(Unusable):
                template.text(said, prompt=prompt)
            continue
        assert template.text(said, prompt=prompt) == wanted
        made += 1
    assert made > 20 and template.skeletons


@pytest.mark.parametrize("name", NOT)
def test_a_template_that_does_anything_with_what_is_said_is_rendered(name):
    assert not opaque(NOT[name])


def test_messages_with_more_than_a_role_and_a_text_are_rendered():
    template = Template(make_tokenizer(DEFAULT_SYSTEM), None)
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": []}]
    assert "CALLS" in template.text(said) and not template.skeletons


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "gemma", "phi3", "zephyr", "alpaca"])
def test_named_templates_give_the_same_either_way(name):
    template = Template(make_tokenizer(_template(name)), None)
    said = [
        {"role": "user", "content": " a\n"},
        {"role": "assistant", "content": "b "},
        {"role": "user", "content": "c"},
    ]
    for prompt in (False, True):
        assert template.text(said, prompt=prompt) == template._rendered(said, (), prompt)


def test_a_skeleton_is_cut_where_contents_stand():
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    parts = skeleton(
        said, lambda marked: "A" + marked[0]["content"] + "B" + marked[1]["content"] + marked[0]["content"]
    )
    assert parts == ("A", 0, "B", 1, "", 0, "")

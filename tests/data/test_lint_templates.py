"""Lint of what templates make of rows."""

import pytest

from tests.conftest import CHATML
from tests.data import clean
from tests.data.test_render import BEHIND, MARKED

OTHERWISE = CHATML.replace("<|im_start|>assistant\n' }}{% endif", "<|im_start|>assistant: ' }}{% endif")
TEMPLATES = {
    "untrained end": BEHIND.replace("END", "'</turn>\n'"),
    "doubled bos": "{{ bos_token }}" + CHATML,
    "generation prompt": MARKED.replace("<|im_start|>' }}{% endif", "<|im_start|>: ' }}{% endif"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_faults_of_a_template_show_in_its_rows(name, lint):
    found = lint(clean.rows("chat", 20), template=TEMPLATES[name])
    assert name in found and found[name].level == "warn" and found[name].places[0].line == 1
    assert name not in lint(clean.rows("chat", 20), template=CHATML)


def test_a_generation_prompt_that_refuses_the_rows(lint):
    found = lint(clean.rows("completion") + clean.rows("chat"), template=OTHERWISE, bad_share=1.0)
    assert found["generation prompt"].count == 40 and found["generation prompt"].places[0].line == 41


def test_a_template_that_is_not_the_model_s_own_is_told(tiny, tmp_path):
    from llmkit.models.node import ModelRef
    from llmkit.models.resolve import resolve
    from llmkit.models.tokenizer import read_tokenizer
    from llmkit.stages.lint_table import served

    resolved = resolve(ModelRef(name=str(tiny)))
    for text, count in ((CHATML, 0), (TEMPLATES["doubled bos"], 1)):
        path = tmp_path / "template.jinja"
        path.write_text(text)
        ref = ModelRef(name=str(tiny), template=str(path))
        found = served(resolved, ref, read_tokenizer(resolved, ref))
        assert len(found) == count and all(f.name == "template" for f in found)
    assert served(resolved, ModelRef(name=str(tiny)), None) == ()


REWRITING = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_a_row_of_several_examples_counts_once(lint):
    turns = [
        ("user", "a &amp; b"),
        ("assistant", "<think>x</think>so"),
        ("user", "c"),
        ("assistant", "<think>y</think>no"),
    ]
    row = {"messages": [{"role": role, "content": said} for role, said in turns]}
    found = lint([row, *clean.rows("chat", 30)], template=REWRITING)
    assert found["html entities"].count == 1 and len(found["html entities"].places) == 1

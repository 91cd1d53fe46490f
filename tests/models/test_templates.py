"""Chat templates of ours: the text of each format, as it is defined, and where its answers stand."""

from pathlib import Path

import pytest

from llmkit.core.errors import ModelError
from llmkit.data.render import Renderer
from llmkit.data.rows import Row, Unusable
from llmkit.models import load
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve
from llmkit.models.tokenizer import _template, read_tokenizer

SAID = [("system", "S"), ("user", "hello"), ("assistant", "one"), ("user", "world"), ("assistant", "two")]
MESSAGES = tuple({"role": role, "content": text} for role, text in SAID)
BOS, EOS = "<|im_start|>", "<|im_end|>"  # the tiny tokenizer's
INTRO = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
TEXTS = {
    "chatml": "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in SAID),
    "llama3": BOS + "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>" for role, text in SAID),
    "mistral": f"{BOS}[INST] S\n\nhello[/INST] one{EOS}[INST] world[/INST] two{EOS}",
    "gemma": f"{BOS}<start_of_turn>user\nS\n\nhello<end_of_turn>\n<start_of_turn>model\none<end_of_turn>\n"
    "<start_of_turn>user\nworld<end_of_turn>\n<start_of_turn>model\ntwo<end_of_turn>\n",
    "phi3": "".join(f"<|{role}|>\n{text}<|end|>\n" for role, text in SAID),
    "zephyr": "".join(f"<|{role}|>\n{text}{EOS}\n" for role, text in SAID),
    "alpaca": f"S\n\n### Instruction:\nhello\n\n### Response:\none{EOS}\n\n"
    f"### Instruction:\nworld\n\n### Response:\ntwo{EOS}\n\n",
}
ENDS = {"chatml": EOS, "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>"}


def named(name, tokenizer):
    """The tiny tokenizer with a template of ours, and the tokens that its turns end in."""
    from tests.conftest import make_tokenizer

    tokenizer = make_tokenizer(_template(name))
    tokenizer.add_special_tokens({"additional_special_tokens": [ENDS.get(name, EOS)]})
    return tokenizer


@pytest.mark.parametrize("name", TEXTS)
def test_a_template_of_ours_gives_its_format_and_its_answers_are_trained(name, tokenizer):
    made = named(name, tokenizer)
    assert made.apply_chat_template(list(MESSAGES), tokenize=False) == TEXTS[name]
    asked = made.apply_chat_template(list(MESSAGES[:4]), tokenize=False, add_generation_prompt=True)
    assert TEXTS[name].startswith(asked) and TEXTS[name][len(asked) :].lstrip().startswith("two")
    rendered = Renderer(made).render(Row(0, "0", MESSAGES))
    end = ENDS.get(name, EOS)
    assert [rendered.text[a:b].strip() for a, b in rendered.spans] == [f"one{end}", f"two{end}"]
    assert not rendered.close and not rendered.unended


def test_without_a_system_message_alpaca_has_its_own_and_the_others_none(tokenizer):
    for name in TEXTS:
        text = named(name, tokenizer).apply_chat_template(list(MESSAGES[1:3]), tokenize=False)
        assert text.startswith(INTRO) == (name == "alpaca") and "S\n" not in text


@pytest.mark.parametrize("name", ["mistral", "gemma", "alpaca"])
def test_a_role_that_a_format_does_not_have_makes_the_row_unusable(name, tokenizer):
    said = (*MESSAGES, {"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"})
    with pytest.raises(Unusable, match=f"{name} has no role tool"):
        Renderer(named(name, tokenizer)).render(Row(0, "0", said))


def test_a_template_is_one_of_ours_or_a_file(tmp_path):
    assert set(TEXTS) == {path.stem for path in (Path(load.__file__).parent / "templates").glob("*.jinja")}
    (tmp_path / "own.jinja").write_text("{{ 1 }}")
    assert _template(str(tmp_path / "own.jinja")) == "{{ 1 }}"
    with pytest.raises(ModelError, match="chatmll cannot be read .*; fix: give a file, or one of alpaca, chatml"):
        _template("chatmll")


def test_a_broken_template_is_named_with_its_line(tiny, tmp_path):
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    ref = ModelRef(name=str(tiny), template=str(tmp_path / "bad.jinja"))
    with pytest.raises(ModelError, match=r"bad\.jinja:2: model\.template: is no Jinja template"):
        read_tokenizer(resolve(ref), ref)

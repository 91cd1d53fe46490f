"""Exact tokens and weights under chat templates of many shapes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.core.errors import DataError
from llmkit.data.render import Renderer
from llmkit.data.rows import Unusable
from llmkit.data.shapes import shaped
from tests.conftest import CHATML, make_tokenizer

LLAMA3 = (
    "{{ '<|endoftext|>' }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' }}"
    "{{ m['content'] | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{% if tools %}{{ 'tools: ' }}{% for t in tools %}{{ t['function']['name'] }}{% endfor %}{% endif %}" + CHATML
)
PLAIN = (
    "{% for m in messages %}{{ '### ' + m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)
THINKS = (  # drops what an earlier answer thought
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "qwen": QWEN, "plain": PLAIN}


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def encoded(tokenizer, row, train_on="assistant"):
    renderer = Renderer(tokenizer, train_on)
    return renderer.encode([renderer.render(shaped(row, 0))])[0]


def learned(tokenizer, row, train_on="assistant"):
    ids, weights = encoded(tokenizer, row, train_on)
    return tokenizer.decode([i for i, w in zip(ids, weights, strict=True) if w])


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_their_end_of_turn_are_trained_and_nothing_else(name):
    tokenizer = make_tokenizer(TEMPLATES[name])
    row = {"messages": turns("one two", "the fox", "three", "a dog")}
    said = learned(tokenizer, row).replace("\n", "").strip().replace("> ", ">")
    # a template without an end of turn: the last answer gets one
    assert said == ("the foxa dog<|im_end|>" if name == "plain" else "the fox<|im_end|>a dog<|im_end|>")
    assert "fox" not in learned(tokenizer, row, "last") and "dog" in learned(tokenizer, row, "last")
    assert "one two" in learned(tokenizer, row, "all")


THOUGHT = (  # special tokens inside of a turn, and none at its end
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q: ' + m['content'] + '\n' }}{% else %}"
    "{{ 'A: <|im_start|>hmm<|im_end|>' + m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)


def test_a_special_token_inside_of_a_turn_is_not_its_end():
    said = learned(make_tokenizer(THOUGHT), {"messages": turns("one", "the fox", "two", "a dog")})
    assert said == "<|im_start|>hmm<|im_end|>the fox<|im_start|>hmm<|im_end|>a dog<|im_end|>"


LETTERS = st.text(st.sampled_from("ab \n\t.,!?1é日\U0001f600#"), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(set(TEMPLATES) - {"plain"})),
    st.lists(LETTERS, min_size=2, max_size=4).filter(lambda t: len(t) % 2 == 0),
)
def test_tokens_are_those_that_the_template_gives(name, texts):
    tokenizer = CACHE.setdefault(name, make_tokenizer(TEMPLATES[name]))
    messages = turns(*texts)
    ids, weights = encoded(tokenizer, {"messages": messages})
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
    # an answer starts where the generation prompt ends: what is sampled there is what is trained
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert all(w == 0 for w in weights[: min(len(prompt), len(ids)) - 1]) or len(texts) > 2
    assert weights[-1] or tokenizer.decode(ids[-1:]) == "\n"


CACHE = {}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "a", " b\n", "<|im_", "\ue0f3"]), min_size=1, max_size=6)
)
def test_special_text_in_messages_never_becomes_a_special_token(parts):
    tokenizer = CACHE.setdefault("chatml", make_tokenizer())
    text = "x" + "".join(parts)
    ids, _ = encoded(tokenizer, {"messages": turns(text, "fine")})
    specials = [tokenizer.decode([i]) for i in ids if i < 3]
    assert specials == ["<|im_start|>", "<|im_end|>"] * 2


def test_tools_and_system_turns_are_rendered_and_not_trained():
    tokenizer = make_tokenizer(QWEN)
    tools = [{"type": "function", "function": {"name": "lookup", "parameters": {}}}]
    row = {"messages": [{"role": "system", "content": "be kind"}, *turns("hi", "the fox")], "tools": tools}
    ids, _ = encoded(tokenizer, row)
    assert "tools: lookup" in tokenizer.decode(ids)
    assert learned(tokenizer, row) == "the fox<|im_end|>"


def test_prompt_and_completion_messages_train_the_completion_alone():
    tokenizer = make_tokenizer()
    row = {"prompt": turns("a", "one", "b"), "completion": [{"role": "assistant", "content": "two"}]}
    assert learned(tokenizer, row) == "two<|im_end|>"


def test_plain_text_is_closed_and_only_the_completion_is_trained():
    tokenizer = make_tokenizer(None)
    row = {"prompt": "hello world", "completion": " the fox"}
    assert learned(tokenizer, row) == " the fox<|im_end|>"
    assert learned(tokenizer, {"text": "the fox"}) == "the fox<|im_end|>"
    assert learned(tokenizer, {"prompt": "hi <|im_end|> ", "completion": "fox"}) == "fox<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused_and_never_guessed():
    tokenizer = make_tokenizer(THINKS)
    fine = {"messages": turns("a", "<think>x</think>one")}
    assert learned(tokenizer, fine) == "<think>x</think>one<|im_end|>"
    with pytest.raises(Unusable, match="rewrites earlier turns"):
        encoded(tokenizer, {"messages": turns("a", "<think>x</think>one", "b", "two")})


def test_under_such_a_template_each_answer_becomes_an_example_as_it_was_given():
    tokenizer = make_tokenizer(THINKS)
    row = shaped({"messages": turns("a", "<think>x</think>one", "b", "<think>y</think>two")}, 0)
    renderer = Renderer(tokenizer)
    parts = renderer.encode(renderer.turns(row))
    said = [tokenizer.decode([i for i, w in zip(ids, ws, strict=True) if w]) for ids, ws in parts]
    assert said == ["<think>x</think>one<|im_end|>", "<think>y</think>two<|im_end|>"]
    assert "<think>x" not in tokenizer.decode(parts[1][0])  # as the model will see it in use


MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>' }}{% generation %}{{ m['content'] }}"
    "{{ '<|im_end|>' }}{% endgeneration %}{% else %}{{ 'Q: ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)


def test_the_template_s_own_generation_markers_say_what_is_trained():
    tokenizer = make_tokenizer(MARKED)
    row = {"messages": turns("a A: b", "the fox", "c", "A: dog")}
    assert learned(tokenizer, row) == "the fox<|im_end|>A: dog<|im_end|>"
    assert learned(tokenizer, row, "last") == "A: dog<|im_end|>"


BEHIND = MARKED.replace("{{ '<|im_end|>' }}{% endgeneration %}", "{% endgeneration %}{{ END }}")
NEXT = BEHIND.replace("{{ 'Q: '", "{{ '<|im_start|>Q: '")


@pytest.mark.parametrize("template", [BEHIND, NEXT])
@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("'<|im_end|>'", "the fox<|im_end|>a dog<|im_end|>"),
        ("'\n<|im_end|>\n'", "the fox\n<|im_end|>a dog\n<|im_end|>"),
        ("'\n'", "the foxa dog<|im_end|>"),  # none: the last answer gets one, and the next turn's beginning is no end
        ("'</turn>\n'", "the foxa dog"),
        ("('<|im_end|>' if loop.last else '\n')", "the foxa dog<|im_end|>"),
    ],
)
def test_an_end_of_turn_that_the_markers_leave_out_is_trained_all_the_same(template, end, said):
    tokenizer = make_tokenizer(template.replace("END", end))
    row = {"messages": turns("one", "the fox", "two", "a dog")}
    assert learned(tokenizer, row) == said
    assert Renderer(tokenizer).render(shaped(row, 0)).unended == (end == "'</turn>\n'")


def test_tools_that_a_template_does_not_show_are_no_silent_loss():
    tools = [{"type": "function", "function": {"name": "lookup", "parameters": {}}}]
    with pytest.raises(Unusable, match="does not show the row's tools"):
        encoded(make_tokenizer(), {"messages": turns("a", "b"), "tools": tools})


def test_a_template_that_refuses_a_row_says_so_and_no_template_is_an_error():
    with pytest.raises(Unusable, match="System role not supported"):
        encoded(make_tokenizer(GEMMA), {"messages": [{"role": "system", "content": "s"}, *turns("a", "b")]})
    with pytest.raises(DataError, match="no chat template"):
        encoded(make_tokenizer(None), {"messages": turns("a", "b")})

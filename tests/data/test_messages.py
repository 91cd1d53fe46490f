"""What rows may hold: weights, roles that are trained, tools, thoughts, and the formats of other tools."""

import json
import time

import pytest

from llmkit.core.errors import RecipeError
from llmkit.data.encode import Rendered
from llmkit.data.node import Data, Jsonl
from llmkit.data.prepare import prepare
from llmkit.data.render import Renderer
from llmkit.data.rows import Unusable
from llmkit.data.shapes import shaped
from llmkit.data.thoughts import layered
from tests.conftest import CHATML, make_tokenizer
from tests.data.test_render import BEHIND, GEMMA, LLAMA3, MARKED, PLAIN, turns

TOOLS = (  # calls as JSON, results inside of a user's turn
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{% if m['role'] == 'tool' %}"
    "{{ '<|im_start|>user\n<result>' + m['content'] + '</result><|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}"
    "{% for c in m['tool_calls'] or [] %}{{ '<call>' + c['function']['name'] + ' ' }}"
    "{{ ARGUMENTS }}{{ '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
JSON, JOINED, PRINTED = (
    TOOLS.replace("{{ ARGUMENTS }}", by)
    for by in (
        "{{ c['function']['arguments'] | tojson }}",
        "{{ '' + c['function']['arguments'] }}",
        "{{ c['function']['arguments'] }}",
    )
)
FIELD = (  # takes thoughts in a field, and drops those before the last question
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last and m.NAME %}"
    "{{ '<think>\n' + m.NAME + '\n</think>\n\n' }}{% endif %}{{ (m['content'] or '') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CACHE = {}


def tokenizer_of(template):
    if template not in CACHE:
        CACHE[template] = make_tokenizer(template)
    return CACHE[template]


def parts(row, template=CHATML, **how):
    """(whole text, [(trained text, weight)]) of each example of a row."""
    tokenizer = tokenizer_of(template)
    renderer = Renderer(tokenizer, **how)
    made = []
    for ids, weights in renderer.encode(renderer.turns(shaped(row, 0))):
        runs = []
        for id, weight in zip(ids, weights, strict=True):
            if weight and runs and runs[-1][1] == weight and runs[-1][2]:
                runs[-1][0].append(id)
            elif weight:
                runs.append([[id], weight, True])
            elif runs:
                runs[-1][2] = False
        made.append((tokenizer.decode(ids), [(tokenizer.decode(run), weight) for run, weight, _ in runs]))
    return made


def trained(row, template=CHATML, **how):
    ((_, runs),) = parts(row, template, **how)
    return runs


END = "<|im_end|>"


def weighed(*weights, key="weight"):
    said = turns("one", "the fox", "two", "a dog")
    return {"messages": [m | ({} if w is None else {key: w}) for m, w in zip(said, weights, strict=True)]}


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, MARKED, BEHIND.replace("END", "'<|im_end|>'")])
def test_each_message_has_its_own_weight(template):
    runs = trained(weighed(None, 0.5, None, 1), template)
    assert [(text.strip(), w) for text, w in runs] == [("the fox" + END, 0.5), ("a dog" + END, 1.0)]
    assert [text.strip() for text, _ in trained(weighed(None, 0, None, None), template)] == ["a dog" + END]
    assert [text.strip() for text, _ in trained(weighed(None, None, None, 0), template)] == ["the fox" + END]


def test_axolotl_s_word_and_a_weight_on_a_question():
    assert trained(weighed(None, False, None, True, key="train")) == [("a dog" + END, 1.0)]
    assert trained(weighed(None, False, True, None, key="train")) == [("two" + END, 1.0), ("a dog" + END, 1.0)]
    assert trained(weighed(None, 1, None, 0.5), train_on="last") == [("a dog" + END, 0.5)]


def test_under_all_a_weight_lies_over_what_it_says():
    ((text, runs),) = parts(weighed(0, None, None, 0.5), train_on="all")
    assert [w for _, w in runs] == [1.0, 1.0, 0.5, 1.0] and "one" not in "".join(t for t, _ in runs)
    assert runs[2][0] == "a dog" + END


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"weight": -1}, "a weight is not a number"),
        ({"weight": "1"}, "a weight is not a number"),
        ({"weight": float("nan")}, "a weight is not a number"),
        ({"weight": 1, "train": False}, "weight and train contradict each other: 1 and false"),
        ({"weight": 0, "train": True}, "contradict"),
        ({"train": "yes"}, "train is not true or false"),
        ({"train_detail": []}, "train_detail, which is not read"),
        ({"role": "narrator"}, "unknown role 'narrator'"),
        ({"role": None}, "a message has no role"),
        ({"content": ["x"]}, "content of assistant is not text"),
        ({"content": [{"type": "image_url", "image_url": "x"}]}, "holds 'image_url', not text"),
        ({"tool_calls": "x"}, "tool_calls is not a list of calls"),
        ({"tool_calls": [{"function": {}}]}, "a tool call has no name"),
        ({"reasoning": "a", "thinking": "b"}, "two thoughts in one message"),
        ({"thinking": 1}, "a thought is not text"),
    ],
)
def test_d4_what_a_message_must_not_say_is_the_reason_why_its_row_is_not_used(more, why, tmp_path, tokenizer):
    said = turns("one", "the fox")
    bad = {"messages": [said[0], said[1] | more]}
    with pytest.raises(Unusable, match=why):
        shaped(bad, 0)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"messages": said}] * 30 + [bad]))
    data = Data(train=(Jsonl(path=str(path)),))
    made = prepare(data.train, data, tokenizer)
    assert len(made) == 30 and sum(n for k, n in made.counts.items() if k.startswith("unusable")) == 1
    (finding,) = [f for f in made.lint.findings() if f.level == "warn" and f.name != "duplicate"]
    assert finding.places[0].line == 31 and why.split(":")[0][:20] in finding.places[0].detail


def test_roles_are_trained_as_asked_each_with_the_end_of_its_turn():
    row = {"messages": [{"role": "system", "content": " be kind "}, *turns("one", "the fox", "two", "a dog")]}
    said = [text for text, _ in trained(row, LLAMA3, train_on=("user", "system"))]
    assert said == ["be kind" + END, "one" + END, "two" + END]
    every = [text for text, _ in trained(row, train_on=("user", "assistant"))]
    assert every == ["one" + END, "the fox" + END, "two" + END, "a dog" + END]
    plain = [text for text, _ in trained({"messages": turns("one", "a fox")}, PLAIN, train_on=("user",))]
    assert plain == ["one"]
    begun = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% endfor %}"  # nothing ends
    assert [text for text, _ in trained({"messages": turns("one", "a fox")}, begun, train_on=("user",))] == ["one"]


def test_a_template_that_refuses_half_a_conversation_ends_no_turn_of_it():
    whole = "{% if messages | length < 2 %}{{ raise_exception('half') }}{% endif %}" + CHATML
    row = {"messages": [{"role": "system", "content": "be kind"}, *turns("one", "the fox")]}
    assert [text for text, _ in trained(row, whole, train_on=("system", "user"))] == ["be kind", "one" + END]


def test_a_message_that_the_template_rewrites_cannot_be_trained_and_says_so():
    cuts = CHATML.replace("m['content']", "m['content'][:4]")
    with pytest.raises(Unusable, match="changes what a message says"):
        trained({"messages": turns("one two", "a fox")}, cuts, train_on=("user",))


@pytest.mark.parametrize(
    ("said", "good"), [("[user, tool]", True), ("[]", False), ("[last]", False), ("users", False), ("last", True)]
)
def test_train_on_takes_a_word_or_a_list_of_roles(said, good):
    import yaml

    train_on = yaml.safe_load(said)
    if good:
        assert Data(train=(), train_on=train_on).train_on == (tuple(train_on) if said[0] == "[" else train_on)
    else:
        with pytest.raises(RecipeError, match="train_on"):
            Data(train=(), train_on=train_on)


CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "dog"}}}
LOOK = {"type": "function", "function": {"name": "look", "parameters": {}}}
ASKED = {"role": "user", "content": "one"}
CALLED = {
    "messages": [
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "the fox"},
        {"role": "assistant", "content": "a dog"},
    ],
    "tools": [LOOK],
}


@pytest.mark.parametrize("template", [JSON, JOINED, PRINTED], ids=["tojson", "joined", "printed"])
@pytest.mark.parametrize("written", ["value", "text", "flat"])
def test_calls_are_trained_in_the_json_that_the_template_writes_however_the_row_gives_them(template, written):
    call = json.loads(json.dumps(CALL))
    if written != "value":
        call["function"]["arguments"] = '{"at": "dog"}'
    row = json.loads(json.dumps(CALLED))
    row["messages"][1]["tool_calls"] = [call["function"] if written == "flat" else call]
    said = [text for text, _ in trained(row, template)]
    assert said == ['<call>look {"at": "dog"}</call>' + END, "a dog" + END]
    with_results = [text for text, _ in trained(row, template, train_on=("assistant", "tool"))]
    assert with_results[1] == "the fox" or with_results[1].startswith("the fox")


def test_sharegpt_s_calls_and_observations_and_llama_factory_s_tools():
    row = {
        "conversations": [
            {"from": "human", "value": "one"},
            {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "dog"}}'},
            {"from": "observation", "value": "the fox"},
            {"from": "gpt", "value": "a dog", "weight": 0},
        ],
        "tools": '[{"name": "look", "parameters": {}}]',
        "system": "",
    }
    ((text, runs),) = parts(row, JSON)
    assert runs == [('<call>look {"at": "dog"}</call>' + END, 1.0)] and "<result>the fox</result>" in text
    assert '{"type": "function", "function": {"name": "look"' in text
    with pytest.raises(Unusable, match="function_call is not JSON"):
        shaped({"conversations": [row["conversations"][0], {"from": "function_call", "value": "x"}]}, 0)


def test_alpaca_s_system_and_history():
    row = {"instruction": "two", "output": "a dog", "system": "be kind", "history": [["one", "the fox"]]}
    ((text, runs),) = parts(row)
    assert text.startswith("<|im_start|>system\nbe kind") and [t for t, _ in runs] == ["the fox" + END, "a dog" + END]
    with pytest.raises(Unusable, match="history is not a list of pairs"):
        shaped(row | {"history": [["one"]]}, 0)


def test_content_in_parts_is_joined_and_what_a_tool_gave_is_written_as_json():
    parted = [ASKED | {"content": [{"type": "text", "text": "on"}, {"type": "text", "text": "e"}]}, turns("", "x")[1]]
    assert shaped({"messages": parted}, 0).messages[0]["content"] == "one"
    row = json.loads(json.dumps(CALLED))
    row["messages"][2]["content"] = {"é": [1]}
    assert shaped(row, 0).messages[2]["content"] == '{"é": [1]}'


TRANSCRIPT = "\n\nHuman: one\n\nstill: one\n\nAssistant: the fox\n\nHuman: two\n\nAssistant: a dog\n\nHuman: three"


def test_a_transcript_is_a_conversation_up_to_its_last_answer(tmp_path, tokenizer):
    row = shaped({"transcript": TRANSCRIPT}, 0)
    assert [m["content"] for m in row.messages] == ["one\n\nstill: one", "the fox", "two", "a dog"]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"chosen": TRANSCRIPT, "rejected": TRANSCRIPT}) + "\n")
    data = Data(train=(Jsonl(path=str(path), columns={"transcript": "chosen"}),))
    assert len(prepare(data.train, data, tokenizer)) == 1


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("who: hi", "does not begin with who speaks"),
        ("\n\nHuman: hi\n\nAssistant: ", "content of assistant is blank"),
        ("\n\nHuman: hi\n\nHuman: you\n\nAssistant: x", "roles in the wrong order"),
        ("", "transcript is blank"),
        (3, "transcript is not text"),
    ],
)
def test_a_transcript_that_is_none_says_why(said, why):
    with pytest.raises(Unusable, match=why):
        shaped({"transcript": said}, 0)


def thinking(key="reasoning_content"):
    said = turns("one", "the fox", "two", "a dog")
    return {"messages": [said[0], said[1] | {key: "red"}, said[2], said[3] | {key: "brown"}]}


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_reach_the_template_under_its_name_and_earlier_ones_are_as_in_use(name, key):
    first, last = parts(thinking(key), FIELD.replace("NAME", name))
    assert first[1] == [("<think>\nred\n</think>\n\nthe fox" + END, 1.0)]
    assert last[1] == [("<think>\nbrown\n</think>\n\na dog" + END, 1.0)] and "red" not in last[0]
    for (_, runs), said in zip(
        parts(thinking(key), FIELD.replace("NAME", name), train_reasoning=False), ("the fox", "a dog"), strict=True
    ):
        assert runs == [(said + END, 1.0)]


def test_a_template_without_a_place_for_thoughts_gets_them_in_the_answer():
    ((text, runs),) = parts(thinking())
    assert [t for t, _ in runs] == [
        "<think>\nred\n</think>\n\nthe fox" + END,
        "<think>\nbrown\n</think>\n\na dog" + END,
    ]
    assert [t for t, _ in trained(thinking(), train_reasoning=False)] == ["the fox" + END, "a dog" + END]
    assert "<think>" not in "".join(t for t, _ in trained(thinking(), train_on="all", train_reasoning=False))


def test_thoughts_that_a_marked_template_drops_are_no_silent_loss():
    drops = MARKED.replace(
        "m['content'] }}{{", "(m['content'] if loop.last else m['content'].split('</think>')[-1]) }}{{"
    )
    row = {"messages": turns("a", "<think>red</think>one", "b", "<think>brown</think>two")}
    first, last = parts(row, drops)
    assert first[1] == [("<think>red</think>one" + END, 1.0)] and last[1] == [("<think>brown</think>two" + END, 1.0)]
    never = FIELD.replace("m.NAME %}", "m.reasoning_content and false %}").replace("NAME", "reasoning_content")
    with pytest.raises(Unusable, match="does not show an answer's thought"):
        parts({"messages": thinking()["messages"][:2]}, never)


def test_tags_of_a_thought_that_are_special_tokens_stay_those_in_answers_alone():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    renderer = Renderer(tokenizer)
    row = shaped({"messages": turns("a <think>", "<think>red</think>one <|im_end|>")}, 0)
    ids, _ = renderer.encode([renderer.render(row)])[0]
    opened, closed, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<think>", "</think>", "<|im_end|>"))
    assert ids.count(opened) == 1 and ids.count(closed) == 1 and ids.count(end) == 2
    assert ids.index(opened) > ids.index(end)


def test_layers_lie_over_one_another():
    spans, weights = layered([(0, 10, 1.0), (2, 4, 0.5), (3, 8, 0.0)])
    assert spans == ((0, 2), (2, 3), (8, 10)) and weights == (1.0, 0.5, 1.0)


def test_the_added_end_weighs_what_its_answer_does(tokenizer):
    encoder = Renderer(tokenizer).encoder
    ((_, weights),) = encoder.encode([Rendered("ab fox", ((2, 6),), close=True, weights=(0.25,))])
    assert weights[-1] == 0.25 and set(weights) == {0.0, 0.25}


@pytest.mark.parametrize("said", ["<think>" * 200_000, "<think>x</think> " * 100_000, "</think>" * 200_000])
def test_d7_tags_without_number_cost_time_that_grows_as_the_text(said):
    tokenizer = tokenizer_of(CHATML)
    began = time.process_time()
    row = shaped({"messages": turns("one", said + "a dog")}, 0)
    rendered = Renderer(tokenizer, train_reasoning=False).render(row)
    assert rendered.text[rendered.spans[-1][0] : rendered.spans[-1][1]].endswith("a dog" + END)
    assert time.process_time() - began < 10


def test_d7_a_weight_on_each_of_many_turns():
    began = time.process_time()
    said = [m | {"weight": 0.5} for m in turns(*["a", "b"] * 100)]
    rendered = Renderer(tokenizer_of(CHATML)).render(shaped({"messages": said}, 0))
    assert len(rendered.spans) == 200 and set(rendered.weights) == {0.5}
    assert time.process_time() - began < 30


def test_d8_odd_letters_in_what_is_trained_by_role_keep_their_bytes():
    said = "a\x00b <|im_end|> \ue000\U0001f600 \u202e"
    row = {"messages": [ASKED | {"content": said}, turns("", "fox")[1]]}
    runs = trained(row, train_on=("user",))
    assert runs == [(said + END, 1.0)]

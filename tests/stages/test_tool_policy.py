"""A policy that really calls tools: a tiny model that was taught to, its own engine, the stage's own path."""

import json

import pytest
import torch

from llmkit.core.errors import RecipeError
from llmkit.core.run import Grants
from llmkit.data.render import Renderer
from llmkit.rl.conversation import Speech
from llmkit.rl.environment_node import Calculator, Facts, ToolUse
from llmkit.rl.scoring import Scores
from tests.conftest import make_model, make_tokenizer
from tests.rl.test_tool_environment import ASKED, END, TEMPLATE, call, talked
from tests.stages.drawn import go, lines_of, policy, steps_of

SAID = {
    "42": [call(expression="6 * 7"), "it is 42"],
    "seven": [call("lookup", key="days"), "it is seven"],
}
"""What the model knows to do, by what it then knows."""


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The folder of a model that calls the calculator or the lookup, each about as often, and tells what that said."""
    place = tmp_path_factory.mktemp("taught")
    (place / "facts.jsonl").write_text('{"key": "days", "value": "seven"}\n')
    box = ToolUse(tools=tools(place)).open()
    shown = json.dumps([{"type": "function", "function": tool.function} for tool in box().tools.values()])
    tokenizer = make_tokenizer(TEMPLATE, [shown, *(one for said in SAID.values() for one in said)], 700)
    speech = Speech.of(Renderer(tokenizer), [END])
    model = make_model(3, vocab_size=704)
    talks = [talked(speech, list(said), box=box())[0][0] for said in SAID.values()]
    assert all(talk.calls == 1 and talk.finish_reason == "stop" for talk in talks)
    learn(model, talks)
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    return place


def tools(place):
    return Calculator(), Facts(path=str(place / "facts.jsonl"))


def learn(model, talks):
    """Until what it says is one of these conversations, almost always."""
    rows = [[*talk.prompt_ids, *talk.ids] for talk in talks]
    own = [[False] * len(talk.prompt_ids) + talk.said for talk in talks]
    most = max(map(len, rows))
    ids = torch.tensor([row + [0] * (most - len(row)) for row in rows])
    mine = torch.tensor([row + [False] * (most - len(row)) for row in own])[:, 1:]
    optim = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(120):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[mine]), ids[:, 1:][mine])
        optim.zero_grad()
        loss.backward()
        optim.step()


@pytest.fixture(scope="module")
def recipe(taught):
    """Makes a stage over it, whose reward is paid for what a tool said."""
    rows = taught / "asked.jsonl"
    rows.write_text(f"{json.dumps({'prompt': ASKED[0]['content']})}\n" * 6)

    def made(name, environment=None):
        environment = environment or {"kind": "tools", "turns": 3, "tools": tools(taught)}
        more = {
            "data": {"train": [{"kind": "jsonl", "path": str(rows)}], "max_length": 500},
            "rollout": {"group": 4, "max_tokens": 40, "temperature": 0.5, "reuse": 2, "environment": environment},
            "loss": {"kind": "dapo", "beta": 0.1},
            "optim": {"kind": "adamw", "lr": 1e-3},
            "checkpoint": {"every": 1},
        }
        return policy(taught / "model", rows, taught / name, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmkit.stages.answering.score", paid)
        yield made


def paid(rewards, samples, bench):
    """1 where the calculator was heard to say 42: in this process, where a function of one's own has another."""
    found = [float(any((one["role"], one["content"]) == ("tool", "42") for one in sample.said)) for sample in samples]
    return Scores(tuple(found), {"heard": tuple(found)}, {})


@pytest.fixture(scope="module")
def whole(recipe):
    """The folder of a run of three steps over two rollouts, and the batches that it learned from."""
    from llmkit.rl.objective import OverRollouts

    batches, plain = [], OverRollouts.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OverRollouts, "__call__", lambda *a: batches.append(a[2]) or plain(*a))
        return go(recipe("whole")), batches


def test_tools_are_called_and_their_answers_are_heard_and_rewarded(whole, taught):
    rolled, words = lines_of(whole[0].folder, "rollouts.jsonl"), make_words(taught)
    told = [turn["content"] for one in rolled for turn in one["turns"] if turn["role"] == "tool"]
    assert {"42", "seven"} <= set(told) and len(told) >= 20  # of 24 conversations
    for one in rolled:
        spans = spans_of(one["ids"], one["own"])
        said, heard = ([words(ids) for mine, ids in spans if mine == who] for who in (True, False))
        tool = [turn["content"] for turn in one["turns"] if turn["role"] == "tool"]
        assert (
            heard == [f"\n<|im_start|>tool\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in tool][: len(heard)]
        )
        assert spans[0][0] and spans[-1][0] and len(said) == len(heard) + 1
        assert len(said) == sum(turn["role"] == "assistant" for turn in one["turns"])
        assert said[-1] == one["text"] + "<|im_end|>" or one["finish"] != "stop" or "<tool_call>" in said[-1]
        assert one["reward"] == ("42" in tool)  # which nobody sees but in the turns
    assert 0 < sum(one["reward"] for one in rolled) < len(rolled)
    page = (whole[0].folder / "rollouts.html").read_text()
    assert "→ calculate(" in page


def test_only_the_models_own_words_are_trained(whole):
    folder, batches = whole[0].folder, whole[1]
    rolled, steps = lines_of(folder, "rollouts.jsonl"), steps_of(folder)
    first, *_ = held = [[one for one in rolled if one["rollout"] == number] for number in (0, 1)]
    for line, mine in zip(steps, (first, *held), strict=True):
        assert line["supervised_tokens"] == sum(sum(one["own"]) for one in mine)
        assert line["length"] == pytest.approx(sum(len(one["ids"]) for one in mine) / 12)
        assert line["calls"] == pytest.approx(sum(turn["role"] == "tool" for one in mine for turn in one["turns"]) / 12)
    assert [line["ratio"] == 1.0 for line in steps] == [True, False, True]
    labels = torch.cat([batch.labels[batch.weights != 0] for batch in batches]).tolist()
    own = [
        id for mine in (first, *held) for one in mine for id, said in zip(one["ids"], one["own"], strict=True) if said
    ]
    assert sorted(labels) == sorted(own) and len(own) < sum(len(one["ids"]) for mine in (first, *held) for one in mine)


def test_a_run_that_called_tools_goes_on_to_the_bit(whole, recipe, monkeypatch):
    """From the midst of a rollout, whose conversations are read again."""
    from llmkit.stages import build_training

    show = build_training.show

    def interrupted(job, line):
        show(job, line)
        if line["event"] == "train" and line["step"] == 2:
            raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the machine"):
        patch.setattr(build_training, "show", interrupted)
        go(recipe("part"))
    again = go(recipe("part"))
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert lines_of(again.folder, name) == lines_of(whole[0].folder, name)
    assert (again.model() / "adapter_model.safetensors").read_bytes() == (
        whole[0].model() / "adapter_model.safetensors"
    ).read_bytes()


BOX = """from llmkit.rl.environment import Toolbox
from llmkit.rl.environment_node import Calculator, Facts


class Box(Toolbox):
    def __init__(self):
        super().__init__([Calculator().open(), Facts(path={path!r}).open()])
"""


def test_an_environment_of_ones_own_is_the_same_run(whole, recipe, taught, monkeypatch):
    """And going on with another file is refused."""
    (taught / "allowed-python").mkdir(exist_ok=True)
    monkeypatch.setattr("llmkit.core.usercode.cache", lambda: taught)
    own = taught / "box.py"
    own.write_text(BOX.format(path=str(taught / "facts.jsonl")))
    node = recipe("own", {"kind": "python", "ref": f"{own}:Box", "turns": 3})
    made = go(node, grants=Grants(python=True))
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert lines_of(made.folder, name) == lines_of(whole[0].folder, name)
    own.write_text(own.read_text() + "\n")
    (made.folder / "status.json").write_text('{"state": "stopped"}')
    with pytest.raises(RecipeError, match="--accept rollout.environment.ref.sha256"):
        go(node, grants=Grants(python=True))


def make_words(taught):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(taught / "model")
    return lambda ids: tokenizer.decode(ids)


def spans_of(ids, own):
    """Runs of tokens that one side said."""
    made = []
    for id, mine in zip(ids, own, strict=True):
        if not made or made[-1][0] != mine:
            made.append((mine, []))
        made[-1][1].append(id)
    return made

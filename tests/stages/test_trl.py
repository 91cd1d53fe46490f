"""Trainers of TRL as a stage: its model, its rows, its checkpoints, its metrics and its result are llmkit's."""

import importlib.util
import json
import re
import shutil
import signal
from pathlib import Path

import pytest

from llmkit import run
from llmkit.adapters.node import Lora, NoAdapter
from llmkit.core.console import Console
from llmkit.core.errors import DataError, ModelError, RecipeError, Stopped
from llmkit.core.metrics import Lines
from llmkit.data.node import Jsonl
from llmkit.rl.bench import Bench
from llmkit.rl.rewards_node import Exact, Model, Pattern
from llmkit.rl.sample import Sample
from llmkit.rl.scoring import score
from llmkit.stages.trl import ELSEWHERE, Other, TrainerRows, Trl
from llmkit.stages.trl_parts import trainer as named
from tests.conftest import make_model, make_tokenizer

QUIET = Console(quiet=True)
PAIRS = [
    {"question": "hello", "chosen": " world one", "rejected": " fox"},
    {"question": "the quick", "chosen": " brown", "rejected": " dog two three"},
]
SHORT = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_steps": 2,
    "learning_rate": 1e-2,
    "activation_checkpointing": False,
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    place = tmp_path_factory.mktemp("trl")
    make_model(1).save_pretrained(place / "model")
    make_tokenizer().save_pretrained(place / "model")
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS * 4))
    asked = [{"prompt": f"hello {word}"} for word in ("world", "fox", "dog", "one")]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return place


def dpo(work, out, **more):
    rows = TrainerRows(train=(Jsonl(path=str(work / "pairs.jsonl"), columns={"prompt": "question"}),))
    arguments = SHORT | more.pop("arguments", {})
    more = {"adapter": Lora(rank=4), "data": rows} | more
    return Trl(trainer="DPOTrainer", model=str(work / "model"), arguments=arguments, out=str(out), **more)


def lines(folder, event="train"):
    return [line for line in Lines(folder / "metrics.jsonl").read() if line["event"] == event]


def weights(folder, name="adapter_model"):
    from safetensors.torch import load_file

    return load_file(folder / "model" / f"{name}.safetensors")


@pytest.fixture(scope="module")
def done(work):
    return run(dpo(work, work / "whole"), console=QUIET)


def test_it_leaves_what_any_stage_leaves(done):
    assert done.manifest["step"] == 4 and done.manifest["trainer"] == "DPOTrainer"
    done.verify()
    seen = lines(done.folder)
    assert [line["step"] for line in seen] == [1, 2, 3, 4]
    assert seen[0]["loss"] == pytest.approx(0.6931, abs=1e-3) and seen[-1]["loss"] < 0.65 and seen[0]["lr"] == 1e-2
    assert "rewards/margins" in seen[0] and (done.folder / "report.html").is_file()
    assert sorted(one.name for one in (done.folder / "checkpoints").glob("c*")) == ["checkpoint-2", "checkpoint-4"]


def test_the_result_loads_in_peft_alone_without_the_trainers_reference(done, work):
    from peft import PeftModel

    model = PeftModel.from_pretrained(make_model(1), done.model())
    assert list(model.peft_config) == ["default"] and not (done.model() / "ref").exists()
    assert all(value.abs().sum() > 0 for name, value in weights(done.folder).items() if "lora_B" in name)


class Soon:
    """Somebody who asks a run to stop when a step is logged."""

    def __init__(self, monkeypatch, step):
        from llmkit.stages.trl_run import Listener

        plain = Listener.on_log

        def on_log(self, args, state, control, **more):
            plain(self, args, state, control, **more)
            if state.global_step == step:
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(Listener, "on_log", on_log)


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(done, work, tmp_path):
    node = dpo(work, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        Soon(patch, 2)
        with pytest.raises(Stopped):
            run(node, console=QUIET)
    said = json.loads((tmp_path / "run" / "status.json").read_text())
    assert said["state"] == "stopped" and said["exit_code"] == 75
    again = run(node, console=QUIET)
    for one, other in zip(lines(again.folder), lines(done.folder), strict=True):
        for name in ("event", "num_tokens"):  # which a trainer counts anew when it goes on
            one.pop(name), other.pop(name)
        assert one == pytest.approx(other, rel=1e-6)
    mine, theirs = weights(again.folder), weights(done.folder)
    assert all(mine[name].equal(theirs[name]) for name in theirs)


def test_a_run_goes_on_with_what_it_began_with(work, tmp_path):
    """Its rows among it, and what it is not told by the recipe."""
    rows = tmp_path / "pairs.jsonl"
    rows.write_text((work / "pairs.jsonl").read_text())
    data = TrainerRows(train=(Jsonl(path=str(rows), columns={"prompt": "question"}),))
    node = dpo(work, tmp_path / "run", data=data)
    with pytest.MonkeyPatch.context() as patch:
        Soon(patch, 2)
        with pytest.raises(Stopped):
            run(node, console=QUIET)
    rows.write_text(rows.read_text().replace("fox", "dog"))
    with pytest.raises(RecipeError, match=f"files.{rows}: was .* when the run began .*--accept"):
        run(node, console=QUIET)


def test_a_trainer_that_would_read_its_own_reference_is_refused(work, tmp_path):
    """By the model's path: without its RoPE, its template and its new tokens."""
    for verb in (lambda node: node.check("cpu"), lambda node: run(node, console=QUIET)):
        with pytest.raises(RecipeError, match="beta: .*reads its reference by the model's path"):
            verb(grpo(work, tmp_path / "run", adapter=NoAdapter(), arguments={"beta": 0.1}))
    with pytest.raises(RecipeError, match="teacher_model_kind: .*reads its teacher by the model's path"):
        rows, arguments, _ = ALL["experimental.sdft.SDFTTrainer"]
        more = {"arguments": arguments | {"teacher_model_kind": "ema"}, "adapter": NoAdapter()}
        trainer(work, tmp_path / "other", "experimental.sdft.SDFTTrainer", rows, **more).check("cpu")


def test_every_weight_can_be_trained_beside_the_model_as_it_was(work, tmp_path):
    made = run(dpo(work, tmp_path / "run", adapter=NoAdapter(), arguments={"max_steps": 2}), console=QUIET)
    assert lines(made.folder)[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    plain = make_model(1).state_dict()["model.norm.weight"]
    assert not weights(made.folder, "model")["model.norm.weight"].equal(plain)


def test_a_reference_of_ones_own_is_handed_over(work, tmp_path):
    make_model(2).save_pretrained(work / "other")
    make_tokenizer().save_pretrained(work / "other")
    others = (Other(parameter="ref_model", model=str(work / "other")),)
    made = run(dpo(work, tmp_path / "run", others=others, arguments={"max_steps": 1}), console=QUIET)
    assert abs(lines(made.folder)[0]["loss"] - 0.6931) > 1e-4


def test_validation_rows_are_measured(work, tmp_path):
    rows = Jsonl(path=str(work / "pairs.jsonl"), columns={"prompt": "question"})
    arguments = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    made = run(
        dpo(work, tmp_path / "r", data=TrainerRows(train=(rows,), valid=(rows,)), arguments=arguments), console=QUIET
    )
    assert [line["step"] for line in lines(made.folder, "evaluate")] == [1, 2]
    assert "valid.rewards/accuracies" in lines(made.folder, "evaluate")[0]


def grpo(work, out, **more):
    arguments = {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 6, "max_steps": 2}
    arguments |= {"logging_steps": 1, "learning_rate": 1e-2, "activation_checkpointing": False}
    rows = TrainerRows(train=(Jsonl(path=str(work / "prompts.jsonl")),))
    more = {"reward": (Pattern(pattern="[aeiou]"),), "adapter": Lora(rank=4)} | more
    more |= {"arguments": arguments | more.get("arguments", {})}
    return Trl(trainer="GRPOTrainer", model=str(work / "model"), data=rows, out=str(out), **more)


def test_answers_are_written_by_the_engine_and_judged_by_our_rewards(work, tmp_path, monkeypatch):
    from llmkit.stages.trl_rollout import Rollouts

    plain, made = Rollouts.__call__, []
    monkeypatch.setattr(Rollouts, "__call__", lambda *given: made.append(plain(*given)) or made[-1])
    artifact = run(grpo(work, tmp_path / "run"), console=QUIET)
    assert len(made) == 2 and all(len(one["completion_ids"]) == 4 for one in made)
    assert len({tuple(ids) for ids in made[0]["completion_ids"]}) > 1  # drawn
    assert all(len(ids) <= 6 for one in made for ids in one["completion_ids"])
    assert any("reward" in name for name in lines(artifact.folder)[0])
    first = [one["completion_ids"] for one in made]
    made.clear()
    run(grpo(work, tmp_path / "again"), console=QUIET)
    assert [one["completion_ids"] for one in made] == first


def test_the_token_that_ended_an_answer_is_the_one_that_did(work, tmp_path, monkeypatch):
    from llmkit.stages.trl_rollout import Rollouts

    work = Path(shutil.copytree(work, tmp_path / "several"))
    config = json.loads((work / "model" / "generation_config.json").read_text())
    (work / "model" / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": list(range(2, 200))}))
    plain, made = Rollouts.__call__, []
    monkeypatch.setattr(Rollouts, "__call__", lambda *given: made.append(plain(*given)) or made[-1])
    run(grpo(work, tmp_path / "run"), console=QUIET)
    last = {ids[-1] for one in made for ids in one["completion_ids"] if len(ids) < 6}
    assert last - {2} and last <= set(range(2, 200))


def trainer(work, out, name, rows, **more):
    """A step of any trainer over these rows."""
    path = out.parent / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = {"max_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 1} | more.pop("arguments", {})
    data = TrainerRows(train=(Jsonl(path=str(path)),))
    options = {"adapter": Lora(rank=4), "data": data, "arguments": arguments} | more
    return Trl(trainer=name, model=str(work / "model"), out=str(out), **options)


@pytest.mark.parametrize("adapter", [Lora(rank=4), NoAdapter()], ids=["lora", "whole"])
def test_a_reward_trainer_trains_a_head_that_rewards_read(work, tmp_path, adapter):
    pairs = [{"prompt": "hello", "chosen": " world one", "rejected": " fox"}] * 8
    arguments = {"max_steps": 6, "learning_rate": 1e-2}
    made = run(
        trainer(work, tmp_path / "run", "RewardTrainer", pairs, adapter=adapter, arguments=arguments), console=QUIET
    )
    assert lines(made.folder)[-1]["loss"] < 0.3 < lines(made.folder)[0]["loss"]
    asked = [Sample("hello", pairs[0][side]) for side in ("chosen", "rejected")]
    with Bench() as bench:
        up, down = score([Model(path=str(made.folder))], asked, bench).total
    assert up > down + 1


PAIR = [{"prompt": "hello", "chosen": " world one", "rejected": " fox"}] * 8
PROMPTS = [{"prompt": f"hello {word}"} for word in ("world", "fox", "dog", "one")] * 2
CHAT = [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the lazy dog"}]}] * 8
TOLD = [{**row, "privileged_context": "say fox"} for row in PROMPTS]
BRIEF, GROUP = {"max_completion_length": 6}, {"max_completion_length": 6, "num_generations": 4}
TEACHER, REWARD = {"others": "teacher_model"}, {"reward": (Pattern(pattern="[aeiou]"),)}
ALL = {
    "SFTTrainer": ([{"text": "the quick brown fox"}] * 8, {}, {}),
    "KTOTrainer": ([{"prompt": "hello", "completion": f" world {i}", "label": i % 2 > 0} for i in range(8)], {}, {}),
    "RLOOTrainer": (PROMPTS, GROUP, REWARD),
    "DistillationTrainer": (PROMPTS, BRIEF, TEACHER),
    "experimental.cpo.CPOTrainer": (PAIR, {}, {}),
    "experimental.orpo.ORPOTrainer": (PAIR, {}, {}),
    "experimental.bema_for_ref_model.DPOTrainer": (PAIR, {}, {}),
    "experimental.tpo.TPOTrainer": ([{**row, "reference": " world"} for row in PAIR], {}, {}),
    "experimental.gkd.GKDTrainer": (CHAT, {"max_new_tokens": 6}, TEACHER),
    "experimental.gold.GOLDTrainer": (CHAT, BRIEF, TEACHER),
    "experimental.iw_opd.IWOPDTrainer": (CHAT, BRIEF, TEACHER),
    "experimental.gmpo.GMPOTrainer": (PROMPTS, GROUP, REWARD),
    "experimental.a2po.A2POTrainer": (PROMPTS, BRIEF, REWARD),
    "experimental.online_dpo.OnlineDPOTrainer": (PROMPTS, {"max_new_tokens": 6}, REWARD),
    "experimental.sdpo.SDPOTrainer": (TOLD, GROUP, REWARD),
    "experimental.sdft.SDFTTrainer": (TOLD, GROUP, {}),
}
FAST = ("DistillationTrainer", "experimental.gmpo.GMPOTrainer", "experimental.bema_for_ref_model.DPOTrainer")


@pytest.mark.parametrize("name", [pytest.param(one, marks=[] if one in FAST else pytest.mark.slow) for one in ALL])
def test_every_trainer_that_one_process_can_run_runs(work, tmp_path, name):
    rows, arguments, more = ALL[name]
    if "others" in more:
        more = {"others": (Other(parameter=more["others"], model=str(work / "model")),)}
    made = run(trainer(work, tmp_path / "run", name, rows, arguments=arguments, **more), console=QUIET)
    assert made.manifest["step"] == 1 and made.manifest["trainer"] == name
    assert "loss" in lines(made.folder)[0] and weights(made.folder)


def test_those_of_a_family_take_what_its_first_takes(work, tmp_path):
    """Some hand on what they are given; the engine writes for these too."""
    kind = named("experimental.gmpo.GMPOTrainer")
    assert kind.takes("rollout_func") and kind.takes("reward_funcs") and not kind.takes("ref_model")
    assert named("experimental.bema_for_ref_model.DPOTrainer").takes("ref_model")


def test_every_trainer_of_trl_is_run_or_refused_with_the_reason(work, tmp_path):
    root = Path(importlib.util.find_spec("trl").origin).parent
    files = [one for one in root.glob("**/*_trainer.py") if one.name != "base_trainer.py"]
    found = {name for one in files for name in re.findall(r"^class ([A-Z]\w*Trainer)\(", one.read_text(), re.M)}
    known = {one.rpartition(".")[2] for one in ALL} | {"DPOTrainer", "GRPOTrainer", "RewardTrainer"}
    assert found == known | set(ELSEWHERE)
    for name in ELSEWHERE:
        with pytest.raises(RecipeError, match="trainer: .*of its own"):
            trainer(work, tmp_path / "run", f"experimental.some.{name}", PROMPTS)


@pytest.mark.parametrize(
    ("more", "key", "word"),
    [
        ({"arguments": {"betta": 0.2}}, "arguments.betta", "beta"),
        ({"arguments": {"max_steps": 2.5}}, "arguments.max_steps", "2.5"),
        ({"arguments": {"loss_type": ("nonsense", "x"), "loss_weights": (1.0,)}}, "arguments", "loss"),
        ({"reward": (Pattern(pattern="a"),)}, "reward", "no rewards"),
        ({"others": (Other(parameter="judge", model="x"),)}, "others.0.parameter", "judge"),
    ],
)
def test_what_a_trainer_does_not_take_is_refused(work, tmp_path, more, key, word):
    with pytest.raises(RecipeError) as told:
        run(dpo(work, tmp_path / "run", **more), console=QUIET)
    assert told.value.problems[0].key == key and word in str(told.value)
    assert not (tmp_path / "run").exists()


def test_trainers_that_are_not_there_and_what_they_lack(work, tmp_path):
    for name, word in (("NoSuchTrainer", "DPOTrainer"), ("nowhere.XTrainer", "no trl.nowhere")):
        node = dpo(work, tmp_path / "run")
        with pytest.raises(RecipeError, match=word):
            run(Trl(trainer=name, model=node.model, data=node.data, out=node.out), console=QUIET)
    with pytest.raises(RecipeError, match="worth"):
        run(grpo(work, tmp_path / "run", reward=()), console=QUIET)
    with pytest.raises(RecipeError, match="engine"):
        run(grpo(work, tmp_path / "run", arguments={"generation_kwargs": {"top_k": 3}}), console=QUIET)


@pytest.mark.parametrize("name", ["output_dir", "report_to", "use_vllm", "seed", "bf16"])
def test_arguments_of_what_the_stage_does_itself_are_refused(work, tmp_path, name):
    with pytest.raises(RecipeError, match=f"arguments.{name}"):
        dpo(work, tmp_path / "run", arguments={name: "x"})


def test_rows_that_cannot_be_read_name_their_place(work, tmp_path):
    (work / "bad.jsonl").write_text('{"prompt": "a"\n')
    with pytest.raises(DataError, match=r"bad.jsonl:1"):
        run(dpo(work, tmp_path / "run", data=TrainerRows(train=(Jsonl(path=str(work / "bad.jsonl")),))), console=QUIET)


@pytest.mark.parametrize(
    ("reward", "error", "said"),
    [
        (Exact(column="answr"), DataError, r"prompts.jsonl:1: reward.0.column: its row has no column answr"),
        (Model(path="runs/none"), ModelError, r"reward.0.path: .*runs/none"),
    ],
)
def test_what_a_reward_lacks_is_told_before_a_model_is_read(work, tmp_path, monkeypatch, reward, error, said):
    monkeypatch.setattr("llmkit.stages.trl_run.build", lambda *given: pytest.fail("a model was read"))
    node = grpo(work, tmp_path / "run", reward=(reward,))
    for verb in (lambda: node.check("cpu"), lambda: run(node, console=QUIET)):
        with pytest.raises(error, match=said):
            verb()


def test_check_tells_the_trainer_and_its_rows(work, tmp_path):
    assert dpo(work, tmp_path / "run").check("cpu") == "DPOTrainer, data.train: 8 rows"

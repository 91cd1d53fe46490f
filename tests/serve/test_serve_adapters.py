"""Adapters over HTTP: an admin loads them, requests name them as models, and each ends on what it began with."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file

from tests.build.test_adapters_of import folder, opened
from tests.serve.conftest import Running

CONFIGS = {
    "lora": LoraConfig(r=4, target_modules=["o_proj", "down_proj"]),
    "other": LoraConfig(r=2, target_modules=["o_proj"]),
    "soft": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["o_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
PROMPT = list(range(60, 71))
ASKED = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "logprobs": 2}
KEYS = {"anna": "a" * 32, "ben": "b" * 32}
CHIEF = {"authorization": f"Bearer {'c' * 32}"}


@pytest.fixture(scope="module")
def root(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for name, config in CONFIGS.items():
        folder(tiny, root / name, config)
    return root


@pytest.fixture
def hosted(llm, root, tmp_path):
    (tmp_path / "keys").write_text("".join(f"{key} {tenant}\n" for tenant, key in KEYS.items()))
    (tmp_path / "admins").write_text("c" * 32)
    files = {"keys": tmp_path / "keys", "admin_keys": tmp_path / "admins"}
    running = Running(llm, admin=True, admin_port=1, adapter_root=root, most_adapters=2, **files)
    yield running
    running.stop()


def admin(server, verb, **fields):
    return httpx.post(f"{server.admin}/v1/{verb}_lora_adapter", json=fields, headers=CHIEF, timeout=30)


def load(server, name, path="", **more):
    said = admin(server, "load", lora_name=name, lora_path=path or name, **more)
    assert said.json() == {"status": "ok", "value": name}, said.text


def ask(server, model="tiny", tenant="anna", **more):
    head = {"authorization": f"Bearer {KEYS[tenant]}"}
    return httpx.post(server.url + "/v1/completions", json=ASKED | {"model": model} | more, headers=head, timeout=30)


def choice(server, model="tiny", **more):
    said = ask(server, model, **more)
    assert said.status_code == 200, said.text
    return said.json()["choices"][0]


def adapters(server):
    """Those of the engine, and the tensors that it holds."""
    return server.within.adapters, server.within.runner.forward.bank.held


def test_what_is_loaded_is_asked_for_by_name_alone_and_beside_others(hosted, llm, root):
    for name in ("lora", "soft"):
        load(hosted, name)
    head = {"authorization": f"Bearer {KEYS['ben']}"}
    listed = httpx.get(hosted.url + "/v1/models", headers=head).json()["data"]
    assert [(one["id"], one["parent"]) for one in listed] == [("tiny", None), ("lora", "tiny"), ("soft", "tiny")]
    names = ("tiny", "lora", "soft")
    alone = {name: choice(hosted, name) for name in names}
    for name in ("lora", "soft"):
        with torch.no_grad():
            likely = opened(root / name)[0].model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1).max(-1)
        told = alone[name]["logprobs"]
        assert told["tokens"][0] == llm.tokenizer.decode([int(likely.indices)])
        assert told["token_logprobs"][0] == pytest.approx(float(likely.values), abs=1e-4)
    assert len({one["logprobs"]["token_logprobs"][0] for one in alone.values()}) == 3  # the control: they do something
    with ThreadPoolExecutor(9) as pool:
        many = list(pool.map(lambda name: choice(hosted, name), names * 3))
    assert many == [alone[name] for name in names] * 3  # log-probabilities too: to the bit
    assert admin(hosted, "unload", lora_name="soft").json() == {"status": "ok", "value": "soft"}
    assert ask(hosted, "soft").status_code == 404 and choice(hosted, "lora") == alone["lora"]
    assert admin(hosted, "unload", lora_name="soft").json()["error"]["param"] == "lora_name"
    hosted.engine.settings["adapters"] = {"lora": str(root / "lora")}  # as if it had been named at the start
    assert [key.partition("@")[0] for key in adapters(hosted)[1]] == ["lora"]
    assert admin(hosted, "unload", lora_name="lora").status_code == 200
    assert hosted.engine.settings == {"loaded": {}, "adapters": {}}  # one that is started again has neither


def streamed(server, model, begun, told):
    asked = ASKED | {"model": model, "max_tokens": 150, "stream": True}
    head = {"authorization": f"Bearer {KEYS['anna']}"}
    with httpx.stream("POST", server.url + "/v1/completions", json=asked, headers=head, timeout=60) as said:
        for line in said.iter_lines():
            if line.startswith("data: {"):
                told.append(json.loads(line[6:])["choices"][0])
                begun.set()


@pytest.mark.parametrize("how", ["unloaded", "replaced"])
def test_e11_a_request_ends_on_the_version_that_it_began_with(how, hosted):
    load(hosted, "mine", "lora")
    whole = choice(hosted, "mine", max_tokens=150)["text"]
    begun, told = threading.Event(), []
    thread = threading.Thread(target=streamed, args=(hosted, "mine", begun, told))
    thread.start()
    assert begun.wait(30)
    rest = {"headers": CHIEF, "json": {}, "timeout": 30}
    assert httpx.post(hosted.admin + "/admin/pause", **rest).status_code == 200
    if how == "unloaded":
        assert admin(hosted, "unload", lora_name="mine").status_code == 200
        assert ask(hosted, "mine").status_code == 404 and list(adapters(hosted)[0].old)
    else:
        load(hosted, "mine", "other")
    assert hosted.within.live  # the control: it was in the midst of it
    assert httpx.post(hosted.admin + "/admin/resume", **rest).status_code == 200
    thread.join(60)
    assert "".join(one["text"] for one in told) == whole and told[-1]["finish_reason"] == "length"
    named, held = adapters(hosted)
    assert not named.old and len(held) == (0 if how == "unloaded" else 1)  # the old one went with who held it
    if how == "replaced":
        assert choice(hosted, "mine", max_tokens=150)["text"] != whole


def test_e11_a_load_that_fails_leaves_the_old_one_serving(hosted, root):
    load(hosted, "mine", "lora")
    before = choice(hosted, "mine")
    for path in ("dora", "ia3", "missing", "../x"):
        said = admin(hosted, "load", lora_name="mine", lora_path=path)
        assert said.status_code == 400 and str(root) not in said.text, said.text
    for given, key in (({"lora_name": "new"}, "lora_path"), ({"lora_path": "lora"}, "lora_name")):
        said = admin(hosted, "load", **given).json()["error"]
        assert said["message"] == f"{key}: is missing" and said["param"] == key
    assert "use_dora" in admin(hosted, "load", lora_name="new", lora_path="dora").text
    assert choice(hosted, "mine") == before and ask(hosted, "new").status_code == 404
    own_name = admin(hosted, "load", lora_name="tiny", lora_path="lora")
    assert own_name.json()["error"]["param"] == "lora_name"


def test_more_than_may_lie_ready_take_turns_and_more_in_use_at_once_are_told_to_come_back(hosted):
    for name in ("lora", "other", "soft"):
        load(hosted, name)
    assert len(adapters(hosted)[1]) == 2
    alone = {name: choice(hosted, name) for name in ("lora", "other", "soft")}
    assert alone == {name: choice(hosted, name) for name in ("lora", "other", "soft")}
    rest = {"headers": CHIEF, "json": {}, "timeout": 30}
    assert httpx.post(hosted.admin + "/admin/pause", **rest).status_code == 200
    with ThreadPoolExecutor(2) as pool:
        held = [pool.submit(choice, hosted, name) for name in ("lora", "other")]
        while len(hosted.within.live) < 2:
            pass
        said = ask(hosted, "soft")
        assert said.status_code == 429 and int(said.headers["retry-after"]) >= 1, said.text
        assert "2 adapters" in said.json()["error"]["message"]
        assert httpx.post(hosted.admin + "/admin/resume", **rest).status_code == 200
        assert [one.result() for one in held] == [alone["lora"], alone["other"]]
    assert choice(hosted, "soft") == alone["soft"]


def test_n5_what_is_loaded_for_one_tenant_is_there_for_no_other(hosted):
    load(hosted, "hers", "lora", tenant="anna")
    assert choice(hosted, "hers")["text"] == choice(hosted, "hers")["text"] != choice(hosted)["text"]
    others, none = (ask(hosted, name, "ben") for name in ("hers", "none"))
    assert others.status_code == none.status_code == 404
    assert others.text == none.text.replace("none", "hers", 1).replace("'none'", "'hers'")
    head = {"authorization": f"Bearer {KEYS['ben']}"}
    listed = httpx.get(hosted.url + "/v1/models", headers=head).json()["data"]
    assert [one["id"] for one in listed] == ["tiny"]
    load(hosted, "shared", "lora")
    assert choice(hosted, "shared")["text"] == choice(hosted, "shared", tenant="ben")["text"]


def test_n5_nobody_cancels_or_reads_what_another_asked_by_its_name(hosted):
    """Names of requests are the client's for the log; those of the engine's are by chance, and told to nobody else."""
    head = {"x-request-id": "same"}
    with ThreadPoolExecutor(2) as pool:

        def one(tenant):
            keyed = head | {"authorization": f"Bearer {KEYS[tenant]}", "idempotency-key": "same"}
            asked = ASKED | {"max_tokens": 60, "temperature": 1}
            return httpx.post(hosted.url + "/v1/completions", json=asked, headers=keyed, timeout=30).json()

        anna, ben = pool.map(one, ("anna", "ben"))
    assert anna["id"] != ben["id"] and anna["choices"][0]["text"] != ben["choices"][0]["text"]
    assert {said["usage"]["completion_tokens"] for said in (anna, ben)} == {60}
    his = {"authorization": f"Bearer {KEYS['ben']}"}
    for verb, path in (("get", f"/v1/responses/{anna['id']}"), ("post", f"/v1/responses/{anna['id']}/cancel")):
        assert getattr(httpx, verb)(hosted.url + path, headers=his).status_code == 404


def test_adapters_that_an_admin_loaded_come_back_with_an_engine_that_is_started_again(tiny, root, tmp_path):
    from dataclasses import replace

    from llmkit.models.node import ModelRef
    from llmkit.serve.served import open_served
    from llmkit.serve.start import Settings, told
    from tests.serve.conftest import SMALL

    settings = Settings(ModelRef(name=str(tiny)), adapter_root=root, engine=replace(SMALL, sequences=2))
    said = told(settings) | {"loaded": {"mine": "lora", "gone": "deleted-since"}}
    served = open_served(said)
    assert served.engine.adapters.names == ["mine"] == served.facts()["adapters"]


def test_weights_that_an_admin_gave_come_back_with_an_engine_that_is_started_again(tiny, tmp_path):
    from llmkit.core.errors import LlmkitError
    from llmkit.models.node import ModelRef
    from llmkit.serve.served import open_served
    from llmkit.serve.start import Settings, told
    from tests.serve.conftest import SMALL

    (tmp_path / "root").mkdir()
    shutil.copytree(tiny, tmp_path / "root" / "new")
    file = tmp_path / "root" / "new" / "model.safetensors"
    new = {name: tensor * 1.5 for name, tensor in load_file(file).items()}
    save_file(new, file, {"format": "pt"})
    settings = told(Settings(ModelRef(name=str(tiny)), adapter_root=tmp_path / "root", engine=SMALL))
    for more, version, by in (({}, 0, 1.0), ({"weights": ["new", 3]}, 3, 1.5)):
        served = open_served(settings | more)
        held = served.held.loaded.model.state_dict()
        assert all(torch.equal(tensor, held[name] if by > 1 else held[name] * 1.5) for name, tensor in new.items())
        assert served.engine.version == served.stats()["version"] == version
    with pytest.raises(LlmkitError, match="no folder"):  # never the old ones in their place
        open_served(settings | {"weights": ["gone", 3]})

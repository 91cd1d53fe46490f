"""Keys: who is let in, how much each may ask, and what of another's cannot be seen."""

import hashlib
import json

import httpx
import pytest

from llmkit.core.errors import RecipeError
from llmkit.serve.caller import Caller
from llmkit.serve.gate import Gate
from llmkit.serve.keys import Key, Limits, Meter, find, read_keys
from llmkit.serve.node import Bounds
from llmkit.serve.refusal import Refusal
from tests.serve.conftest import Running
from tests.serve.raw import answer, connect, head

ANNA, BEN = "a" * 32, "b" * 32


def test_a_file_of_keys_is_read_line_by_line(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# ours\n\n{ANNA} anna rpm=60 requests=2\nsha256:{hashlib.sha256(BEN.encode()).hexdigest()}\n")
    anna, ben = read_keys(path)
    assert anna == Key(hashlib.sha256(ANNA.encode()).hexdigest(), "anna", Limits(rpm=60, requests=2))
    assert find((anna, ben), f"Bearer {ANNA}") is anna and find((anna, ben), f"bearer {BEN}") is ben
    for header in ("", ANNA, f"Basic {ANNA}", f"Bearer {ANNA}x", f"Bearer sha256:{ben.digest}", f"Bearer {ben.digest}"):
        assert find((anna, ben), header) is None
    for wrong, line in (("short", 1), (f"{ANNA} anna rpm=x", 1), (f"{ANNA}\n{BEN} ben speed=3", 2)):
        path.write_text(wrong)
        with pytest.raises(RecipeError) as refused:
            read_keys(path)
        assert refused.value.problems[0].line == line and ANNA not in str(refused.value)
    for wrong in ("# none", f"{ANNA}\n{ANNA} twice"):
        path.write_text(wrong)
        with pytest.raises(RecipeError):
            read_keys(path)


def test_a_minute_s_worth_is_used_up_and_comes_back():
    key, meter = Key("d", "anna", Limits(rpm=2, tpm=100)), Meter()
    meter.take(key, {"rpm": 1}, 0.0)
    meter.take(key, {"rpm": 1, "tpm": 60}, 0.0)
    with pytest.raises(Refusal) as refused:
        meter.take(key, {"rpm": 1}, 0.0)
    assert (refused.value.status, refused.value.wait) == (429, 30.0)
    meter.take(key, {"rpm": 1}, 30.0)
    with pytest.raises(Refusal):
        meter.take(key, {"rpm": 0, "tpm": 100}, 30.0)
    meter.take(Key("e", "ben"), {"rpm": 10**6}, 0.0)


@pytest.fixture(scope="module")
def guarded(llm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    (folder / "keys").write_text(f"{ANNA} anna\n{BEN} ben rpm=1000 requests=1\n")
    (folder / "admins").write_text("c" * 32)
    running = Running(llm, admin=True, keys=folder / "keys", admin_keys=folder / "admins", admin_port=1)
    running.service.adapters["hers"] = "anna"
    yield running
    running.stop()


ASKED = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


PATHS = (
    *("/metrics", "/v1/models", "/v1/models/tiny", "/nothing", "/v1/responses/resp_1"),
    *("//health", "/health/", "/%68ealth", "/health/../metrics", "/x/health", "http://x/metrics"),
)


def test_every_route_but_health_asks_for_a_key(guarded):
    for path in ("/health", "/health?x=/metrics", *PATHS):
        with connect(guarded) as own:
            own.sendall(head(path, "GET"))
            status, said = answer(own)
        assert status == (200 if path.startswith("/health?") or path == "/health" else 401), path
    assert json.loads(said)["error"]["code"] == "invalid_api_key"
    with httpx.Client(base_url=guarded.url) as client:
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize"):
            assert client.post(path, json=ASKED).status_code == 401
        good = client.post("/v1/chat/completions", json=ASKED, headers={"authorization": f"Bearer {ANNA}"})
        assert good.status_code == 200 and ANNA not in good.text


def test_another_tenant_s_adapter_is_not_there(guarded):
    with httpx.Client(base_url=guarded.url) as client:
        hers, his = ({"authorization": f"Bearer {key}"} for key in (ANNA, BEN))
        listed = [[one["id"] for one in client.get("/v1/models", headers=who).json()["data"]] for who in (hers, his)]
        assert listed == [["tiny", "hers"], ["tiny"]]
        assert client.get("/v1/models/hers", headers=hers).status_code == 200
        for said in (
            client.get("/v1/models/hers", headers=his),
            client.post("/v1/chat/completions", json={**ASKED, "model": "hers"}, headers=his),
            client.get("/v1/responses/resp_hers", headers=his),
            client.post("/v1/responses", json={"input": "a", "previous_response_id": "resp_hers"}, headers=his),
        ):
            assert said.status_code == 404, said.text
        other = client.get("/v1/models/nobody", headers=his).json()["error"]
        assert client.get("/v1/models/hers", headers=his).json()["error"] == {
            **other,
            "message": other["message"].replace("nobody", "hers"),
        }


def test_a_key_s_own_limit_is_its_own(guarded):
    with httpx.Client(base_url=guarded.url) as client:
        two = {**ASKED, "n": 2}
        his = client.post("/v1/chat/completions", json=two, headers={"authorization": f"Bearer {BEN}"})
        assert his.status_code == 400 and "1 are taken at once" in his.json()["error"]["message"]
        assert (
            client.post("/v1/chat/completions", json=two, headers={"authorization": f"Bearer {ANNA}"}).status_code
            == 200
        )


def test_keys_of_one_tenant_have_limits_of_their_own():
    one, two = (Caller("anna", key=Key(digest, "anna", Limits(requests=2))) for digest in "ef")
    gate = Gate(Bounds(requests=10))
    with gate.place(one, 2, 5):
        with pytest.raises(Refusal) as refused:
            gate.check(one)
        assert refused.value.status == 429
        gate.check(two)  # the control: what one asks takes no room of the other's
    gate.check(one)


def test_tokens_of_a_minute_are_those_of_embeddings_too_and_not_of_what_is_refused(llm, tmp_path):
    (tmp_path / "keys").write_text(f"{ANNA} anna tpm=40 requests=1\n")
    server = Running(llm, keys=tmp_path / "keys")
    key = server.door.keys[0]
    try:
        with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {ANNA}"}, timeout=30) as client:
            for _ in range(3):
                many = client.post("/v1/embeddings", json={"input": [[5] * 20, [6] * 20]})
                assert many.status_code == 400 and "at once" in many.text  # of answers: the room was refused
            assert not server.service.meter.left.get((key.digest, "tpm"))
            asked = [client.post("/v1/embeddings", json={"input": [5] * 30}) for _ in range(2)]
            assert [said.status_code for said in asked] == [200, 429]
            assert asked[1].json()["error"]["code"] == "rate_limit_exceeded"
    finally:
        server.stop()


def test_keys_are_read_again_and_a_broken_file_changes_nothing(guarded, tmp_path):
    path = guarded.door.path
    before, carl = path.read_text(), "d" * 32
    with httpx.Client(base_url=guarded.url) as client:
        path.write_text(before + f"{carl} carl\n")
        guarded.door.read_again()
        assert client.get("/v1/models", headers={"authorization": f"Bearer {carl}"}).status_code == 200
        assert guarded.service.gate.tenants() == 3  # none of whom takes the room of all
        path.write_text("x")
        with pytest.raises(RecipeError):
            guarded.door.read_again()
        assert client.get("/v1/models", headers={"authorization": f"Bearer {carl}"}).status_code == 200
        path.write_text(before)
        guarded.door.read_again()
        assert client.get("/v1/models", headers={"authorization": f"Bearer {carl}"}).status_code == 401
        assert guarded.service.gate.tenants() == 2


ADMIN = (
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/admin/pause",
    "/admin/reset_prefix_cache",
    "/admin/weights",
)


@pytest.mark.parametrize("path", ADMIN)
def test_admin_routes_are_on_their_own_listener_behind_their_own_key(guarded, path):
    with httpx.Client() as client:
        hers = {"authorization": f"Bearer {ANNA}"}
        assert client.post(guarded.url + path, json={}, headers=hers).status_code == 404
        assert client.post(guarded.admin + path, json={}, headers=hers).status_code == 401
        assert client.post(guarded.admin + "/v1/completions", json={}, headers=hers).status_code == 401


def test_an_admin_pauses_resumes_and_empties_the_cache(guarded):
    chief = {"authorization": f"Bearer {'c' * 32}"}
    with httpx.Client(base_url=guarded.admin, headers=chief, timeout=30) as admin:
        assert admin.post("/admin/pause", json={}).json() == {"status": "ok", "value": True}
        asked = json.dumps(ASKED).encode()
        with httpx.Client(base_url=guarded.url, timeout=0.5) as client, pytest.raises(httpx.ReadTimeout):
            head = {"authorization": f"Bearer {ANNA}", "content-type": "application/json"}
            client.post("/v1/chat/completions", content=asked, headers=head)
        assert admin.post("/admin/resume", json={}).status_code == 200
        assert admin.post("/admin/reset_prefix_cache", json={}).json()["value"] is True
        for path in ("../x", "/etc", "http://x/y", "a"):
            said = admin.post("/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": path})
            assert said.status_code == 400 and said.json()["error"]["param"] == "lora_path", said.text
        for name in ("none", ""):  # the empty name is what requests have that name none
            said = admin.post("/v1/unload_lora_adapter", json={"lora_name": name})
            assert said.status_code == 400 and not guarded.engine.restarts, said.text


def test_an_admin_puts_other_weights_in_place_and_a_bad_folder_changes_nothing(llm, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    from tests.conftest import make_model, make_tokenizer

    for seed in (0, 1):
        make_model(seed, tie_word_embeddings=False).save_pretrained(tmp_path / f"roots/{seed}")
    bad = load_file(tmp_path / "roots/1/model.safetensors")
    bad["model.norm.weight"] = torch.full_like(bad["model.norm.weight"], float("nan"))
    (tmp_path / "roots/bad").mkdir()
    save_file(bad, tmp_path / "roots/bad/model.safetensors", {"format": "pt"})
    (tmp_path / "admins").write_text("c" * 32)
    folder = tmp_path / "tiny"
    make_model(tie_word_embeddings=False).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    own = type(llm)(str(folder))  # its weights change
    server = Running(own, admin=True, adapter_root=tmp_path / "roots", admin_keys=tmp_path / "admins", admin_port=1)
    ids = make_tokenizer().encode("hello world")

    def said(at):
        asked = {"prompt": ids, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "logprobs": 0}
        made = httpx.post(server.url + "/v1/completions", json=asked, timeout=30).json()["choices"][0]
        model = make_model(at, tie_word_embeddings=False).eval()
        greedy = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        return made["text"] == make_tokenizer().decode(greedy[0, len(ids) :], skip_special_tokens=True)

    def put(path):
        head = {"authorization": f"Bearer {'c' * 32}"}
        return httpx.post(server.admin + "/admin/weights", json={"path": path}, headers=head, timeout=30)

    try:
        assert said(0) and not said(1)
        assert put("bad").status_code == 400 and put("none").status_code == 400 and said(0)
        assert put("1").json() == {"status": "ok", "value": 1}
        assert said(1) and server.engine.stats["version"] == 1
        chat = httpx.post(server.url + "/v1/chat/completions", json=ASKED, timeout=30).json()
        assert chat["system_fingerprint"] == server.service.fingerprint(1) != server.service.fingerprint(0)
        assert server.engine.settings["weights"] == ("1", 1)  # for an engine that is started again
    finally:
        server.stop()

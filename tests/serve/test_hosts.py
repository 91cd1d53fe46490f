"""A server without keys answers to this machine's own names: no page of the web reaches it by one that leads here."""

import json

import httpx
import pytest

from llmkit.core.errors import RecipeError
from llmkit.models.node import ModelRef
from llmkit.serve.hosts import Hosts
from llmkit.serve.refusal import Refusal
from llmkit.serve.start import Settings, check
from tests.serve.conftest import Running
from tests.serve.raw import answer, connect

OWN = (
    "localhost",
    "LocalHost:8000",
    "127.0.0.1",
    "127.0.0.1:1",
    "127.1.2.3",
    "[::1]",
    "[::1]:8000",
    "Proxy.example:443",
)
OTHERS = (
    *(
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "evil.example:localhost",
    ),
    *("", ":8000", "192.0.2.1", "[2001:db8::1]:8000", "127.0.0.1:8000:9", "user@localhost", "localhost@evil.example"),
    *("0x7f000001", "2130706433", "localhost/", "\xff", "[::1", "::1:80", "0.0.0.0"),
)


def refused(method, **headers):
    try:
        Hosts(["proxy.example"]).check(
            method, [(key.encode(), value.encode("latin-1")) for key, value in headers.items()]
        )
    except Refusal as cause:
        return cause.code
    return None


@pytest.mark.parametrize("name", OWN)
def test_a_name_of_this_machine_is_answered_to_at_any_port(name):
    for method in ("GET", "POST"):
        assert refused(method, host=name) is None
        assert refused(method, host=name, origin=f"http://{name}") is None


@pytest.mark.parametrize("name", ["", "proxy.example:443", "https://proxy.example", "[2001:db8::1]", "a b"])
def test_a_name_under_which_nothing_would_come_is_told_at_the_start(name):
    with pytest.raises(RecipeError, match="is no name of a host; fix: give a name or an address alone"):
        check(Settings(ModelRef(name="none"), hosts=("proxy.example", name)))


def test_an_address_is_given_without_brackets():
    hosts = Hosts(["2001:DB8::1"])
    hosts.check("POST", [(b"host", b"[2001:db8::1]:80"), (b"origin", b"http://[2001:db8::1]:80")])
    with pytest.raises(Refusal):
        hosts.check("POST", [(b"host", b"[2001:db8::2]:80")])


@pytest.mark.parametrize("name", OTHERS)
def test_another_name_is_refused(name):
    assert refused("GET", host=name) == refused("POST", host=name) == "host_not_allowed"


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "http://evil.example",
        "https://localhost.evil.example",
        "http://localhost@evil.example",
        "http://[",
        "x",
    ],
)
def test_a_page_of_another_site_may_read_and_not_write(origin):
    assert refused("POST", host="localhost", origin=origin) == "origin_not_allowed"
    assert refused("DELETE", host="localhost", origin=origin) == "origin_not_allowed"
    assert refused("GET", host="localhost", origin=origin) is None  # its browser shows it nothing
    assert refused("POST", host="localhost", origin="app://proxy.example") is None


def test_of_several_hosts_each_is_looked_at():
    with pytest.raises(Refusal):
        Hosts().check("GET", [(b"host", b"evil.example"), (b"host", b"localhost")])
    with pytest.raises(Refusal):
        Hosts().check("GET", [(b"host", b"localhost"), (b"host", b"evil.example")])


ASKED = {"prompt": "a", "max_tokens": 1}


def test_a_server_without_keys_says_why_and_how(server):
    with httpx.Client(base_url=server.url) as client:
        assert client.post("/v1/completions", json=ASKED).status_code == 200
        page = client.post("/v1/completions", json=ASKED, headers={"origin": server.url})
        assert page.status_code == 200  # the playground's own
        for path in ("/", "/v1/models", "/metrics", "/openapi.json", "/nothing"):
            assert client.get(path, headers={"host": "evil.example"}).status_code == 403
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 200
        said = client.post("/v1/completions", json=ASKED, headers={"host": "evil.example:8000"})
        other = client.post("/v1/completions", json=ASKED, headers={"origin": "http://evil.example"})
    assert (said.status_code, other.status_code) == (403, 403)
    told = said.json()["error"]
    assert told["type"] == "permission_error" and told["code"] == "host_not_allowed" and told["param"] is None
    assert (
        "'evil.example:8000'" in told["message"] and "--allow-host" in told["message"] and "\n" not in told["message"]
    )
    assert other.json()["error"]["code"] == "origin_not_allowed"


def test_a_target_that_names_this_machine_does_not_help(server):
    with connect(server) as own:
        own.sendall(b"GET http://localhost/v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n")
        status, said = answer(own)
    assert status == 403 and json.loads(said)["error"]["code"] == "host_not_allowed"


def test_a_name_that_was_given_is_answered_to_and_with_keys_any_is(llm, tmp_path):
    (tmp_path / "keys").write_text("k" * 32)
    evil = {"host": "evil.example", "origin": "http://evil.example"}
    for how in ({"hosts": ("evil.example",)}, {"keys": tmp_path / "keys"}):
        running = Running(llm, **how)
        try:
            with httpx.Client(base_url=running.url, headers={"authorization": "Bearer " + "k" * 32}) as client:
                assert client.post("/v1/completions", json=ASKED, headers=evil).status_code == 200
        finally:
            running.stop()

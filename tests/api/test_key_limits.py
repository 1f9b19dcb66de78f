"""Keys from a file: whose they are, what each may use, and what it has used."""

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from api.checks import refused
from api.conftest import serve
from pagewire.config import FrontendConfig
from pagewire.frontend import service
from pagewire.frontend.api_keys import ApiKey, KeysFile, read_keys
from pagewire.frontend.key_limits import KeyLimits
from pagewire.requests.counters import Counters
from pagewire.requests.errors import RequestError


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def key(name: str, **limits: int) -> ApiKey:
    return ApiKey(name, digest(name), **limits)


def toml(*keys: dict[str, Any]) -> str:
    lines: list[str] = []
    for fields in keys:
        lines.append("[[key]]")
        lines += [
            f"{name} = {value if isinstance(value, int) else repr(value)}"
            for name, value in fields.items()
        ]
    return "\n".join(lines)


ALICE = {"name": "alice", "sha256": digest("a-key"), "requests_per_minute": 3, "tokens_per_minute": 100}  # fmt: skip
BOB = {"name": "bob", "sha256": digest("b-key").upper(), "parallel": 1, "priority": 7}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "keys.toml"
    file.write_text(toml(ALICE, BOB))
    return file


# --- the file


def test_a_file_of_keys(path: Path):
    alice, bob = read_keys(str(path))
    assert (alice.name, alice.requests_per_minute, alice.parallel) == ("alice", 3, 0)
    assert (bob.tenant, bob.priority) == (digest("b-key"), 7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[key", "keys.toml"),
        (toml({"name": "a b", "sha256": digest("x")}), "name"),
        (toml({"name": "a", "sha256": "x" * 64}), "sha256"),
        (toml({"name": "a"}), "sha256"),
        (toml({**ALICE, "requests": 5}), "requests"),
        (toml({**ALICE, "parallel": -1}), "parallel"),
        (toml(ALICE, {**BOB, "name": "alice"}), "2 keys have the name 'alice'"),
        (toml(ALICE, {**BOB, "sha256": ALICE["sha256"]}), "2 keys have the sha256"),
    ],
)
def test_a_file_that_is_wrong_says_where(path: Path, text: str, words: str):
    path.write_text(text)
    with pytest.raises(ValueError, match="--api-keys-file") as error:
        read_keys(str(path))
    assert words in str(error.value) and "\n" not in str(error.value).strip()


def test_a_file_that_is_none(tmp_path: Path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        KeysFile(str(tmp_path / "none"))


def test_a_changed_file_is_read_again_and_a_broken_one_is_not(path: Path):
    file = KeysFile(str(path))
    assert not file.changed()
    write(path, toml(BOB))
    assert file.changed() and [key.name for key in file.keys] == ["bob"]
    write(path, "[[key")
    assert not file.changed() and [key.name for key in file.keys] == ["bob"]
    path.unlink()
    assert not file.changed() and file.keys
    write(path, toml(ALICE))
    assert file.changed() and [key.name for key in file.keys] == ["alice"]


def write(path: Path, text: str) -> None:
    """As editors do: a new file in the place of the old one."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, path)


# --- the limits


def limits(*keys: ApiKey) -> KeyLimits:
    made = KeyLimits(Counters())
    made.replace(keys, 0.0)
    return made


def wait(made: KeyLimits, name: str, now: float) -> int:
    with pytest.raises(RequestError) as error:
        made.admit(digest(name), now)
    assert name in error.value.message
    return error.value.retry_after_s


def test_so_many_requests_a_minute():
    made = limits(key("a", requests_per_minute=6))
    for _ in range(6):
        made.admit(digest("a"), 0.0)
    assert wait(made, "a", 0.0) == 10
    assert wait(made, "a", 9.5) == 1
    made.admit(digest("a"), 10.0)
    assert made.headers(digest("a"), 10.0) == {
        "x-ratelimit-limit-requests": "6",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "60.0s",
    }
    for _ in range(6):
        made.admit(digest("a"), 1000.0)
    assert wait(made, "a", 1000.0) == 10, "a minute's worth and no more"


def test_so_many_tokens_a_minute_which_are_known_at_the_end():
    made = limits(key("a", tokens_per_minute=600))
    lease = made.admit(digest("a"), 0.0)
    lease.charge(100)
    lease.close(90, 810)
    assert wait(made, "a", 0.0) == 31, "300 tokens in debt at 10 a second"
    assert made.headers(digest("a"), 0.0)["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(RequestError, match="600 tokens a minute"):
        made.admit(digest("a"), 60.0).charge(301)
    assert made.headers(digest("a"), 60.0)["x-ratelimit-remaining-tokens"] == "300"


def test_a_prompt_longer_than_a_minute_s_tokens_passes_when_they_are_all_there():
    made = limits(key("a", tokens_per_minute=600))
    made.admit(digest("a"), 0.0).charge(5000)
    assert wait(made, "a", 0.0) > 400


def test_so_many_at_a_time():
    made = limits(key("a", parallel=2))
    first = made.admit(digest("a"), 0.0)
    made.admit(digest("a"), 0.0)
    assert wait(made, "a", 0.0) == 1
    first.close(1, 1)
    first.close(1, 1)
    made.admit(digest("a"), 0.0)
    wait(made, "a", 0.0)


def test_what_other_frontends_let_pass_counts():
    one, two = limits(key("a", requests_per_minute=6, parallel=9)), Counters()
    other = KeyLimits(two)
    other.replace([key("a")], 0.0)
    for _ in range(5):
        other.admit(digest("a"), 0.0)
    one.share(two.key_usage)
    one.share(two.key_usage)
    one.admit(digest("a"), 0.0)
    wait(one, "a", 0.0)


def test_new_limits_begin_anew_and_others_stay():
    made = limits(key("a", requests_per_minute=1), key("b", requests_per_minute=1))
    made.admit(digest("a"), 0.0)
    made.admit(digest("b"), 0.0)
    made.replace([key("a", requests_per_minute=2), key("b", requests_per_minute=1)], 0.0)
    made.admit(digest("a"), 0.0)
    wait(made, "b", 0.0)


def test_a_key_without_an_entry_has_no_limits():
    made = limits(key("a", requests_per_minute=1))
    for _ in range(5):
        lease = made.admit("other", 0.0)
        lease.charge(10**9)
        lease.close(1, 1)
    assert made.headers("other", 0.0) == {}


# --- over HTTP


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


def ask(server: Any, name: str, prompt: str = "hi", **body: Any) -> httpx.Response:
    fields = {"prompt": prompt, "max_tokens": 3, **body}
    return server.http.post("/v1/completions", json=fields, headers=bearer(name))


@pytest.fixture
def limited(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(service, "CHECK_S", 0.05)
    with serve(keys=("own",), config=FrontendConfig(api_keys_file=str(path))) as server:
        yield server


def test_requests_pass_until_the_key_s_minute_is_used_up(limited):
    for left in (2, 1, 0):
        answer = ask(limited, "a-key")
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-ratelimit-limit-requests"] == "3"
        assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
        assert answer.headers["x-ratelimit-limit-tokens"] == "100"
    answer = ask(limited, "a-key")
    refused_with = answer.json()["error"]
    assert answer.status_code == 429 and "3 requests a minute" in refused_with["message"]
    assert answer.headers["retry-after"] and answer.headers["x-ratelimit-remaining-requests"] == "0"
    assert ask(limited, "own").status_code == 200, "the flag's key has no limits"
    assert "x-ratelimit-limit-requests" not in ask(limited, "own").headers
    assert ask(limited, "other").status_code == 401
    text = limited.http.get("/metrics").text
    assert 'pagewire:key_requests_total{key="alice"} 3.0' in text
    assert 'pagewire:key_refused_total{key="alice"} 1.0' in text
    assert 'pagewire:key_generation_tokens_total{key="alice"} 9.0' in text
    assert 'pagewire:key_running{key="alice"} 0.0' in text


def test_a_prompt_that_the_key_has_no_tokens_for(limited):
    answer = ask(limited, "a-key", max_tokens=60)
    assert answer.status_code == 200
    refused_at = ask(limited, "a-key", "qqqq " * 100)
    assert refused_at.status_code == 429 and "100 tokens a minute" in refused_at.text
    assert not any("qqqq" in str(sent) for sent in limited.stack.received)


def test_one_at_a_time_and_streams_count(limited):
    done = threading.Event()

    def stream() -> None:
        body = {"prompt": "slow", "max_tokens": 30, "stream": True}
        with limited.http.stream(
            "POST", "/v1/completions", json=body, headers=bearer("b-key")
        ) as answer:
            for _ in answer.iter_lines():
                pass
        done.set()

    thread = threading.Thread(target=stream)
    thread.start()
    limited.settle(lambda: len(limited.owner) > 0)
    answer = ask(limited, "b-key")
    assert answer.status_code == 429 and "1 requests at a time" in answer.text
    thread.join(20)
    assert done.is_set() and ask(limited, "b-key").status_code == 200


def test_a_key_s_priority_is_where_its_requests_begin(limited):
    sent = limited.stack.received
    for asked, wanted in ((None, 7), (-100, 7), (3, 10)):
        sent.clear()
        ask(limited, "b-key", **({} if asked is None else {"priority": asked}))
        assert [message.priority for message in sent if hasattr(message, "priority")] == [wanted]


def test_keys_come_and_go_while_it_serves(limited, path: Path):
    write(path, toml({"name": "carol", "sha256": digest("c-key")}))
    limited.settle(lambda: ask(limited, "c-key").status_code == 200)
    assert ask(limited, "a-key").status_code == 401 and ask(limited, "own").status_code == 200
    write(path, "")
    limited.settle(lambda: ask(limited, "c-key").status_code == 401)


def test_a_file_without_keys_admits_nobody(path: Path):
    path.write_text("")
    with serve(config=FrontendConfig(api_keys_file=str(path))) as server:
        assert ask(server, "any").status_code == 401
        assert server.http.get("/health").status_code == 200


def test_a_refused_body_is_charged_no_tokens(limited):
    refused(
        limited.http.post("/v1/completions", json={"prompt": 5}, headers=bearer("b-key")), "prompt"
    )
    assert limited.frontend.service.state.counters.key_usage["running bob"] == 0


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/tokenize", {"prompt": "hi"}),
        ("/detokenize", {"tokens": [5]}),
        ("/v1/completions/render", {"prompt": "hi"}),
        ("/v1/chat/completions/render", {"messages": [{"role": "user", "content": "hi"}]}),
    ],
)
def test_routes_that_generate_nothing_count_as_requests(limited, route: str, body: dict[str, Any]):
    statuses = [
        limited.http.post(route, json=body, headers=bearer("a-key")).status_code for _ in range(4)
    ]
    assert statuses == [200, 200, 200, 429]

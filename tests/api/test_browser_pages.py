"""What a browser gets: the chat at /, the description of the API at /docs and /openapi.json. The
description is compared with what the server accepts."""

import base64
import hashlib
import html.parser
import json
import re
from typing import Any

import jsonschema
import pytest
from api.conftest import serve
from pagewire.config import FrontendConfig
from pagewire.frontend.app import make_app

PAGES = ("/", "/v1", "/v1/", "/docs")


@pytest.fixture(scope="module")
def guarded():
    with serve(keys=("s3cret",)) as server:
        yield server


@pytest.fixture(scope="module")
def description(shared) -> dict[str, Any]:
    return shared.http.get("/openapi.json").json()


class Reader(html.parser.HTMLParser):
    """The elements of a page, with their attributes, and the contents of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.contents: dict[str, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.contents[self.open[-1]] = data


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_one_file_and_asks_nobody_else(shared, path: str) -> None:
    answer = shared.http.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    page = Reader(answer.text)
    assert not page.open
    assert not re.search(r"https?:|//[a-z]|url\(|@import", answer.text.replace("// ", ""))
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "img")
        assert not attributes.keys() & {"src", "style", "onclick", "onload"}
        assert attributes.get("href", "/").startswith(("/", "data:,"))


@pytest.mark.parametrize("path", PAGES)
def test_the_policy_lets_nothing_run_but_the_page_s_own_script(shared, path: str) -> None:
    answer = shared.http.get(path)
    policy = dict(
        rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    contents = Reader(answer.text).contents
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(contents[tag].encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    script = contents["script"]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)


def test_with_keys_the_pages_ask_for_one(guarded) -> None:
    assert guarded.http.get("/").status_code == guarded.http.get("/v1").status_code == 200
    for text in (guarded.http.get(path).text for path in PAGES):
        assert guarded.frontend.service.state.names[0] not in text
    answer = guarded.http.get("/docs")
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert 'id="key"' in answer.text
    assert guarded.http.get("/openapi.json").status_code == 401
    key = {"Authorization": "Bearer s3cret"}
    assert guarded.http.get("/docs", headers=key).status_code == 200
    locked = guarded.http.get("/openapi.json", headers=key).json()
    assert locked["security"] == [{"key": []}]


def test_the_description_may_be_left_out() -> None:
    """By vLLM's name for it, though no FastAPI is here: the flag says what it means."""
    with serve(config=FrontendConfig(disable_fastapi_docs=True)) as bare:
        for path in ("/docs", "/openapi.json"):
            assert bare.http.get(path).status_code == 404
        assert bare.http.get("/").status_code == bare.http.get("/v1/models").status_code == 200


def test_every_route_is_described_and_no_other(shared, description) -> None:
    routes = {
        (route.method.lower(), route.resource.canonical)
        for route in make_app(shared.frontend.service.state).router.routes()
        if route.method != "HEAD"
    }
    described = {
        (method, path) for path, methods in description["paths"].items() for method in methods
    }
    assert described == routes


def test_the_description_is_openapi_whose_references_lead_somewhere(description) -> None:
    assert description["openapi"].startswith("3.1")
    schemas = description["components"]["schemas"]
    for name in re.findall(r'"\$ref": "([^"]*)"', json.dumps(description)):
        assert name.removeprefix("#/components/schemas/") in schemas
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_each_failure_of_a_described_route_is_described(shared, description) -> None:
    """With the shape that errors have."""
    validator = jsonschema.Draft202012Validator(
        {"$ref": "#/components/schemas/Error", "components": description["components"]}
    )
    for path in REQUESTS:
        answers = description["paths"][path]["post"]["responses"]
        for body, status in (({"no_such_parameter": 1}, 400), ({"model": "no/such"}, 404)):
            answer = shared.post(path, **{**REQUESTS[path], **body})
            assert answer.status_code == status and str(status) in answers
            assert answers[str(status)]["content"]["application/json"]["schema"]
            assert validator.is_valid(answer.json())
            assert not validator.is_valid({"error": "x"})


def test_what_a_request_leaves_out_is_described(description) -> None:
    schemas = description["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest"):
        fields = schemas[name]["properties"]
        assert fields["n"]["default"] == 1 and fields["ignore_eos"]["default"] is False
        assert fields["temperature"]["default"] == 1.0
    assert schemas["CompletionRequest"]["properties"]["max_tokens"]["default"] == 16


REQUESTS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "hi", "max_tokens": 1},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1]},
}
VALUES: dict[str, tuple[Any, ...]] = {
    # field: values on both sides of its bounds
    "temperature": (0, 100, -0.1, 101, "hot", None, True),
    "top_p": (0.5, 1, 0, 1.1),
    "top_k": (-1, 0, -2, 1.5),
    "n": (1, 0, 1025),
    "seed": (-1, 2**63 - 1, 2**63),
    "stop": ("a", ["a"] * 16, ["a"] * 17, "", ["a", ""], 5),
    "stop_token_ids": ([0], [-1], [0] * 129),
    "logit_bias": ({"1": 5}, {"1": 101}, [1]),
    "allowed_token_ids": ([1], [], [-1]),
    "max_tokens": (1, -1, 2**31),
    "ignore_eos": (True, "yes"),
    "presence_penalty": (-2, -2.1),
    "repetition_penalty": (0.1, 0),
    "cache_salt": ("a", "", "a" * 129),
    "stream": (False, 1),
    "tools": (None, [{"type": "function"}]),
    "no_such_parameter": (1, None),
    "logprobs": (False, True, 1),
    "stream_options": ({"no_such": 1}, None),
    "user": ("me", 5),
    "metadata": ({"a": "b"},),
    "response_format": ({"type": "text"}, "text"),
    "prompt": ("a", ["a"], [1], [[1]], 5),
    "messages": (
        [{"role": "user", "content": "a"}],
        "a",
        [{"content": "a"}],
        [{"role": "user", "content": "a", "tool_calls": [], "created": 5, "partial": False}],
        [{"role": "user", "content": "a", "tool_calls": [{"id": "x"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "a", "uuid": "b", "x": None}]}],
        [{"role": "user", "content": [{"type": "text", "text": "a", "x": 5}]}],
    ),
    "tokens": ([1], ["a"], 1),
}


@pytest.mark.parametrize("path", REQUESTS)
def test_what_the_description_allows_is_accepted_and_the_rest_refused(
    shared, description, path: str
) -> None:
    content = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    validator = jsonschema.Draft202012Validator(
        {**content["schema"], "components": description["components"]}
    )
    assert shared.post(path, **content["example"]).status_code == 200
    assert validator.is_valid(content["example"])
    name = content["schema"]["$ref"].rpartition("/")[2]
    fields = description["components"]["schemas"][name]["properties"]
    tried = 0
    for field, values in VALUES.items():
        if field not in fields and field != "no_such_parameter":
            continue
        for value in values:
            body = {**REQUESTS[path], field: value}
            status = shared.post(path, **body).status_code
            assert (status == 200) is validator.is_valid(body), (field, value, status)
            tried += 1
    assert tried > 3

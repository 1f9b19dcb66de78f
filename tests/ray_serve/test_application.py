"""The application on a real Ray cluster, with the fake model.

    PAGEWIRE_TEST_RAY_CLUSTER=1 make test ARGS="-s tests/ray_serve"

By request only: a cluster needs a machine for itself. Beside other tests Ray takes replicas that wait for
a processor for dead ones, and the tests take minutes.
"""

import asyncio
import http.client
import json
import os
import signal
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import pytest
from e2e.conftest import children_of, gone
from faults.clients import ask, body_of
from pagewire.worker.fake import chain
from ray_serve.conftest import Cluster
from ray_serve.load import VOCAB, Load

pytestmark = pytest.mark.skipif(
    not os.environ.get("PAGEWIRE_TEST_RAY_CLUSTER"),
    reason="a Ray cluster needs a machine for itself: set PAGEWIRE_TEST_RAY_CLUSTER=1",
)
PROMPT = [5, 6, 7]


def request(
    cluster: Cluster, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    parts = urlsplit(cluster.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    try:
        data = None if body is None else json.dumps(body)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, parts.path + path, data, headers)
        answer = connection.getresponse()
        return answer.status, {n.lower(): v for n, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def until(condition: Any, timeout_s: float = 90.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)


def test_every_route_is_passed_on(cluster: Cluster) -> None:
    assert request(cluster, "GET", "/health")[0] == 200
    status, headers, body = request(cluster, "GET", "/v1/models")
    assert status == 200 and headers["content-type"] == "application/json"
    assert json.loads(body)["data"][0]["owned_by"] == "pagewire"
    status, _, body = request(cluster, "POST", "/detokenize", {"tokens": [1]})
    assert status == 400 and b"skip" in body
    status, headers, _ = request(cluster, "GET", "/v1/no-such-route")
    assert status == 404
    status, headers, _ = request(cluster, "PUT", "/v1/completions", {})
    assert status == 405 and "POST" in headers["allow"]


def test_metrics_are_those_of_all_replicas(cluster: Cluster) -> None:
    status, headers, body = request(cluster, "GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    samples = [line for line in body.decode().splitlines() if not line.startswith("#")]
    assert samples and all('replica="' in sample for sample in samples)
    workers = [line for line in samples if line.startswith("pagewire:scheduler_workers{")]
    assert len(workers) == 1 and workers[0].endswith(" 1.0")


def test_headers_and_request_ids_are_passed_on(cluster: Cluster) -> None:
    body = {"prompt": PROMPT, "max_tokens": 2}
    status, headers, text = request(cluster, "POST", "/v1/completions", body, X_Request_Id="mine-7")
    assert status == 200 and headers["x-request-id"] == "mine-7"
    assert json.loads(text)["id"] == "cmpl-mine-7"
    status, headers, text = request(cluster, "POST", "/v1/completions", body)
    assert headers["x-request-id"] in json.loads(text)["id"]
    status, headers, text = request(cluster, "POST", "/v1/completions", {"prompt": 5.5})
    assert status == 400 and json.loads(text)["error"]["type"] == "BadRequestError"


def test_a_stream_is_the_stacks_own(cluster: Cluster) -> None:
    body = {**body_of(PROMPT, 6), "stream_options": {"include_usage": True}}
    status, headers, text = request(cluster, "POST", "/v1/completions", body, X_Request_Id="s")
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    events = text.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    tokens = [t for chunk in chunks for c in chunk["choices"] for t in c.get("token_ids") or ()]
    assert tokens == chain(PROMPT, 6, VOCAB)
    assert chunks[-1]["usage"]["completion_tokens"] == 6


def test_events_come_one_by_one(cluster: Cluster) -> None:
    """Nothing on the way gathers them: a slow model's events are apart at the client too."""
    answer = asyncio.run(ask(f"{cluster.url}/v1", body_of(PROMPT, 20)))
    assert answer.tokens == chain(PROMPT, 20, VOCAB)
    assert len(answer.arrivals) > 10


def test_a_client_that_leaves_frees_its_slot(cluster: Cluster) -> None:
    answer = asyncio.run(ask(f"{cluster.url}/v1", body_of(PROMPT, 2000), leave_after=3))
    assert answer.reason == "left"
    until(lambda: json.loads(request(cluster, "GET", "/load")[2]) == {"server_load": 0}, 20)


def test_replicas_come_go_and_die_under_load(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """1 to 3 replicas, one of them killed, and back to 1: no request fails, but for streams of the
    killed replica that had begun, which are cut."""
    streams = 9
    with Load(cluster.url, streams, others=3) as load:
        load.wait(6)
        cluster.deploy(3)
        until(lambda: all(cluster.do("ongoing")))
        assert load.record.cut == 0
        victim = cluster.do("pids")[0]
        services = list(children_of(victim))
        assert len(services) == 4
        os.kill(victim, signal.SIGKILL)
        assert gone(services, 10)
        load.wait(2 * streams)
        cut_by_death = load.record.cut
        cluster.deploy(1)
        load.wait(12)
    record = load.record
    assert not record.failed and not record.wrong, (record, cluster.log())
    assert record.cut == cut_by_death <= streams
    assert min(record.whole["streamed"], record.whole["not streamed"]) > 5
    with capsys.disabled():
        print(f"\n  {record.count} requests, {record.cut} streams cut, 0 errors")


def test_running_answers_are_finished_when_the_application_ends(cluster: Cluster) -> None:
    """The last test: the application is gone after it."""
    replica = cluster.do("pids")[0]
    services = list(children_of(replica))
    answers: list[Any] = []

    def stream() -> None:
        answers.append(asyncio.run(ask(f"{cluster.url}/v1", body_of(PROMPT, 150))))

    running = [threading.Thread(target=stream) for _ in range(4)]
    for thread in running:
        thread.start()
    until(lambda: sum(cluster.do("ongoing")) == 4)
    cluster.do("delete")
    for thread in running:
        thread.join(30)
    assert [answer.tokens for answer in answers] == [chain(PROMPT, 150, VOCAB)] * 4
    assert [answer.reason for answer in answers] == ["length"] * 4
    assert gone([replica, *services], 10)

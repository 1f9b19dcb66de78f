"""bench/structured.py load: several processes read what a server streams."""

import asyncio
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

SCRIPT = Path(__file__).parents[2] / "bench" / "structured.py"
TOKENS = 5


async def stream(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    request.app["asked"].append(body)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for number in range(body["max_tokens"]):
        chunk: dict[str, Any] = {"choices": [{"text": f" {number}"}], "usage": None}
        await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
    usage = {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}
    await response.write(f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())
    return response


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its address, and what it was asked."""
    asked: list[dict[str, Any]] = []
    loop = asyncio.new_event_loop()
    ports: list[int] = []
    there = threading.Event()

    async def begin() -> web.AppRunner:
        app = web.Application()
        app["asked"] = asked
        app.router.add_post("/v1/completions", stream)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        ports.append(runner.addresses[0][1])
        there.set()
        return runner

    def serve() -> None:
        runner = loop.run_until_complete(begin())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert there.wait(30)
    yield f"http://127.0.0.1:{ports[0]}", asked
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)


def test_all_streams_are_read_by_several_clients(
    server: tuple[str, list[dict[str, Any]]],
) -> None:
    url, asked = server
    options = ["--streams", "10", "--clients", "3", "--repeats", "1", "--max-tokens", str(TOKENS)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "load", "--url", url, *options],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = re.findall(r"^structured +(\S+): +\d+ tokens/s; ms", done.stdout, re.M)
    assert names == ["none", "20%", "all"]
    assert len(asked) == 30
    seeds = [body["seed"] for body in asked]
    assert all(seeds.count(index) == 3 for index in range(10))
    assert [
        sum("structured_outputs" in body for body in asked[i : i + 10]) for i in (0, 10, 20)
    ] == [
        0,
        2,
        10,
    ]

"""bench/structured.py load: several processes read what a server streams."""

import asyncio
import json
import re
import sys
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

from aiohttp import web

SCRIPT = Path(__file__).parents[2] / "bench" / "structured.py"


ASKED = web.AppKey("asked", list[dict[str, Any]])


async def stream(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    request.app[ASKED].append(body)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for number in range(body["max_tokens"]):
        chunk: dict[str, Any] = {"choices": [{"text": f" {number}"}], "usage": None}
        await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
    usage = {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}
    await response.write(f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())
    return response


async def load(*options: str) -> tuple[int, str, str, list[dict[str, Any]]]:
    """Of the script beside a server: its exit status, what it said, and what it asked."""
    app = web.Application()
    app[ASKED] = []
    app.router.add_post("/v1/completions", stream)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    command = [sys.executable, str(SCRIPT), "load", "--url", url, *options]
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)
    out, error = await asyncio.wait_for(process.communicate(), 120)
    await runner.cleanup()
    assert process.returncode is not None
    return process.returncode, out.decode(), error.decode(), app[ASKED]


def test_all_streams_are_read_by_several_clients() -> None:
    options = ["--streams", "10", "--clients", "3", "--repeats", "1", "--max-tokens", "5"]
    status, out, error, asked = asyncio.run(load(*options))
    assert status == 0, error[-2000:]
    names = re.findall(r"^structured +(\S+): +\d+ tokens/s; ms", out, re.M)
    assert names == ["none", "20%", "all"]
    seeds = [body["seed"] for body in asked]
    assert len(asked) == 30 and all(seeds.count(index) == 3 for index in range(10))
    held = ["structured_outputs" in body for body in asked]
    assert [sum(held[i : i + 10]) for i in (0, 10, 20)] == [0, 2, 10]


def test_kinds_of_traffic_take_turns_and_the_last_line_compares_them() -> None:
    options = ["--streams", "10", "--clients", "2", "--repeats", "2", "--max-tokens", "5"]
    status, out, error, asked = asyncio.run(load(*options))
    assert status == 0, error[-2000:]
    *lines, verdict = out.splitlines()
    assert [line.split()[1] for line in lines] == 2 * ["none:", "20%:", "all:"]
    assert len(asked) == 60
    assert re.fullmatch(
        r"streams without a grammar take [+-][\d.]+% .* [\d.]+ of the tokens", verdict
    )
